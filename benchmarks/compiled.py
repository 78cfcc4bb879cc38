"""A step under torch.compile beside the same step without, from packed weights."""

from __future__ import annotations

import time
from dataclasses import asdict

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper

from ..loader.comfyui.model import load_model
from ..tests.host.aura_files import make_gguf
from ..tests.host.forward import forward, sampler_options
from .measure import side_by_side

TYPE = "Q4_K"
SIZES = (32, 40, 48, 64)  # in latent pixels; the first compiles, and the second for all sizes
SETTING_TEXT = f"{TYPE}, 1 double and 1 single layer at full width, 64 text tokens, float32, torch's attention"


@torch.inference_mode()
def measure(pairs: int) -> list[dict]:
    """One row a size: what the first step takes, and the ratio of the steps after it to those without the compiler."""
    plain = load_model(make_gguf(TYPE), torch.float32)
    compiled = plain.clone()
    set_torch_compile_wrapper(compiled, backend="inductor", fullgraph=True)
    rows = []
    for patcher in (plain, compiled):
        patcher.patch_model(comfy.model_management.get_torch_device())
    plain_options, options = (_options(patcher) for patcher in (plain, compiled))
    for size in SIZES:
        setting = {"size": size, "tokens": 64}
        begin = time.perf_counter()
        forward(compiled, **setting, options=options)
        first = time.perf_counter() - begin
        ratio = side_by_side(
            lambda: forward(plain, **setting, options=plain_options),  # noqa: B023
            lambda: forward(compiled, **setting, options=options),  # noqa: B023
            pairs,
        )
        rows.append({"pixels": 8 * size, "first_step_seconds": first, **asdict(ratio)})
        print(f"{8 * size}² {ratio}, the first in {first:.1f} s", flush=True)
    return rows


def _options(patcher) -> dict:
    """The sampler's, with an attention that can be compiled: ComfyUI's on a CPU asks the system for free memory."""
    return sampler_options(patcher) | {
        "optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
    }
