"""PEFT's DoRA as a patch of ComfyUI's.

A row of the changed weight has the length that was trained, its magnitude::

    W' = m · (W + s · up down) / ‖W + s · up down‖   by row

(peft/tuners/lora/dora.py). ComfyUI's own DoRA, of ``dora_scale``, divides by the lengths of W's rows instead.
"""

from __future__ import annotations

import torch
from comfy.model_management import cast_to_device
from comfy.weight_adapter.base import WeightAdapterBase


class PeftDoRA(WeightAdapterBase):
    """``weights`` are up ``(rows, rank)``, down ``(rank, columns)``, alpha or None, and the magnitudes ``(rows,)``."""

    name = "peft dora"

    def __init__(self, loaded_keys: set[str], weights: tuple):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: tuple | None,
        function,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: object = None,
    ) -> torch.Tensor:
        """``W + strength · (W' - W)``, written into ``weight`` ``(rows, columns)``."""
        up, down, alpha, magnitude = self.weights
        up, down, magnitude = (
            cast_to_device(tensor, weight.device, intermediate_dtype) for tensor in (up, down, magnitude)
        )
        scale = 1.0 if alpha is None else alpha / len(down)
        changed = weight.to(intermediate_dtype) + function(scale * (up @ down))
        changed *= function(magnitude[:, None]) / changed.norm(dim=1, keepdim=True)
        weight += strength * (changed - weight).to(weight.dtype)
        return weight
