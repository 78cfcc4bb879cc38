"""IQ4: 4-bit indices into 16 fixed values, spaced more closely around zero.

``d`` is a 16-bit float. 16 bytes of ``qs`` hold 32 weights, the low nibbles first. Bytes, formulas and values are those
of ``block_iq4_*``, ``dequantize_row_iq4_*`` and ``kvalues_iq4nl`` in ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import torch

from .bits import fields, halves, lookup_nibbles

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize_iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    """18 bytes, 32 weights: ``d[2] qs[16]``; ``x = d VALUES[q]``."""
    d, qs = blocks.split((2, 16), dim=1)
    return halves(d) * lookup_nibbles(VALUES, qs)


def dequantize_iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    """136 bytes, 256 weights: ``d[2] scales_h[2] scales_l[4] qs[128]``; ``x = d (s - 32) VALUES[q]``, groups of 32.

    ``s`` has 6 bits: the 4 low ones in a nibble of ``scales_l``, the 2 high ones in a field of ``scales_h``, both in
    order, the lowest of a byte first.
    """
    d, scales_h, scales_l, qs = blocks.split((2, 2, 4, 128), dim=1)
    s = fields(scales_l, 4).flatten(1).add_(fields(scales_h, 2).flatten(1), alpha=16).view(torch.int8).sub_(32)
    scale = (halves(d) * s).unsqueeze(-1)
    return (scale * lookup_nibbles(VALUES, qs.unflatten(1, (8, 16)))).flatten(1)
