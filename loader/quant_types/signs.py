"""Eight signs in a byte, as a factor of 1 or -1 for each of eight weights, packed in an int64."""

from __future__ import annotations

import torch

from .bits import fields, lookup
from .constants import per_device


@per_device
def byte_signs(device: torch.device) -> torch.Tensor:
    """``(256,) int64`` of eight int8: weight *i* is negative where bit *i* of the byte is set."""
    bits = fields(torch.arange(256, dtype=torch.uint8, device=device), 1)
    return bits.view(torch.int8).mul(-2).add_(1).view(torch.int64).flatten()


@per_device
def even_signs(device: torch.device) -> torch.Tensor:
    """``(128,) int64`` of eight int8, by 7 bits: the eighth sign is such that an even number is negative.

    It is ggml's ``ksigns_iq2xs``, read as above.
    """
    index = torch.arange(128, dtype=torch.uint8, device=device)
    parity = fields(index, 1).sum(dim=-1) & 1
    return lookup(byte_signs(device), index | parity << 7)
