"""LoRAs beside a packed weight: ``y = W x + Σ s · up (down x)``, without touching W; likewise rows of an embedding.

Merging a LoRA into a packed weight means to dequantize the weight and to form ``up @ down``, in every step. Beside
it, all LoRAs of one linear are one pair of thin products: their factors are joined along the rank.

A LoHa, ``(up₁ down₁) ∘ (up₂ down₂)``, is a LoRA whose rank is the product of its two. Only its own four factors are
kept. They are multiplied out when a linear is used, which takes as many operations as one more token, and memory for
one linear at a time. Of rank 16 on attention and MLP of all layers they are 0.15 GB in 16 bit, and it would be 1.2 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter

from ..kernels import add_low_rank

# A LoHa of rank r is a LoRA of rank r²: beyond this rank the dequantized weight is the cheaper way.
MAX_LOHA_RANK = 256

Factors = tuple[torch.Tensor, ...]


class LowRank:
    """The factors of all LoRAs and LoHas of one linear or embedding, strengths and alphas multiplied in.

    Attributes:
        lora: ``down (rank, in_features)`` and ``up (out_features, rank)`` of all LoRAs, joined; None without any.
        lohas: of each LoHa ``down1``, ``up1``, ``down2``, ``up2``.
        patches: what they were made of, as `low_rank` takes it.
    """

    def __init__(self, lora: Factors | None, lohas: Sequence[Factors], patches: Sequence[tuple]):
        self.lora = lora
        self.lohas = tuple(lohas)
        self.patches = tuple(patches)  # ComfyUI appends to its own

    def is_of(self, patches: Sequence[tuple], device: torch.device | None, dtype: torch.dtype) -> bool:
        """Whether `low_rank` would give the same."""
        one, *_ = self._tensors()
        if device is not None and (one.device.type != device.type or device.index not in (None, one.device.index)):
            return False
        return one.dtype == dtype and len(self.patches) == len(patches) and all(map(_same, self.patches, patches))

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in self._tensors())

    def _tensors(self) -> Factors:
        return sum(self.lohas, self.lora or ())

    def add_to(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """``output + Σ up (down input)``, written into ``output`` ``(…, out_features)``."""
        if self.lora is not None:
            add_low_rank(output, input, *_on(input.device, self.lora))
        for loha in self.lohas:
            add_low_rank(output, input, *_multiplied_out(*_on(input.device, loha)))
        return output

    def add_rows_to(self, output: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """``output + Σ (up down)[indices]``, for an embedding; ``output`` is ``(…, in_features)``."""
        rows = [_rows(indices, *self.lora)] if self.lora is not None else []
        rows += [_rows(indices, down1, up1) * _rows(indices, down2, up2) for down1, up1, down2, up2 in self.lohas]
        return output + sum(rows).to(output.dtype)


def is_low_rank(patches: Sequence[tuple]) -> bool:
    """Whether all of a weight's patches are of low rank."""
    return all(map(_factors_of, patches))


def low_rank(
    key: str, patches: list[tuple], shape: torch.Size, device: torch.device | None, dtype: torch.dtype
) -> LowRank | None:
    """A weight's patches as factors, or None when one of them is not of low rank.

    Args:
        key: the weight's name, for the error.
        patches: as in ComfyUI's ``ModelPatcher.patches[key]``.
        shape: ``(out_features, in_features)`` of the weight.
        device, dtype: where and in what the model computes.

    Raises:
        ValueError: a patch is for a weight of another shape. (ComfyUI logs it, and leaves the weight as it is.)
    """
    found = [_factors_of(patch) for patch in patches]
    if not all(found):
        return None
    loras, lohas = [], []
    for (down, up, *others), scale in found:
        if (len(up), down.shape[1]) != tuple(shape):
            raise ValueError(
                f"A LoRA changes {key} as a weight of {len(up)} × {down.shape[1]}, but it has {shape[0]} × {shape[1]}: "
                "the LoRA was made for another model. Remove it, or pick one for AuraFlow."
            )
        scaled = (up.to(device, torch.float32) * scale).to(dtype)
        factors = (down.to(device, dtype), scaled, *(factor.to(device, dtype) for factor in others))
        (lohas if others else loras).append(factors)
    downs, ups = zip(*loras, strict=True) if loras else ((), ())
    return LowRank((torch.cat(downs), torch.cat(ups, dim=1)) if loras else None, lohas, patches)


def _same(one: tuple, other: tuple) -> bool:
    (strength, adapter, *rest), (other_strength, other_adapter, *other_rest) = one, other
    return adapter is other_adapter and (strength, *rest) == (other_strength, *other_rest)


def _factors_of(patch: tuple) -> tuple[Factors, float] | None:
    """``down`` and ``up`` of one patch, a LoHa's other two, and the scale; None when it is not a plain sum onto the
    whole weight."""
    strength, adapter, strength_model, offset, function = patch
    if strength_model != 1.0 or offset is not None or function is not None:
        return None
    if isinstance(adapter, LoRAAdapter):
        up, down, alpha, mid, dora_scale, reshape = adapter.weights
        if mid is not None or dora_scale is not None or reshape is not None:
            return None
        factors = down, up
    elif isinstance(adapter, LoHaAdapter):
        up, down, alpha, up2, down2, mid, _, dora_scale = adapter.weights
        if mid is not None or dora_scale is not None or down.shape[0] * down2.shape[0] > MAX_LOHA_RANK:
            return None
        factors = down, up, down2, up2
    else:
        return None
    return tuple(factor.flatten(1) for factor in factors), strength * (1.0 if alpha is None else alpha / down.shape[0])


def _on(device: torch.device, factors: Factors) -> Factors:
    return tuple(factor.to(device) for factor in factors)


def _multiplied_out(down1: torch.Tensor, up1: torch.Tensor, down2: torch.Tensor, up2: torch.Tensor) -> Factors:
    """``down`` and ``up`` of a LoHa as a LoRA: each pair of ranks is one rank of the product."""
    down = down1.unsqueeze(1) * down2.unsqueeze(0)
    up = up1.unsqueeze(2) * up2.unsqueeze(1)
    return down.flatten(0, 1), up.flatten(1)


def _rows(indices: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(indices, up) @ down
