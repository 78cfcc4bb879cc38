"""A step of diffusers' transformer with packed weights beside one with dense weights: no ComfyUI and no file."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ...loader.quant_types import QUANT_TYPES
from .setting import LeftOut, Setting, begin_memory, memory, random_packed, step_milliseconds

CONFIG = {
    "num_mmdit_layers": 4,
    "num_single_dit_layers": 32,
    "attention_head_dim": 256,
    "num_attention_heads": 12,
    "joint_attention_dim": 2048,
    "caption_projection_dim": 3072,
    "pos_embed_max_size": 9216,
}
QUICK_CONFIG = CONFIG | {
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "caption_projection_dim": 256,
    "pos_embed_max_size": 64,
}
DENSE = "dense"
COMPILED_TYPE = "Q4_K"

STEP_TEXT = "a pass of AuraFlow, 4 + 32 layers of random weights, in diffusers, bfloat16, 1024², 256 text tokens"
COMPILED_TEXT = f"the same under torch.compile, {COMPILED_TYPE}, batch 1: beside the same without"


@torch.inference_mode()
def step(setting: Setting) -> Iterator[dict]:
    """A row for the dense weights and for each type, and batch: ``ms``, ``of_dense`` and the memory.

    Dense weights that do not fit on the device have a row that says so, and the others no ratio.
    """
    dense = {}
    for name in (DENSE, *setting.types):
        begin_memory(setting)
        try:
            model = _model(name, setting)
            for batch in setting.batches:
                row = {"weights": name, "batch": batch, "ms": _milliseconds(model, batch, setting), **memory(setting)}
                dense |= {batch: row["ms"]} if name == DENSE else {}
                yield row | ({"of_dense": row["ms"] / dense[batch]} if batch in dense else {})
        except torch.cuda.OutOfMemoryError:
            yield {"weights": name, "full": "they do not fit on the device"}
        model = None


@torch.inference_mode()
def compiled(setting: Setting) -> Iterator[dict]:
    """One row: ``ms`` and ``compiled_ms`` of a pass, and ``first_seconds``, what the first takes."""
    if setting.quick:
        raise LeftOut("The compiler takes longer than a quick trial may.")
    model = _model(COMPILED_TYPE, setting)
    plain = _milliseconds(model, 1, setting)
    faster = torch.compile(model)
    begin = time.perf_counter()
    inputs = _inputs(1, setting)
    faster(**inputs)
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - begin
    yield {"type": COMPILED_TYPE, "ms": plain, "compiled_ms": _milliseconds(faster, 1, setting), "first_seconds": first}


def _milliseconds(model, batch: int, setting: Setting) -> float:
    inputs = _inputs(batch, setting)
    return step_milliseconds(lambda: model(**inputs), setting)


def _inputs(batch: int, setting: Setting) -> dict:
    size, tokens = (8, 6) if setting.quick else (128, 256)
    width = _config(setting)["joint_attention_dim"]
    kind = {"dtype": setting.dtype, "device": setting.device}
    return {
        "hidden_states": torch.randn(batch, 4, size, size, **kind),
        "encoder_hidden_states": torch.randn(batch, tokens, width, **kind),
        "timestep": torch.full((batch,), 0.7, **kind),
        "return_dict": False,
    }


def _config(setting: Setting) -> dict[str, int]:
    return QUICK_CONFIG if setting.quick else CONFIG


def _model(name: str, setting: Setting):
    """diffusers' transformer on the device; the linears of its layers packed in the type of that name, or dense."""
    from diffusers import AuraFlowTransformer2DModel

    from ...loader.diffusers.modules import fill
    from ...loader.weights.layout import pack

    with torch.device("meta"):
        model = AuraFlowTransformer2DModel(**_config(setting)).to(setting.dtype)
    linears = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    weights = {}
    for key, parameter in model.named_parameters():
        if name != DENSE and key in linears and "transformer_blocks" in key:
            packed = random_packed(QUANT_TYPES[name], *parameter.shape, setting, seed=len(weights))
            weights[key] = pack(packed, name, tuple(parameter.shape), setting.dtype)
        else:
            values = torch.empty(parameter.shape, dtype=setting.dtype, device=setting.device)
            weights[key] = values.normal_(0, parameter.shape[-1] ** -0.5)
    if name == DENSE:
        for key, weight in weights.items():
            path, _, last = key.rpartition(".")
            model.get_submodule(path).register_parameter(last, torch.nn.Parameter(weight, requires_grad=False))
    else:
        fill(model, weights)
    return model.eval()
