"""A step of the transformer in ComfyUI: packed weights beside the same weights dense."""

from __future__ import annotations

from dataclasses import asdict

import comfy.model_management
import torch

from ..loader.comfyui.model import load_model
from ..tests.host.aura_files import load_dense, make_gguf
from ..tests.host.forward import forward, sampler_options
from .measure import anonymous_bytes, side_by_side

SETTING = {"size": 32, "tokens": 64}  # 16 × 16 = 256 image tokens
SETTING_TEXT = "AuraFlow of 1 double and 1 single layer at full width, 256 image and 64 text tokens, batch 1, float32"


@torch.inference_mode()
def measure(pairs: int, types: tuple[str, ...]) -> list[dict]:
    """One row a type: the ratio of a step to the dense model's, and the packed and the dense size in bytes."""
    rows = []
    device = comfy.model_management.get_torch_device()
    for type_name in types:
        path = make_gguf(type_name)
        dense, packed = load_dense(path), load_model(path, torch.float32)
        for patcher in (dense, packed):
            patcher.patch_model(device)
        options = sampler_options(packed)
        memory = anonymous_bytes()
        forward(packed, **SETTING, options=options)
        grown = anonymous_bytes() - memory if memory is not None else None
        ratio = side_by_side(
            lambda: forward(dense, **SETTING),  # noqa: B023
            lambda: forward(packed, **SETTING, options=options),  # noqa: B023
            pairs,
        )
        rows.append(
            {
                "type": type_name,
                **asdict(ratio),
                "packed_bytes": packed.model_size(),
                "dense_bytes": dense.model_size(),
                "first_step_anonymous_bytes": grown,
            }
        )
        print(f"{type_name:8} {ratio}", flush=True)
    return rows
