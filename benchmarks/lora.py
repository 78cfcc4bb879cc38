"""What LoRAs add to a step in ComfyUI: beside packed weights, and on dense ones, into which ComfyUI merges them."""

from __future__ import annotations

from dataclasses import asdict

import comfy.lora
import comfy.model_management
import torch

from ..loader.comfyui.model import load_model
from ..tests.host.aura_files import load_dense, make_gguf
from ..tests.host.forward import forward
from .measure import Ratio, side_by_side

TYPES = ("Q8_0", "Q4_K")
DENSE = "dense"
STACKS = (1, 4)
RANK = 16
SETTING = {"size": 32, "tokens": 64}  # 16 × 16 = 256 image tokens, where it adds most
SETTING_TEXT = (
    f"LoRAs of rank {RANK} on all 24 block linears of AuraFlow of 1 double and 1 single layer at full width, "
    "256 image and 64 text tokens (256²), batch 1, float32"
)


@torch.inference_mode()
def measure(pairs: int, kinds: tuple[str, ...] = (*TYPES, DENSE), stacks: tuple[int, ...] = STACKS) -> list[dict]:
    """One row for each kind of weights and number of LoRAs: the ratio of a step with them to one without."""
    rows = []
    for kind in kinds:
        plain = _loaded(kind, 0)
        for count in stacks:
            ratio = _ratio(plain, _loaded(kind, count), pairs)
            rows.append({"weights": kind, "loras": count, **asdict(ratio)})
            print(f"{kind:6} {count} LoRA{'s' if count > 1 else ' '} {ratio}", flush=True)
    return rows


def _ratio(plain, patched, pairs: int) -> Ratio:
    return side_by_side(lambda: forward(plain, **SETTING), lambda: forward(patched, **SETTING), pairs)


def _loaded(kind: str, count: int):
    """A model of its own with ``count`` LoRAs, so that several stay loaded."""
    patcher = load_dense(make_gguf(TYPES[0])) if kind == DENSE else load_model(make_gguf(kind), torch.float32)
    patcher = with_loras(patcher, count)
    patcher.patch_model(comfy.model_management.get_torch_device())
    return patcher


def with_loras(patcher, count: int):
    """A clone with ``count`` random LoRAs on every linear of its layers, loaded as ComfyUI loads files of them."""
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    clone = patcher.clone()
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        lora = {}
        for name, module in patcher.model.diffusion_model.named_modules():
            if "_layers." in name and isinstance(module, torch.nn.Linear):
                down = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
                up = torch.randn(module.out_features, RANK, generator=generator) * 0.01
                lora |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
        applied = clone.add_patches(comfy.lora.load_lora(lora, keys), 1.0)
        if 2 * len(applied) != len(lora):
            raise RuntimeError(f"ComfyUI took {len(applied)} of {len(lora) // 2} modules")
    return clone
