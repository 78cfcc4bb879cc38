"""The most memory that a process takes which trains a LoRA by ComfyUI's node: on packed weights, and on dense ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import comfy.sd
import torch

from ..devtools.cache import cache_folder, locked
from ..devtools.random_models import make_auraflow
from ..loader.comfyui.model import load_model
from ..tests.host.aura_files import make_gguf
from ..tests.host.training import train
from .measure import peak_growth
from .memory import grown

TYPES = ("Q8_0", "Q4_0")
DENSE = "dense"
SETTING = {"size": 32, "tokens": 64, "rank": 16, "optimizer": "AdamW", "learning_rate": 0.0005}
LAYERS = {"double_layers": 1, "single_layers": 1}
SETTING_TEXT = (
    "the most that a process grows by in one step of ComfyUI's Train LoRA: rank 16 on every linear, AdamW, a latent of "
    "256² and 64 text tokens, AuraFlow of 1 double and 1 single layer at full width, float32; dense: the bfloat16 "
    "file, loaded by ComfyUI"
)


def measure() -> list[dict]:
    """One row for each kind of weights, with ``bypass_mode`` and ``gradient_checkpointing``, and what becomes of one
    without each. Linux alone tells the peak.

    Returns:
        ``weights``, the two switches, ``file_bytes``, and ``grown_bytes``: what is resident at most, less what was
        resident before the file was opened; the pages of the file that are mapped count as resident. ``beside_dense``
        is its ratio to that of the dense file.
    """
    if sys.platform != "linux":
        return []
    rows = []
    switches = [(kind, True, True) for kind in (*TYPES, DENSE)] + [(TYPES[-1], True, False), (TYPES[-1], False, True)]
    for kind, bypass, checkpointing in switches:
        path = _checkpoint() if kind == DENSE else make_gguf(kind)
        row = {"weights": kind, "bypass_mode": bypass, "gradient_checkpointing": checkpointing}
        row |= {"file_bytes": os.path.getsize(path), "grown_bytes": grown("training", str(path), bypass, checkpointing)}
        rows.append(row)
    (dense,) = (row["grown_bytes"] for row in rows if row["weights"] == DENSE)
    for row in rows:
        row["beside_dense"] = row["grown_bytes"] / dense
        print(*row.items(), flush=True)
    return rows


def _checkpoint() -> Path:
    target = cache_folder() / "benchmarks" / "training-1-1.safetensors"
    with locked(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            make_auraflow(target, **LAYERS, seed=0)
    return target


def in_this_process(path: str, bypass: bool, checkpointing: bool) -> int:
    """Bytes by which this process, with the host imported, grows at most while it loads a file and trains a step."""

    @torch.inference_mode()
    def load_and_train() -> None:
        if path.endswith(".gguf"):
            model = load_model(Path(path), torch.float32)
        else:
            model = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.bfloat16})
        train(model, **SETTING, bypass_mode=bypass, gradient_checkpointing=checkpointing)

    return peak_growth(load_and_train)
