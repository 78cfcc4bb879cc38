"""A step at the sizes of pictures that people make, in float32 and in bfloat16 and int8 where the CPU has them."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from functools import partial

import comfy.model_management
import comfy.sd
import torch

from ..loader.comfyui.int8 import products_of
from ..loader.comfyui.model import MATRIX_MULT, load_model
from ..loader.kernels.processor import multiplies_bfloat16
from ..loader.weights import int8_linear
from ..tests.host.aura_files import dense_state_dict, make_gguf
from ..tests.host.forward import forward, sampler_options
from .measure import in_turns

TYPES = ("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS", "Q3_K", "BF16")
PIXELS = {256: 64, 512: 256, 1024: 256}  # and text tokens
FEWER_PAIRS = {256: 1, 512: 2, 1024: 3}  # by what their number is divided: a step of the largest takes 20 s
SETTING_TEXT = (
    "AuraFlow of 1 double and 1 single layer at full width, 64 text tokens at 256², 256 at 512² and 1024², batch 1, "
    "beside dense weights in the same dtype and in float32"
)


@torch.inference_mode()
def measure(pairs: int, types: tuple[str, ...]) -> list[dict]:
    """One row for each size and packed model, with the ratio of its step to that of the dense model in float32, and one
    to that in bfloat16 where it computes in that."""
    device = comfy.model_management.get_torch_device()
    weights = dense_state_dict(make_gguf("Q4_0"))  # how fast dense weights are does not depend on their values
    in_bfloat16 = torch.cuda.is_available() or multiplies_bfloat16()
    dense, packed = {}, {}
    for dtype in (torch.float32, torch.bfloat16)[: 1 + in_bfloat16]:
        model = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options={"dtype": dtype})
        model.model.manual_cast_dtype = None  # on CPUs, ComfyUI would convert the weights to float32 at each step
        model.patch_model(device)
        dense[dtype] = partial(forward, model)
        if refused := int8_linear.refused(device, dtype):
            print(f"int8 beside {dtype} is left out: {refused}")
        for matrix_mult, type_name in itertools.product(("exact",) if refused else MATRIX_MULT, types):
            model = load_model(make_gguf(type_name), dtype, matrix_mult=matrix_mult)
            if matrix_mult == "int8" and products_of(model.model) is None:  # it is not quantized
                continue
            model.patch_model(device)
            packed[dtype, matrix_mult, type_name] = partial(forward, model, options=sampler_options(model))
    rows = []
    for pixels, tokens in PIXELS.items():
        setting = {"size": pixels // 8, "tokens": tokens}
        baselines, subjects = (
            {key: partial(step, **setting) for key, step in steps.items()} for steps in (dense, packed)
        )
        if pixels == min(PIXELS):  # to warm up
            for run in (*baselines.values(), *subjects.values()):
                run()
        ratios = in_turns(baselines, subjects, max(2, pairs // FEWER_PAIRS[pixels]))
        for (dense_dtype, (dtype, matrix_mult, type_name)), ratio in ratios.items():
            if dense_dtype in (dtype, torch.float32):
                names = {"pixels": pixels, "dense": _name(dense_dtype), "dtype": _name(dtype)}
                names |= {"matrix_mult": matrix_mult, "type": type_name}
                rows.append(names | asdict(ratio))
                print(*names.values(), ratio, flush=True)
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
