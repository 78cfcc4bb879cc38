"""GGUF files of AuraFlow and its text encoder at ComfyUI's full width, and the dense twin of each: the same numbers,
dequantized."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import comfy.sd
import gguf
import libgguf
import numpy as np
import torch
from auraflow_gguf.devtools import random_models
from auraflow_gguf.devtools.cache import cache_folder, locked
from auraflow_gguf.devtools.server import ROOT
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.gguf_file import TensorInfo, open_gguf
from auraflow_gguf.loader.files.pile_t5 import PILE_T5_XL, STACK
from auraflow_gguf.quantizer.convert import convert
from auraflow_gguf.quantizer.recipe import recipe_for
from comfy.text_encoders.aura_t5 import AuraT5Model, AuraT5Tokenizer

TEXT_LAYERS = 2
TEXT_SIZES = PILE_T5_XL.fixed | {STACK: TEXT_LAYERS}


def make_gguf(type_name: str, *tensor_types: str) -> Path:
    """An AuraFlow of one double and one single layer as a file of one recipe, made once for the code that makes it.

    Args:
        type_name: what ``convert`` takes.
        tensor_types: its ``pattern=TYPE`` overrides.
    """

    def make(target: Path) -> None:
        recipe = recipe_for(type_name, tensor_types)
        random_models.make_packed_auraflow(target, recipe, double_layers=1, single_layers=1)

    return made(f"{recipe_name('auraflow', type_name, *tensor_types)}.{code_hash()}.gguf", make)


def make_text_encoder_gguf(type_name: str, *tensor_types: str) -> Path:
    """A text encoder of two layers as a file of one recipe, made likewise."""
    checkpoint = make_text_encoder_checkpoint()

    def make(target: Path) -> None:
        convert(checkpoint, target, type_name, tensor_types=tensor_types, fixed=TEXT_SIZES)

    return made(f"{recipe_name('pile-t5', type_name, *tensor_types)}.{code_hash()}.gguf", make)


def make_text_encoder_checkpoint() -> Path:
    """A checkpoint of the same text encoder in float16, made once."""

    def make(target: Path) -> None:
        random_models.make_text_encoder(target, layers=TEXT_LAYERS)

    return made(f"pile-t5.v{random_models.VERSION}.safetensors", make)


def recipe_name(*parts: str) -> str:
    """A file's name out of what its recipe is called."""
    return "-".join(parts).replace("*", "_")


def made(name: str, make: Callable[[Path], None]) -> Path:
    """A file in the cache, made when it is missing."""
    folder = cache_folder() / "tests"
    target = folder / name
    with locked(folder / "lock"):
        if not target.exists():
            partial = target.with_name(f"partial-{name}")
            partial.unlink(missing_ok=True)
            make(partial)
            partial.replace(target)
            _remove_older(folder.glob(f"{name.rsplit('.', 2)[0]}.*{target.suffix}"))
    return target


def _remove_older(versions: Iterable[Path], keep: int = 2) -> None:
    """Files of a hundred MB and more, of earlier code: another clone may use the last of them at this moment."""
    for path in sorted(versions, key=lambda path: path.stat().st_mtime)[:-keep]:
        with suppress(OSError):  # Windows does not remove what is open
            path.unlink()


@functools.cache
def code_hash() -> str:
    """Of the code that makes the files, so that a change of it makes new ones."""
    sources = [*ROOT.glob("quantizer/**/*.py"), ROOT / "devtools" / "random_models.py"]
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
    """Every tensor of a natively spelled file, dequantized to float32 by ggml's code."""
    file = open_gguf(path)
    return {
        name: torch.from_numpy(_dequantize(file.packed(name).numpy(), info)).reshape(info.shape)
        for name, info in file.tensors.items()
    }


def _dequantize(packed: np.ndarray, info: TensorInfo) -> np.ndarray:
    if info.type.block_size == 1:
        return info.type.dequantize(torch.from_numpy(packed).view(1, -1)).numpy()
    return libgguf.dequantize_rows(packed.reshape(-1, info.type.row_bytes(info.shape[-1])), info.type.id)


def load_dense(path: Path):
    """The dense twin of a file, loaded by ComfyUI alone."""
    return comfy.sd.load_diffusion_model_state_dict(dense_state_dict(path), model_options={"dtype": torch.float32})


def dense_text_encoder(path: Path, layers: int = TEXT_LAYERS) -> comfy.sd.CLIP:
    """The dense twin of a file in llama.cpp's spelling: ComfyUI's own class with ComfyUI's own operations, float32."""
    weights = {PILE_T5_XL.spell(name, "native"): weight for name, weight in dense_state_dict(path).items()}
    return clip_of(weights, layers)


def clip_of(weights: dict[str, torch.Tensor], layers: int = TEXT_LAYERS) -> comfy.sd.CLIP:
    return comfy.sd.CLIP(
        SimpleNamespace(params={}, clip=AuraT5Model, tokenizer=AuraT5Tokenizer),
        state_dict=[weights],
        model_options={"dtype": torch.float32, "pile_t5xl_model_config": {"num_layers": layers}},
    )
