"""The types with one scale for a block of 32 weights (Q1_0: 128, Q2_0: 64), and sometimes a minimum.

``d`` and ``m`` are 16-bit floats. The low nibbles of ``qs`` hold the first half of the block, the high ones the second;
bit *i* of ``qh`` is the fifth bit of weight *i*. Bytes and formulas are those of ``block_*`` and
``dequantize_row_*`` in ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import torch

from .bits import fields, halves, lookup, multiply, multiply_add, planes
from .signs import byte_signs


def dequantize_q1_0(blocks: torch.Tensor) -> torch.Tensor:
    """18 bytes, 128 weights: ``d[2] qs[16]``; ``x = d`` where bit *i* of ``qs`` is set, else ``-d``."""
    d, qs = blocks.split((2, 16), dim=1)
    signs = lookup(byte_signs(blocks.device), qs).view(torch.int8)
    return -halves(d) * signs


def dequantize_q2_0(blocks: torch.Tensor) -> torch.Tensor:
    """18 bytes, 64 weights: ``d[2] qs[16]``, four weights in a byte; ``x = d (q - 1)``."""
    d, qs = blocks.split((2, 16), dim=1)
    return multiply(halves(d), fields(qs, 2).flatten(1).view(torch.int8).sub_(1))


def dequantize_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """18 bytes, 32 weights: ``d[2] qs[16]``; ``x = d (q - 8)``."""
    d, qs = blocks.split((2, 16), dim=1)
    q = planes(qs, 4).view(torch.int8).sub_(8)
    return multiply(halves(d), q.flatten(1))


def dequantize_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """20 bytes, 32 weights: ``d[2] m[2] qs[16]``; ``x = d q + m``."""
    d, m, qs = blocks.split((2, 2, 16), dim=1)
    return multiply_add(halves(d), planes(qs, 4).flatten(1), halves(m))


def _five_bits(qh: torch.Tensor, qs: torch.Tensor) -> torch.Tensor:
    return planes(qs, 4).flatten(1).add_(fields(qh, 1).flatten(1), alpha=16)


def dequantize_q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """22 bytes, 32 weights: ``d[2] qh[4] qs[16]``; ``x = d (q - 16)``."""
    d, qh, qs = blocks.split((2, 4, 16), dim=1)
    return multiply(halves(d), _five_bits(qh, qs).view(torch.int8).sub_(16))


def dequantize_q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """24 bytes, 32 weights: ``d[2] m[2] qh[4] qs[16]``; ``x = d q + m``."""
    d, m, qh, qs = blocks.split((2, 2, 4, 16), dim=1)
    return multiply_add(halves(d), _five_bits(qh, qs), halves(m))


def dequantize_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """34 bytes, 32 weights: ``d[2] qs[32]``; ``x = d q``, ``q`` a signed byte."""
    d, qs = blocks.split((2, 32), dim=1)
    return multiply(halves(d), qs.view(torch.int8))
