"""Loading a full-size file: 4 + 32 layers, 331 tensors, random blocks of one type."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from ..devtools.cache import cache_folder, locked
from ..devtools.random_models import auraflow_shapes
from ..loader.architecture import match
from ..loader.auraflow import AURAFLOW
from ..loader.gguf_file import open_gguf
from ..loader.model import load_model
from ..loader.quant_types import QUANT_TYPES
from ..quantizer.writer import TensorSpec, write_gguf
from .measure import anonymous_bytes, seconds

SCALE = np.float16(0.001)
SETTING_TEXT = "a full-size file, 4 + 32 layers, in the page cache"


def full_size_file(type_name: str = "Q4_0") -> Path:
    """AuraFlow v0.3's tensors with random packed bytes; types whose blocks begin with a float16 scale."""
    target = cache_folder() / "benchmarks" / f"full-size-{type_name}.gguf"
    with locked(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            _write(target, type_name)
    return target


def _write(target: Path, type_name: str) -> None:
    random = np.random.default_rng(0)

    def spec(name: str, shape: tuple[int, ...]) -> TensorSpec:
        packs = "_layers." in name
        return TensorSpec(name, shape, QUANT_TYPES[type_name if packs else "F16"])

    def data(tensor: TensorSpec):
        blocks = random.integers(0, 256, (tensor.nbytes // tensor.type.type_size, tensor.type.type_size), np.uint8)
        if tensor.type.name == type_name:
            blocks[:, :2] = np.frombuffer(SCALE.tobytes(), np.uint8)
        else:
            blocks = random.standard_normal(tensor.size, np.float32).astype(np.float16) * np.float16(0.02)
        yield memoryview(blocks).cast("B")

    tensors = [spec(name, shape) for name, shape in auraflow_shapes(4, 32, positional=9216).items()]
    write_gguf(target, {"general.architecture": "aura"}, tensors, data)


@torch.inference_mode()
def measure(type_name: str = "Q4_0") -> dict:
    """Seconds to open and check the file and to load it, both warm, and the anonymous memory that loading takes."""
    path = full_size_file(type_name)
    with open(path, "rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass

    def check() -> None:
        file = open_gguf(path)
        shapes = {name: info.shape for name, info in file.tensors.items()}
        match(AURAFLOW, shapes, metadata=file.metadata, path=file.path)

    load_model(path)
    before = anonymous_bytes()
    models = []
    load_seconds = seconds(lambda: models.append(load_model(path)))
    after = anonymous_bytes()
    return {
        "type": type_name,
        "file_bytes": os.path.getsize(path),
        "check_seconds": min(seconds(check) for _ in range(5)),
        "load_seconds": load_seconds,
        "anonymous_bytes": after - before if before is not None else None,
        "model_size": models[0].model_size(),
    }
