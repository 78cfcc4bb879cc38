"""Patches of every kind, as trainers write them, on some linears of the test files."""

from __future__ import annotations

import functools

import comfy.hooks
import comfy.lora
import torch

# Of two widths, in a layer and outside, and one that is too small to be anything but loaded whole, or dense.
LINEARS = ("double_layers.0.attn.w2k", "cond_seq_linear", "final_linear")
MODULATION = "single_layers.0.modCX.1"
MORE_LINEARS = (*LINEARS, MODULATION, "single_layers.0.mlp.c_proj")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.05


def lora(name: str, shape: tuple[int, int], rank: int = 4) -> dict[str, torch.Tensor]:
    out, into = shape
    return {f"{name}.lora_up.weight": noise(out, rank), f"{name}.lora_down.weight": noise(rank, into)}


def lora_alpha(name, shape):
    return lora(name, shape) | {f"{name}.alpha": torch.tensor(2.0)}


def dora(name, shape):
    return lora_alpha(name, shape) | {f"{name}.dora_scale": noise(1, shape[1]).abs() + 1}


def loha(name, shape):
    out, into = shape
    factors = {"hada_w1_a": (out, 4), "hada_w1_b": (4, into), "hada_w2_a": (out, 3), "hada_w2_b": (3, into)}
    return {f"{name}.{key}": 4 * noise(*size) for key, size in factors.items()} | {f"{name}.alpha": torch.tensor(2.0)}


def lokr(name, shape):
    out, into = shape
    return {f"{name}.lokr_w1": noise(8, 8), f"{name}.lokr_w2": noise(out // 8, into // 8)}


def glora(name, shape):
    out, into = shape
    sizes = {"a1": (4, into), "a2": (into, 4), "b1": (4, into), "b2": (out, 4)}
    return {f"{name}.{key}.weight": noise(*size) for key, size in sizes.items()}


def oft(name, shape):
    return {f"{name}.oft_blocks": noise(8, shape[0] // 8, shape[0] // 8)}


def boft(name, shape):
    blocks = max(2, shape[0] // 64)  # of 64 rows; two factors
    size = shape[0] // blocks
    return {f"{name}.oft_blocks": noise(2, blocks, size, size), f"{name}.alpha": torch.tensor(0.0)}


def diff(name, shape):
    return {f"{name}.diff": noise(*shape)}


KINDS = [lora, lora_alpha, dora, loha, lokr, glora, oft, boft, diff]
IN_EVERY_HOST = (lora, loha, dora, lokr)  # of low rank, and of those that are functions of the weight


def shapes_of(patcher, names=LINEARS) -> dict[str, tuple[int, int]]:
    """Of the weights of a model's linears."""
    modules = {name: patcher.model.diffusion_model.get_submodule(name) for name in names}
    return {name: (module.out_features, module.in_features) for name, module in modules.items()}


def state_of(patcher, kind, names=LINEARS) -> dict[str, torch.Tensor]:
    """What a file has of patches of one kind on a model's linears."""
    return _state_of(kind, tuple(shapes_of(patcher, names).items()))


@functools.lru_cache(maxsize=4)
def _state_of(kind, shapes: tuple[tuple[str, tuple[int, int]], ...]) -> dict[str, torch.Tensor]:
    return {key: value for name, shape in shapes for key, value in kind(f"diffusion_model.{name}", shape).items()}


def patched(patcher, kind, strength=1.0, names=LINEARS):
    """A clone with patches of one kind on the linears, loaded as ComfyUI loads a file of them."""
    state = state_of(patcher, kind, names)
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    clone = patcher.clone()
    applied = clone.add_patches(comfy.lora.load_lora(state, keys), strength)
    assert len(applied) == len(names)
    return clone


def outputs(patcher, names=LINEARS) -> dict[str, torch.Tensor]:
    """What linears give for fixed inputs; the patcher's weights must be loaded."""
    modules = {name: patcher.model.diffusion_model.get_submodule(name) for name in names}
    return {name: module(noise(5, module.in_features)) for name, module in modules.items()}


def lora_hooks(patcher, kind, strengths=(1.0,), names=LINEARS):
    """What Create Hook LoRA makes, with a keyframe for each strength, spread over the steps."""
    hooks = comfy.hooks.create_hook_lora(state_of(patcher, kind, names), 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for number, strength in enumerate(strengths):
        keyframes.add(comfy.hooks.HookKeyframe(strength, start_percent=number / len(strengths)))
    hooks.set_keyframes_on_hooks(keyframes)
    return hooks
