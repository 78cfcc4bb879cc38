"""The modulation cache in ComfyUI: a step with it beside one without, what a run's start costs, and what it saves."""

from __future__ import annotations

from dataclasses import asdict

import comfy.model_management
import torch

from ..loader.comfyui.model import load_model
from ..loader.comfyui.modulation import mapped_bytes, table_of
from ..tests.host.aura_files import make_gguf
from ..tests.host.forward import forward, sampler_options
from .load import full_size_file
from .measure import seconds, side_by_side

TYPES = ("Q8_0", "Q4_K")
FULL_SIZE_TYPES = ("Q8_0", "Q4_0")
BATCHES = (1, 2)
STEPS = 20
SETTING = {"size": 32, "tokens": 64}  # 16 × 16 = 256 image tokens
SETTING_TEXT = "AuraFlow of 1 double and 1 single layer at full width, 256 image and 64 text tokens, float32"


@torch.inference_mode()
def measure(pairs: int, types: tuple[str, ...] = TYPES, full_size_types: tuple[str, ...] = FULL_SIZE_TYPES) -> dict:
    """The rows of both tables: steps, and the bytes that ComfyUI loads of a full-size model."""
    return {
        "steps": [_steps(kind, batch, pairs) for kind in types for batch in BATCHES],
        "sizes": [_size(kind) for kind in full_size_types],
    }


def _steps(kind: str, batch: int, pairs: int) -> dict:
    patcher = load_model(make_gguf(kind), torch.float32)
    patcher.patch_model(comfy.model_management.get_torch_device())
    table = table_of(patcher.model)
    sigmas = [0.7, *torch.linspace(0.69, 0.01, STEPS - 1).tolist()]
    options = sampler_options(patcher, sigmas)

    def step() -> None:
        forward(patcher, batch=batch, options=options, **SETTING)

    def step_without() -> None:
        forward(patcher, batch=batch, **SETTING)

    def first_step() -> None:
        table.clear()
        step()

    ratio = side_by_side(step_without, step, pairs)
    start = side_by_side(step, first_step, pairs)
    saved = ratio.baseline_seconds - ratio.subject_seconds
    cost = start.subject_seconds - start.baseline_seconds
    passes = table.passes
    again = seconds(step)
    row = {
        "type": kind,
        "batch": batch,
        **asdict(ratio),
        "start_seconds": cost,
        "start_share_of_saving": cost / (STEPS * saved),
        "passes_of_the_same_schedule": table.passes - passes,
        "step_of_the_same_schedule_seconds": again,
        "table_bytes": table.nbytes,
    }
    print(
        f"{kind:5} batch {batch}  {ratio}, start {100 * row['start_share_of_saving']:.0f} % of what {STEPS} steps save"
    )
    return row


def _size(kind: str) -> dict:
    patcher = load_model(full_size_file(kind))
    row = {
        "type": kind,
        "loaded_bytes": patcher.model_size(),
        "loaded_bytes_without": load_model(full_size_file(kind), modulation_cache=False).model_size(),
        "mapped_bytes": mapped_bytes(patcher.model),
    }
    print(f"{kind:5} {row['loaded_bytes'] / 1e9:.2f} GB loaded, without {row['loaded_bytes_without'] / 1e9:.2f} GB")
    return row
