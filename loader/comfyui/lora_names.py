"""The names in LoRA files of AuraFlow, in every spelling that trainers write, and which weights they mean.

ComfyUI maps ``diffusion_model.<native>``, ``lora_unet_<native>`` and ``transformer.<diffusers>``. Trainers also write
PEFT's ``base_model.model.``, LyCORIS's ``lycoris_``, kohya's ``lora_transformer_`` and names with no prefix at all,
each in both spellings, torch.compile's ``_orig_mod.`` anywhere, and diffusers' fused projections (fused.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from ..files.auraflow import AURAFLOW
from ..weights.state_dict import swap_row_halves
from .fused import FUSED, Tensors

MODEL = "diffusion_model."

DOTTED_PREFIXES = (
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "transformer.",
    "base_model.model.",
    "base_model.model.diffusion_model.",
    "base_model.model.transformer.",
)
UNDERSCORED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")

# What follows a module's name in a LoRA file: the suffixes that ComfyUI's weight adapters read, and PEFT's of DoRA.
_SUFFIX = re.compile(
    r"(\.lora_(up|down|mid)(\.weight)?|\.lora_[AB](\.weight)?|\.lora\.(up|down)\.weight|_lora\.(up|down)\.weight"
    r"|\.lora_linear_layer\.(up|down)\.weight|\.[ab][12]\.weight|\.hada_(w[12]_[ab]|t[12])|\.lokr_(w[12](_[ab])?|t2)"
    r"|\.oft_(blocks|diag)|\.rescale|\.alpha|\.dora_scale|\.lora_magnitude_vector|\.diff(_b)?"
    r"|\.set_weight|\.reshape_weight)$"
)

# What may stand in a name besides: the compiled modules of torch.compile, PEFT's name of an adapter.
_ADDED = re.compile(
    r"_orig_mod[._]|(?<=\.lora_[AB])\.\w+(?=\.weight$)|(?<=\.lora_magnitude_vector)(\.\w+)?(\.weight)?$"
)

# LoRAs of other models, by a name that only they have; the first that fits.
_OTHER_LORAS = (
    ("an SDXL or SD1 LoRA", r"(input|output|down|up)_blocks[._]\d|mid(dle)?_block[._]"),
    ("a Flux or Chroma LoRA", r"(double_blocks|single_blocks)[._]\d|single_transformer_blocks[._]\d+[._]proj_"),
    ("a LoRA of Flux, SD3, Qwen-Image or another model", r"(?<!joint_)(?<!single_)transformer_blocks[._]\d"),
    ("an SD3 LoRA", r"joint_blocks[._]\d"),
    ("a Wan LoRA", r"(^|[._])blocks[._]\d+[._](self|cross)_attn"),
)
_TEXT_ENCODER = r"^(lora_te\d?_|text_encoder)"


def key_map(names: Iterable[str]) -> dict[str, str | tuple]:
    """Where a LoRA's module goes, by every name that it may have.

    Args:
        names: the model's state dict keys.

    Returns:
        module name in a LoRA file → state dict key, or ComfyUI's ``(key, offset, function)`` where the rows of the
        change have to change places, as in diffusers' ``norm_out.linear``.
    """
    targets: dict[str, str | tuple] = {}
    for key in names:
        native = key.removeprefix(MODEL)
        if not native.endswith(".weight") or not (found := AURAFLOW.find(native, "native")):
            continue
        swapped = (key, None, swap_row_halves) if found[0].swap_halves else key
        spellings = ((native, key), (AURAFLOW.spell(native, "diffusers"), swapped))
        for name, target in spellings:
            targets |= dict.fromkeys(_prefixed(name.removesuffix(".weight")), target)
    return targets


def fused_map(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Likewise for diffusers' fused projections: the state dict keys of the weights that are joined, in their order."""
    modules = {
        AURAFLOW.spell(name, "diffusers").removesuffix(".weight"): f"{MODEL}{name}"
        for name in (key.removeprefix(MODEL) for key in names)
        if name.endswith(".weight") and AURAFLOW.find(name, "native")
    }
    targets: dict[str, tuple[str, ...]] = {}
    for module in modules:
        stem, _, last = module.rpartition(".")
        for fused, joined in FUSED.items():
            if last == joined[0]:
                keys = tuple(modules[f"{stem}.{name}"] for name in joined)
                targets |= dict.fromkeys(_prefixed(f"{stem}.{fused}"), keys)
    return targets


def _prefixed(module: str) -> Iterator[str]:
    """The names that a module may have in a LoRA file."""
    yield from (f"{prefix}{module}" for prefix in DOTTED_PREFIXES)
    yield from (f"{prefix}{module.replace('.', '_')}" for prefix in UNDERSCORED_PREFIXES)


def modules_of(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Tensors], list[str]]:
    """A file's modules by name, each with its tensors by suffix; and the names of tensors that no adapter has."""
    modules: dict[str, Tensors] = {}
    unread = []
    for name, tensor in tensors.items():
        name = _ADDED.sub("", name)
        if found := _SUFFIX.search(name):
            modules.setdefault(name[: found.start()], {})[found[0]] = tensor
        else:
            unread.append(name)
    return modules, unread


def other_model(modules: Iterable[str]) -> str | None:
    """Whose LoRA this is, by modules that AuraFlow does not have."""
    for what, pattern in _OTHER_LORAS:
        if any(re.search(pattern, name) for name in modules):
            return what
    return None


def kind(modules: Iterable[str]) -> str:
    text_encoder = any(re.search(_TEXT_ENCODER, name) for name in modules)
    return "a text encoder's LoRA" if text_encoder else "a LoRA of an unknown model"
