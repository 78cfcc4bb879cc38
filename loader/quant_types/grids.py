"""The codebooks ("grids") of IQ1, IQ2 and IQ3: the magnitudes of a run of four or eight weights, by its index.

They are data, not formulas, so they come from the gguf package, which is imported at first use.
"""

from __future__ import annotations

import torch

from .bits import fields
from .constants import per_device


@per_device
def grid(name: str, device: torch.device) -> torch.Tensor:
    """A type's grid.

    gguf-py stores it as text: hexadecimal digits of bytes that hold indices of 2 or 4 bits into ``grid_map``.

    Args:
        name: ``"IQ1_S"``, ``"IQ2_XXS"``, ``"IQ2_XS"``, ``"IQ2_S"``, ``"IQ3_XXS"`` or ``"IQ3_S"``.

    Returns:
        ``(entries, weights) int8``.
    """
    from gguf import quants

    source = getattr(quants, name)
    text = torch.tensor(list(source.grid_hex), dtype=torch.uint8, device=device)
    digits = ((text & 15) + 9 * (text >> 6)).unflatten(0, (-1, 2))
    packed = digits[:, 0] << 4 | digits[:, 1]
    index = fields(packed, 2 if len(source.grid_map) <= 4 else 4)
    values = torch.tensor(source.grid_map, dtype=torch.int8, device=device)
    return values[index.int()].view(source.grid_shape)


@per_device
def grid_words(name: str, device: torch.device) -> torch.Tensor:
    """``(entries,)``: a type's grid with each entry in one integer: int64 for runs of eight weights, int32 for four."""
    entries = grid(name, device)
    return entries.view(torch.int64 if entries.shape[1] == 8 else torch.int32).flatten()
