"""The steps that the packed layouts share: 16-bit scales, bit fields in bytes, values looked up by their index."""

from __future__ import annotations

import torch

from .constants import per_device


def halves(packed: torch.Tensor) -> torch.Tensor:
    """Read 16-bit floats.

    Args:
        packed: ``(n_blocks, 2 k) uint8``, at any offset.

    Returns:
        ``(n_blocks, k) float32``.
    """
    return packed.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def words(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Read integers: ``(n_blocks, k × itemsize) uint8``, at any offset → ``(n_blocks, k) dtype``."""
    return packed.clone(memory_format=torch.contiguous_format).view(dtype)


@per_device
def _shifts(width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


def planes(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Unpack bit fields, the lowest field of every byte first, then the second of every byte, …

    Args:
        packed: ``(…, k) uint8``.
        width: bits of a field: 1, 2 or 4.

    Returns:
        ``(…, 8 / width, k) uint8``.
    """
    if packed.device.type == "cpu":  # where torch vectorises a shift by one number, but not by several
        fields = torch.stack([packed >> shift for shift in range(0, 8, width)], dim=-2)
    else:
        fields = packed.unsqueeze(-2) >> _shifts(width, packed.device).unsqueeze(-1)
    return fields.bitwise_and_((1 << width) - 1)


def multiply(scale: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``scale × q``: float32, and small integers of the result's shape."""
    if q.device.type == "cpu":  # where torch does not vectorise a product of two types
        return q.float().mul_(scale)
    return scale * q


def multiply_add(scale: torch.Tensor, q: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """``scale × q + offset``: float32, small integers of the result's shape, and float32."""
    if q.device.type == "cpu":
        return multiply(scale, q).add_(offset)
    return torch.addcmul(offset, scale, q)


def fields(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Unpack bit fields, byte by byte, in each the lowest field first.

    Args:
        packed: ``(…, k) uint8``.
        width: bits of a field: 1, 2 or 4.

    Returns:
        ``(…, k, 8 / width) uint8``.
    """
    return (packed.unsqueeze(-1) >> _shifts(width, packed.device)).bitwise_and_((1 << width) - 1)


def lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]`` for a 1-D ``table``, with ``index``'s shape; the integers in ``index`` are of any type."""
    return table.index_select(0, index.int().flatten()).view(index.shape)


@per_device
def _nibble_pairs(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """``(256,) int16``: for each byte, the int8 value of its low nibble and that of its high one."""
    value = torch.tensor(values, dtype=torch.int8, device=device)
    return torch.stack((value.repeat(16), value.repeat_interleave(16)), dim=1).view(torch.int16).flatten()


def lookup_nibbles(values: tuple[int, ...], packed: torch.Tensor) -> torch.Tensor:
    """Replace 4-bit indices with what they stand for.

    Args:
        values: 16 integers of 8 bits.
        packed: ``(…, k) uint8``.

    Returns:
        ``(…, 2 k) int8``: the values of the low nibbles, then those of the high ones.
    """
    pairs = lookup(_nibble_pairs(values, packed.device), packed)
    return pairs.unsqueeze(-1).view(torch.int8).transpose(-1, -2).flatten(-2)
