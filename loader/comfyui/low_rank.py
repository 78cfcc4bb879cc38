"""LoRAs beside a packed weight: ``y = W x + Σ s · up (down x)``, without touching W; likewise rows of an embedding.

Merging a LoRA into a packed weight means to dequantize the weight and to form ``up @ down``, in every step. Beside
it, all LoRAs of one linear are one pair of thin products: their factors are joined along the rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter

# A LoHa of rank r is a LoRA of rank r²: beyond this rank the dequantized weight is the cheaper way.
MAX_LOHA_RANK = 256


class LowRank:
    """The joined factors of all LoRAs of one linear or embedding.

    Attributes:
        down: ``(rank, in_features)``.
        up: ``(out_features, rank)``, strengths and alphas multiplied in.
        patches: what they were made of, as `low_rank` takes it.
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor, patches: Sequence[tuple]):
        self.down = down
        self.up = up
        self.patches = tuple(patches)  # ComfyUI appends to its own

    def is_of(self, patches: Sequence[tuple], device: torch.device | None, dtype: torch.dtype) -> bool:
        """Whether `low_rank` would give the same."""
        here = self.down.device
        if device is not None and (here.type != device.type or device.index not in (None, here.index)):
            return False
        return self.down.dtype == dtype and len(self.patches) == len(patches) and all(map(_same, self.patches, patches))

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def add_to(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """``output + up (down input)``, written into ``output`` ``(…, out_features)``."""
        hidden = torch.nn.functional.linear(input, self.down.to(input.device))
        rows = output.view(-1, output.shape[-1])
        rows.addmm_(hidden.view(-1, hidden.shape[-1]), self.up.to(input.device).t())
        return output

    def add_rows_to(self, output: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """``output + (up down)[indices]``, for an embedding; ``output`` is ``(…, in_features)``."""
        return output + (torch.nn.functional.embedding(indices, self.up) @ self.down).to(output.dtype)


def low_rank(
    key: str, patches: list[tuple], shape: torch.Size, device: torch.device | None, dtype: torch.dtype
) -> LowRank | None:
    """A weight's patches as joined factors, or None when one of them is not of low rank.

    Args:
        key: the weight's name, for the error.
        patches: as in ComfyUI's ``ModelPatcher.patches[key]``.
        shape: ``(out_features, in_features)`` of the weight.
        device, dtype: where and in what the model computes.

    Raises:
        ValueError: a patch is for a weight of another shape. (ComfyUI logs it, and leaves the weight as it is.)
    """
    factors = [_factors(patch) for patch in patches]
    if not all(factors):
        return None
    for down, up, _ in factors:
        if (len(up), down.shape[1]) != tuple(shape):
            raise ValueError(
                f"A LoRA changes {key} as a weight of {len(up)} × {down.shape[1]}, but it has {shape[0]} × {shape[1]}: "
                "the LoRA was made for another model. Remove it, or pick one for AuraFlow."
            )
    downs, ups, scales = zip(*factors, strict=True)
    down = torch.cat([down.to(device, dtype) for down in downs])
    up = torch.cat([(up.to(device, torch.float32) * s).to(dtype) for up, s in zip(ups, scales, strict=True)], dim=1)
    return LowRank(down, up, patches)


def _same(one: tuple, other: tuple) -> bool:
    (strength, adapter, *rest), (other_strength, other_adapter, *other_rest) = one, other
    return adapter is other_adapter and (strength, *rest) == (other_strength, *other_rest)


def _factors(patch: tuple) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """``(down, up, scale)`` of one patch, or None when it is not a plain sum onto the whole weight."""
    strength, adapter, strength_model, offset, function = patch
    if strength_model != 1.0 or offset is not None or function is not None:
        return None
    if isinstance(adapter, LoRAAdapter):
        up, down, alpha, mid, dora_scale, reshape = adapter.weights
        if mid is not None or dora_scale is not None or reshape is not None:
            return None
        rank = down.shape[0]
    elif isinstance(adapter, LoHaAdapter):
        up1, down1, alpha, up2, down2, mid1, _, dora_scale = adapter.weights
        rank = down1.shape[0]
        if mid1 is not None or dora_scale is not None or rank * down2.shape[0] > MAX_LOHA_RANK:
            return None
        # (up1 down1) ∘ (up2 down2): each pair of ranks is one rank of the product
        up = torch.einsum("oi,oj->oij", up1.float(), up2.float()).flatten(1)
        down = torch.einsum("ik,jk->ijk", down1.float(), down2.float()).flatten(0, 1)
    else:
        return None
    return down.flatten(1), up.flatten(1), strength * (1.0 if alpha is None else alpha / rank)
