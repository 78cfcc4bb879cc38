"""The k-quants: 256 weights in 16 groups of 16 or 8 groups of 32, each group with a small integer scale of its own.

``d`` and ``dmin`` are 16-bit floats for the whole block. Bytes and formulas are those of ``block_q*_K`` and
``dequantize_row_q*_K`` in ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import torch

from .bits import halves, multiply, multiply_add, planes


def dequantize_q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """84 bytes: ``scales[16] qs[64] d[2] dmin[2]``; ``x = (d s) q - dmin m``, groups of 16.

    The low nibble of ``scales[g]`` is ``s``, the high one ``m``. 32 bytes of ``qs`` hold 128 weights of 2 bits: first
    the lowest fields of the 32 bytes, then the next.
    """
    scales, qs, dm = blocks.split((16, 64, 4), dim=1)
    return _scaled_minus_minimum(dm, planes(scales, 4), planes(qs.unflatten(1, (2, 32)), 2))


def dequantize_q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """110 bytes: ``hmask[32] qs[64] scales[12] d[2]``; ``x = d (s - 32) (q - 4)``, groups of 16.

    The two low bits of ``q`` are packed as in Q2_K; its third is a bit of ``hmask``: bit *i* of the 32 bytes belongs to
    the weights from 32 *i*. ``s`` has 6 bits: the 4 low ones are the nibbles of ``scales[0:8]``, low nibbles first, the
    2 high ones the fields of ``scales[8:12]``, lowest fields first.
    """
    hmask, qs, scales_low, scales_high, d = blocks.split((32, 64, 8, 4, 2), dim=1)
    s = planes(scales_low, 4).flatten(1).add_(planes(scales_high, 2).flatten(1), alpha=16).view(torch.int8).sub_(32)
    q = planes(qs.unflatten(1, (2, 32)), 2).flatten(1).add_(planes(hmask, 1).flatten(1), alpha=4)
    return _scaled(halves(d) * s, q.view(torch.int8).sub_(4))


def dequantize_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """144 bytes: ``d[2] dmin[2] scales[12] qs[128]``; ``x = (d s) q - dmin m``, groups of 32.

    32 bytes of ``qs`` hold 64 weights, the low nibbles first. ``s`` and ``m`` have 6 bits: see ``_six_bits``.
    """
    dm, scales, qs = blocks.split((4, 12, 128), dim=1)
    return _scaled_minus_minimum(dm, _six_bits(scales), planes(qs.unflatten(1, (4, 32)), 4))


def dequantize_q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """176 bytes: ``d[2] dmin[2] scales[12] qh[32] qs[128]``; ``x = (d s) q - dmin m``, groups of 32.

    As Q4_K, with a fifth bit of ``q`` in ``qh``: bit *i* of its 32 bytes belongs to group *i*.
    """
    dm, scales, qh, qs = blocks.split((4, 12, 32, 128), dim=1)
    q = planes(qs.unflatten(1, (4, 32)), 4).flatten(1).add_(planes(qh, 1).flatten(1), alpha=16)
    return _scaled_minus_minimum(dm, _six_bits(scales), q)


def dequantize_q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """210 bytes: ``ql[128] qh[64] scales[16] d[2]``; ``x = d s (q - 32)``, groups of 16, ``s`` a signed byte.

    For each half of the block: 64 bytes of ``ql`` hold the 4 low bits of 128 weights, low nibbles first, and 32 bytes
    of ``qh`` their 2 high bits, lowest fields first.
    """
    ql, qh, scales, d = blocks.split((128, 64, 16, 2), dim=1)
    q = planes(ql.unflatten(1, (2, 64)), 4).flatten(1)
    q = q.add_(planes(qh.unflatten(1, (2, 32)), 2).flatten(1), alpha=16).view(torch.int8).sub_(32)
    return _scaled(halves(d) * scales.view(torch.int8), q)


def _six_bits(scales: torch.Tensor) -> torch.Tensor:
    """Unpack eight ``s`` and eight ``m`` of 6 bits, from 12 bytes.

    Bytes 0–3 hold ``s[0:4]`` and bytes 4–7 ``m[0:4]``, each in its low 6 bits. ``s[4:8]`` and ``m[4:8]`` have their 4
    low bits in the low and high nibbles of bytes 8–11, and their 2 high bits in the two left over in bytes 0–3 and 4–7.

    Args:
        scales: ``(n_blocks, 12) uint8``.

    Returns:
        ``(n_blocks, 2, 8) uint8``: ``s``, ``m``.
    """
    first, nibbles = scales[:, :8].unflatten(1, (2, 4)), scales[:, 8:]
    return torch.cat((first & 63, planes(nibbles, 4) | (first >> 2 & 48)), dim=-1)


def _scaled(scale: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``(n_blocks, groups) float32`` × ``(n_blocks, 256) int8`` → ``(n_blocks, 256) float32``."""
    q = q.unflatten(1, (scale.shape[1], 256 // scale.shape[1]))
    return multiply(scale.unsqueeze(-1), q).flatten(1)


def _scaled_minus_minimum(dm: torch.Tensor, scales: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``(d s) q - dmin m``.

    Args:
        dm: ``(n_blocks, 4) uint8``: ``d``, ``dmin``.
        scales: ``(n_blocks, 2, groups) uint8``: ``s``, ``m``.
        q: ``(n_blocks, …) uint8``, 256 in a block.

    Returns:
        ``(n_blocks, 256) float32``.
    """
    scale, minimum = (halves(dm).unsqueeze(-1) * scales).unsqueeze(-1).unbind(1)
    q = q.flatten(1).unflatten(1, (scale.shape[1], 256 // scale.shape[1]))
    return multiply_add(scale, q, -minimum).flatten(1)
