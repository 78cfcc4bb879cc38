"""IQ2: 256 weights in runs of eight, each an entry of a grid of magnitudes, with eight signs.

``d`` is a 16-bit float, ``s`` of 4 bits; ``x = d (s + 1/2) / 4 · ±g``. Bytes and formulas are those of ``block_iq2_*``
and ``dequantize_row_iq2_*`` in ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import torch

from .bits import fields, halves, lookup, words
from .constants import per_device
from .grids import grid_words
from .signs import byte_signs, even_signs


@per_device
def seven_bit_shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 28, 7, dtype=torch.int32, device=device)


def _scaled(d: torch.Tensor, s: torch.Tensor, magnitudes: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """``d (s + 1/2) / 4 · ±g``.

    Args:
        d: ``(n_blocks, 2) uint8``.
        s: ``(n_blocks, groups)``, integers.
        magnitudes, signs: ``(n_blocks, 32) int64`` of eight int8.

    Returns:
        ``(n_blocks, 256) float32``.
    """
    scale = (halves(d) * (s + 0.5) * 0.25).unsqueeze(-1)
    values = magnitudes.view(torch.int8) * signs.view(torch.int8)
    return (scale * values.unflatten(1, (scale.shape[1], -1))).flatten(1)


def dequantize_iq2_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """66 bytes: ``d[2] qs[64]``, groups of 32 weights.

    A group has 8 bytes of ``qs``: four indices of 8 bits, then a 32-bit word: four times 7 bits of signs, and ``s``.
    """
    d, qs = blocks.split((2, 64), dim=1)
    index = qs.unflatten(1, (8, 8))[:, :, :4].flatten(1)
    word = words(qs, torch.int32)[:, 1::2]
    signs = (word.unsqueeze(-1) >> seven_bit_shifts(blocks.device) & 127).flatten(1)
    magnitudes = lookup(grid_words("IQ2_XXS", blocks.device), index)
    return _scaled(d, word >> 28 & 15, magnitudes, lookup(even_signs(blocks.device), signs))


def dequantize_iq2_xs(blocks: torch.Tensor) -> torch.Tensor:
    """74 bytes: ``d[2] qs[64] scales[8]``, groups of 16 weights.

    A run of eight weights has a 16-bit word of ``qs``: an index of 9 bits, then 7 bits of signs. The nibbles of
    ``scales`` are ``s``, the low one first.
    """
    d, qs, scales = blocks.split((2, 64, 8), dim=1)
    word = words(qs, torch.int16).int()
    magnitudes = lookup(grid_words("IQ2_XS", blocks.device), word & 511)
    signs = lookup(even_signs(blocks.device), word >> 9 & 127)
    return _scaled(d, fields(scales, 4).flatten(1), magnitudes, signs)


def dequantize_iq2_s(blocks: torch.Tensor) -> torch.Tensor:
    """82 bytes: ``d[2] qs[32] signs[32] qh[8] scales[8]``, groups of 16 weights.

    A run of eight weights has a byte of ``qs``, the low bits of its index, a field of 2 bits of ``qh``, the high ones,
    lowest field first, and a byte of ``signs``. ``s`` as in IQ2_XS.
    """
    d, qs, signs, qh, scales = blocks.split((2, 32, 32, 8, 8), dim=1)
    index = qs | fields(qh, 2).flatten(1).int() << 8
    magnitudes = lookup(grid_words("IQ2_S", blocks.device), index)
    return _scaled(d, fields(scales, 4).flatten(1), magnitudes, lookup(byte_signs(blocks.device), signs))
