"""The 4-bit floats (E2M1): 16 values, times a scale that is a small float itself.

``E2M1`` holds the values doubled, as ggml does, so that they are integers; the scales are halved instead. The low
nibbles of a group come first, then the high ones. Bytes and formulas are those of ``block_mxfp4``, ``block_nvfp4`` and
``dequantize_row_*`` in ggml's ggml-common.h and ggml-quants.c, of ``ggml_e8m0_to_fp32_half`` and
``ggml_ue4m3_to_fp32`` in its ggml-impl.h.
"""

from __future__ import annotations

import torch

from .bits import lookup, lookup_nibbles
from .constants import per_device

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@per_device
def _half_e8m0(device: torch.device) -> torch.Tensor:
    """``(256,) float32``: half of the power of two that the byte ``e`` stands for, ``2 ** (e - 127)``."""
    return torch.tensor([2.0 ** (e - 128) for e in range(256)], dtype=torch.float32, device=device)


@per_device
def _half_ue4m3(device: torch.device) -> torch.Tensor:
    """``(256,) float32``: half of an unsigned float with 4 exponent and 3 mantissa bits; the top bit is ignored."""

    def half(byte: int) -> float:
        exponent, mantissa = byte >> 3 & 15, byte & 7
        if byte == 0x7F:
            return 0.0
        if exponent == 0:
            return mantissa * 2.0**-10
        return (8 + mantissa) * 2.0 ** (exponent - 11)

    return torch.tensor([half(byte) for byte in range(256)], dtype=torch.float32, device=device)


def dequantize_mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """17 bytes, 32 weights: ``e[1] qs[16]``; ``x = 2 ** (e - 128) E2M1[q]``."""
    e, qs = blocks.split((1, 16), dim=1)
    return lookup(_half_e8m0(blocks.device), e) * lookup_nibbles(E2M1, qs)


def dequantize_nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    """36 bytes, 64 weights: ``d[4] qs[32]``; ``x = UE4M3[d] / 2 · E2M1[q]``, groups of 16 weights, 8 bytes."""
    d, qs = blocks.split((4, 32), dim=1)
    scale = lookup(_half_ue4m3(blocks.device), d).unsqueeze(-1)
    return (scale * lookup_nibbles(E2M1, qs.unflatten(1, (4, 8)))).flatten(1)
