"""IQ3: 256 weights in runs of four, each an entry of a grid of magnitudes, with signs for every eight weights.

``d`` is a 16-bit float, ``s`` of 4 bits, one for 32 weights. Bytes and formulas are those of ``block_iq3_*`` and
``dequantize_row_iq3_*`` in ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import torch

from .bits import fields, halves, lookup, words
from .grids import grid_words
from .iq2 import seven_bit_shifts
from .signs import byte_signs, even_signs


def _scaled(scale: torch.Tensor, magnitudes: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Multiply a scale, magnitudes and signs.

    Args:
        scale: ``(n_blocks, 8) float32``.
        magnitudes: ``(n_blocks, 64) int32`` of four int8.
        signs: ``(n_blocks, 32) int64`` of eight int8.

    Returns:
        ``(n_blocks, 256) float32``.
    """
    values = magnitudes.view(torch.int8) * signs.view(torch.int8)
    return (scale.unsqueeze(-1) * values.unflatten(1, (8, 32))).flatten(1)


def dequantize_iq3_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """98 bytes: ``d[2] qs[64] words[32]``; ``x = d (s + 1/2) / 2 · ±g``.

    ``qs`` are the indices. Each of the eight 32-bit words has four times 7 bits of signs, and ``s``.
    """
    d, qs, word = blocks.split((2, 64, 32), dim=1)
    word = words(word, torch.int32)
    signs = (word.unsqueeze(-1) >> seven_bit_shifts(blocks.device) & 127).flatten(1)
    scale = halves(d) * ((word >> 28 & 15) + 0.5) * 0.5
    return _scaled(scale, lookup(grid_words("IQ3_XXS", blocks.device), qs), lookup(even_signs(blocks.device), signs))


def dequantize_iq3_s(blocks: torch.Tensor) -> torch.Tensor:
    """110 bytes: ``d[2] qs[64] qh[8] signs[32] scales[4]``; ``x = d (2 s + 1) · ±g``.

    ``qs`` has the low bytes of the indices, bit *i* of ``qh`` the ninth bit of index *i*, ``signs`` a byte for eight
    weights, ``scales`` two ``s`` in a byte, the low nibble first.
    """
    d, qs, qh, signs, scales = blocks.split((2, 64, 8, 32, 4), dim=1)
    index = qs | fields(qh, 1).flatten(1).int() << 8
    scale = halves(d) * (2 * fields(scales, 4).flatten(1) + 1)
    return _scaled(scale, lookup(grid_words("IQ3_S", blocks.device), index), lookup(byte_signs(blocks.device), signs))
