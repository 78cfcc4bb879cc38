"""AuraFlow GGUF files at ComfyUI's full width, and the dense twin of each: the same numbers, dequantized."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import comfy.sd
import gguf
import torch
from auraflow_gguf.devtools import random_models
from auraflow_gguf.devtools.cache import cache_folder, locked
from auraflow_gguf.devtools.server import ROOT
from auraflow_gguf.loader.auraflow import AURAFLOW
from auraflow_gguf.loader.gguf_file import open_gguf
from auraflow_gguf.quantizer.recipe import recipe_for


def make_gguf(type_name: str, *tensor_types: str) -> Path:
    """An AuraFlow of one double and one single layer as a file of one recipe, made once for the code that makes it.

    Args:
        type_name: what ``convert`` takes.
        tensor_types: its ``pattern=TYPE`` overrides.
    """
    folder = cache_folder() / "tests"
    target = folder / f"{'-'.join((type_name, *tensor_types)).replace('*', '_')}.{_code_hash()}.gguf"
    with locked(folder / "lock"):
        if not target.exists():
            recipe = recipe_for(type_name, tensor_types)
            random_models.make_packed_auraflow(target, recipe, double_layers=1, single_layers=1)
    return target


def make_checkpoint() -> Path:
    """A checkpoint of the same size in bfloat16, made once."""
    folder = cache_folder() / "tests"
    checkpoint = folder / f"auraflow.v{random_models.VERSION}.safetensors"
    with locked(folder / "lock"):
        if not checkpoint.exists():
            random_models.make_auraflow(checkpoint, double_layers=1, single_layers=1, seed=0)
    return checkpoint


@functools.cache
def _code_hash() -> str:
    """Of the code that makes the files, so that a change of it makes new ones."""
    sources = [*ROOT.glob("quantizer/*.py"), ROOT / "devtools" / "random_models.py"]
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def respell(
    source: Path,
    target: Path,
    *,
    prefix: str = "",
    spelling: str = "native",
    architecture: str = "",
    biases: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Path:
    """The same packed tensors under other names, as another tool would have written them.

    Args:
        source: a file in the native spelling.
        target: the new file, written by gguf-py.
        prefix: what stands before every name.
        spelling: ``"diffusers"`` renames, and swaps the halves of ``norm_out.linear``.
        architecture: ``general.architecture``.
        biases: float32 tensors to be added, by native name.
    """
    file = open_gguf(source)
    writer = gguf.GGUFWriter(target, architecture)
    for name, info in file.tensors.items():
        rows = file.packed(name).view(info.shape[0], -1) if len(info.shape) == 2 else file.packed(name)
        if spelling == "diffusers":
            if AURAFLOW.find(name, "native")[0].swap_halves:
                rows = torch.cat(rows.chunk(2)[::-1])
            name = AURAFLOW.spell(name, "diffusers")
        raw_shape = (*info.shape[:-1], info.type.row_bytes(info.shape[-1]))
        writer.add_tensor(
            prefix + name, rows.numpy().reshape(raw_shape), raw_dtype=gguf.GGMLQuantizationType(info.type.id)
        )
    for name, bias in biases.items():
        writer.add_tensor(
            prefix + (AURAFLOW.spell(name, "diffusers") if spelling == "diffusers" else name), bias.numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def dense_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a natively spelled file, dequantized to float32."""
    file = open_gguf(path)
    return {
        name: info.type.dequantize(file.packed(name).view(-1, info.type.row_bytes(info.shape[-1]))).reshape(info.shape)
        for name, info in file.tensors.items()
    }


def load_dense(path: Path):
    """The dense twin of a file, loaded by ComfyUI alone."""
    return comfy.sd.load_diffusion_model_state_dict(dense_state_dict(path), model_options={"dtype": torch.float32})
