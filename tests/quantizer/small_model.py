"""An AuraFlow transformer small enough for a test: hidden 256, MLP 768, one double and two single layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.matching import match
from safetensors.torch import save_file

HIDDEN, MLP, TEXT, POSITIONS = 256, 768, 128, 64
# Lets the small widths pass: no dimension is given, all are taken from the shapes.
FIXED: dict[str, int] = {}


def native_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        "positional_encoding": (1, POSITIONS, HIDDEN),
        "register_tokens": (1, 8, HIDDEN),
        "t_embedder.mlp.0.weight": (HIDDEN, 256),
        "t_embedder.mlp.0.bias": (HIDDEN,),
        "t_embedder.mlp.2.weight": (HIDDEN, HIDDEN),
        "t_embedder.mlp.2.bias": (HIDDEN,),
        "init_x_linear.weight": (HIDDEN, 16),
        "init_x_linear.bias": (HIDDEN,),
        "cond_seq_linear.weight": (HIDDEN, TEXT),
        "final_linear.weight": (16, HIDDEN),
        "modF.1.weight": (2 * HIDDEN, HIDDEN),
    }
    attention = dict.fromkeys("qkvo", (HIDDEN, HIDDEN))
    mlp = {"c_fc1": (MLP, HIDDEN), "c_fc2": (MLP, HIDDEN), "c_proj": (HIDDEN, MLP)}
    modulation = (6 * HIDDEN, HIDDEN)
    layer = "double_layers.0"
    for side in (1, 2):
        shapes |= {f"{layer}.attn.w{side}{letter}.weight": shape for letter, shape in attention.items()}
    for side in "CX":
        shapes |= {f"{layer}.mlp{side}.{name}.weight": shape for name, shape in mlp.items()}
        shapes[f"{layer}.mod{side}.1.weight"] = modulation
    for layer in ("single_layers.0", "single_layers.1"):
        shapes |= {f"{layer}.attn.w1{letter}.weight": shape for letter, shape in attention.items()}
        shapes |= {f"{layer}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes[f"{layer}.modCX.1.weight"] = modulation
    return shapes


def native_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = native_shapes()
    return {name: torch.randn(shape, generator=generator).mul(0.05).to(dtype) for name, shape in shapes.items()}


def diffusers_weights(native: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same model in diffusers' spelling, the halves of ``norm_out`` swapped."""
    weights = {AURAFLOW.spell(name, "diffusers"): tensor for name, tensor in native.items()}
    scale_and_shift = weights["norm_out.linear.weight"]
    weights["norm_out.linear.weight"] = torch.cat([scale_and_shift[HIDDEN:], scale_and_shift[:HIDDEN]])
    return weights


def save_sharded(folder: Path, weights: dict[str, torch.Tensor], stem: str = "diffusion_pytorch_model") -> Path:
    """Two shards and their index; returns the index."""
    names = sorted(weights)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def loads(file) -> None:
    """Fails unless an opened GGUF file is the small model in native spelling, with annotations that agree."""
    found = match(AURAFLOW, file.shapes, metadata=file.metadata, path=file.path, fixed=FIXED)
    assert found.spelling == "native"
    assert found.prefix == ""
    assert file.metadata["aura.tensor_names"] == "native"
    assert found.dimensions["positional_encoding_length"] == POSITIONS
