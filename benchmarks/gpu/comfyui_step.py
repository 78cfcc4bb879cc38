"""A step in ComfyUI from packed weights beside its own dense model: modulation cache, LoRA, int8, torch.compile."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from .host import enter, full_size_file
from .setting import LeftOut, Setting, begin_memory, memory, step_milliseconds

TEXT = "a pass of AuraFlow, 4 + 32 layers of random weights, in ComfyUI, bfloat16, 1024², 256 text tokens"
COMPILED_TEXT = "the same under torch.compile, the first type, batch 1, modulation cache: beside the same without"
DENSE = "dense"
WAYS = ("modulation cache", "no cache", "LoRA", "int8")


@torch.inference_mode()
def step(setting: Setting) -> Iterator[dict]:
    """A row for the dense weights and for each type, way and batch: ``ms``, ``of_dense`` and the memory.

    ``LoRA`` is one of rank 16 on every linear of the layers, and ``int8`` products of int8 in the layers, both with the
    modulation cache.
    """
    enter(setting)
    dense = {}
    for name in (DENSE, *setting.types):
        ways = (DENSE,) if name == DENSE else WAYS
        for way in ways:
            begin_memory(setting)
            try:
                patcher = _loaded(name, way, setting)
                for batch in setting.batches:
                    row = {"weights": name, "way": way, "batch": batch, "ms": _milliseconds(patcher, batch, setting)}
                    row |= memory(setting)
                    dense |= {batch: row["ms"]} if name == DENSE else {}
                    yield row | ({"of_dense": row["ms"] / dense[batch]} if batch in dense else {})
                patcher.unpatch_model(torch.device("cpu"))
            except torch.cuda.OutOfMemoryError:
                yield {"weights": name, "way": way, "full": "they do not fit on the device"}
            except LeftOut as reason:
                yield {"weights": name, "way": way, "left_out": str(reason)}
            patcher = None


@torch.inference_mode()
def compiled(setting: Setting) -> Iterator[dict]:
    """One row: ``ms`` and ``compiled_ms`` of a pass of batch 1, and ``first_seconds``, what the first takes."""
    enter(setting)
    if setting.quick:
        raise LeftOut("The compiler takes longer than a quick trial may.")
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    name = setting.types[0]
    plain = _loaded(name, WAYS[0], setting)
    milliseconds = _milliseconds(plain, 1, setting)
    faster = plain.clone()
    set_torch_compile_wrapper(faster, backend="inductor")
    begin = time.perf_counter()
    _pass(faster, 1, setting)()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    row = {"type": name, "ms": milliseconds, "compiled_ms": _milliseconds(faster, 1, setting)}
    yield row | {"first_seconds": first}


def _loaded(name: str, way: str, setting: Setting):
    """A static patcher whose weights are all on the device.

    Raises:
        LeftOut: int8 products are not to be had on this device.
    """
    from ...loader.comfyui.int8 import scale_bytes
    from ...loader.comfyui.model import load_model
    from ..lora import with_loras

    if name == DENSE:
        patcher = _dense(setting)
    else:
        cache = way != "no cache"
        patcher = load_model(
            full_size_file(name, setting),
            setting.dtype,
            cache,
            "int8" if way == "int8" else "exact",
            disable_dynamic=True,
            int8_even_if_slower=setting.quick,
        )
        if way == "int8" and not scale_bytes(patcher.model):
            raise LeftOut("The products are exact: the log says why they cannot be of int8.")
        patcher = with_loras(patcher, 1) if way == "LoRA" else patcher
    patcher.patch_model(setting.device)
    return patcher


def _dense(setting: Setting):
    """ComfyUI's own model; in main memory its weights are views on the same numbers."""
    import comfy.sd

    from ...devtools.random_models import auraflow_shapes

    shapes = auraflow_shapes(*((1, 1, 4096) if setting.quick else (4, 32, 9216)))
    numbers = torch.randn(max(map(math.prod, shapes.values())), dtype=setting.dtype).mul_(0.02)
    state = {name: numbers[: math.prod(shape)].view(shape) for name, shape in shapes.items()}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": setting.dtype}, disable_dynamic=True)


def _milliseconds(patcher, batch: int, setting: Setting) -> float:
    return step_milliseconds(_pass(patcher, batch, setting), setting)


def _pass(patcher, batch: int, setting: Setting):
    """What a sampler does for a step, as a function without arguments."""
    size, tokens = (8, 6) if setting.quick else (128, 256)
    latent = torch.randn(batch, 4, size, size, device=setting.device)
    context = torch.randn(batch, tokens, 2048, device=setting.device)
    sigma = torch.full((batch,), 0.7, device=setting.device)
    patcher.pre_run()
    options = {"wrappers": patcher.wrappers, "sample_sigmas": torch.tensor([0.7])}
    return lambda: patcher.model.apply_model(latent, sigma, c_crossattn=context, transformer_options=options)
