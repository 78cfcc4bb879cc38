"""IQ1: 256 weights in runs of eight, each an entry of a grid of -1, 0 and 1, moved up or down by 1/8.

``d`` is a 16-bit float, ``s`` of 3 bits; ``x = d (2 s + 1) (g ± 1/8)``. Bytes and formulas are those of ``block_iq1_*``
and ``dequantize_row_iq1_*`` in ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import torch

from .bits import fields, halves, lookup, words
from .constants import per_device
from .grids import grid


@per_device
def _moved_grid(device: torch.device) -> torch.Tensor:
    """``(4096,) int64`` of eight int8: ``8 g + 1`` for the grid's 2048 entries, then ``8 g - 1``."""
    eighths = 8 * grid("IQ1_S", device)
    return torch.cat((eighths + 1, eighths - 1)).view(torch.int64).flatten()


@per_device
def _three_bit_shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 12, 3, dtype=torch.int32, device=device)


def _scaled(scale: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``(n_blocks, groups) float32`` and ``(n_blocks, 32) int32`` in ``_moved_grid`` → ``(n_blocks, 256) float32``."""
    moved = lookup(_moved_grid(index.device), index).view(torch.int8)
    scale = (scale * 0.125).unsqueeze(-1)
    return (scale * moved.unflatten(1, (scale.shape[1], -1))).flatten(1)


def dequantize_iq1_s(blocks: torch.Tensor) -> torch.Tensor:
    """50 bytes: ``d[2] qs[32] qh[16]``, groups of 32 weights.

    Each group has one of the eight 16-bit words of ``qh``: four times the 3 high bits of an index whose low byte is in
    ``qs``, then ``s``, then the sign of 1/8.
    """
    d, qs, qh = blocks.split((2, 32, 16), dim=1)
    qh = words(qh, torch.int16).int()
    scale = halves(d) * (2 * (qh >> 12 & 7) + 1)
    qh = qh.unsqueeze(-1)
    high = (qh >> _three_bit_shifts(blocks.device) & 7) | (qh >> 12 & 8)
    return _scaled(scale, qs | high.flatten(1) << 8)


def dequantize_iq1_m(blocks: torch.Tensor) -> torch.Tensor:
    """56 bytes: ``qs[32] qh[16] scales[8]``, groups of 16 weights.

    A nibble of ``qh`` has the 3 high bits of an index, and the sign of 1/8. Each of the four 16-bit words of ``scales``
    has ``s`` of four groups, and above them a nibble of ``d``, the lowest nibble in the first word.
    """
    qs, qh, scales = blocks.split((32, 16, 8), dim=1)
    scales = words(scales, torch.int16)
    first, second, third, fourth = scales.unsqueeze(-1).unbind(1)
    d = (first >> 12 & 0xF) | (second >> 8 & 0xF0) | (third >> 4 & 0xF00) | (fourth & -0x1000)
    s = scales.unsqueeze(-1) >> _three_bit_shifts(blocks.device) & 7
    scale = d.view(torch.float16).float() * (2 * s.flatten(1) + 1)
    return _scaled(scale, qs | fields(qh, 4).flatten(1).int() << 8)
