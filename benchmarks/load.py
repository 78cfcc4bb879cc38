"""Loading a full-size file: 4 + 32 layers, 331 tensors, random blocks of one type."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..devtools.cache import cache_folder, locked
from ..devtools.random_models import make_packed_auraflow
from ..loader.comfyui.model import load_model
from ..loader.files.auraflow import AURAFLOW
from ..loader.weights.state_dict import open_checked
from ..quantizer.recipe import recipe_for
from .measure import anonymous_bytes, seconds

SETTING_TEXT = "a full-size file, 4 + 32 layers, in the page cache"


def full_size_file(type_name: str = "Q4_0") -> Path:
    """AuraFlow v0.3's tensors, of random weights."""
    target = cache_folder() / "benchmarks" / f"full-size-{type_name}.gguf"
    with locked(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            make_packed_auraflow(target, recipe_for(type_name), double_layers=4, single_layers=32, positional=9216)
    return target


@torch.inference_mode()
def measure(type_name: str = "Q4_0") -> dict:
    """Seconds to open and check the file and to load it, both warm, and the anonymous memory that loading takes."""
    path = full_size_file(type_name)
    with open(path, "rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass

    load_model(path)
    before = anonymous_bytes()
    models = []
    load_seconds = seconds(lambda: models.append(load_model(path)))
    after = anonymous_bytes()
    return {
        "type": type_name,
        "file_bytes": os.path.getsize(path),
        "check_seconds": min(seconds(lambda: open_checked(path, AURAFLOW)) for _ in range(5)),
        "load_seconds": load_seconds,
        "anonymous_bytes": after - before if before is not None else None,
        "model_size": models[0].model_size(),
    }
