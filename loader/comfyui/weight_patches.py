"""Patches of a packed weight as ComfyUI's weight functions, which act on the dequantized weight when it is used."""

from __future__ import annotations

import comfy.lora


class WeightPatches:
    """A weight function: a list of ComfyUI's patches, applied to a dense weight.

    Args:
        key: the weight's name in the model's state dict.
        patches: as in ``ModelPatcher.patches[key]``.
        original_weights: as ComfyUI's ``calculate_weight`` takes them, for patches that refer to the base.
    """

    def __init__(self, key: str, patches: list[tuple], original_weights: dict | None = None):
        self.key = key
        self.patches = patches
        self.original_weights = original_weights

    def __call__(self, weight):
        return comfy.lora.calculate_weight(
            self.patches, weight, self.key, intermediate_dtype=weight.dtype, original_weights=self.original_weights
        )


class HookPatches(WeightPatches):
    """The patches of the hooks that are active now; removed when the hooks change."""
