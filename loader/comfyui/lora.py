"""LoRA files of AuraFlow, in every spelling that trainers write.

ComfyUI maps ``diffusion_model.<native>``, ``lora_unet_<native>`` and ``transformer.<diffusers>``. Trainers also write
PEFT's ``base_model.model.``, LyCORIS's ``lycoris_``, kohya's ``lora_transformer_`` and names with no prefix at all,
each in both spellings.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass

import comfy.lora
import comfy.utils
import torch
from comfy.model_base import AuraFlow
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError

from ..files.auraflow import AURAFLOW
from ..files.errors import ModelFileError, listed
from ..files.matching import TensorsError
from ..files.recognise import HEAD_BYTES, recognise_bytes
from ..weights.state_dict import swap_row_halves

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

# What follows a module's name in a LoRA file: the suffixes that ComfyUI's weight adapters read.
_SUFFIX = re.compile(
    r"(\.lora_(up|down|mid)(\.weight)?|\.lora_[AB](\.weight)?|\.lora\.(up|down)\.weight|_lora\.(up|down)\.weight"
    r"|\.lora_linear_layer\.(up|down)\.weight|\.[ab][12]\.weight|\.hada_(w[12]_[ab]|t[12])|\.lokr_(w[12](_[ab])?|t2)"
    r"|\.oft_(blocks|diag)|\.rescale|\.alpha|\.dora_scale|\.diff(_b)?|\.set_weight|\.reshape_weight)$"
)

# PEFT's name of an adapter; ComfyUI expects "default" or none.
_ADAPTER = re.compile(r"(?<=\.lora_[AB])\.\w+(?=\.weight$)")

# LoRAs of other models, by a name that only they have; the first that fits.
_OTHER_LORAS = (
    ("an SDXL or SD1 LoRA", r"(input|output|down|up)_blocks[._]\d|mid(dle)?_block[._]"),
    ("a Flux or Chroma LoRA", r"(double_blocks|single_blocks)[._]\d|single_transformer_blocks[._]\d+[._]proj_"),
    ("a LoRA of Flux, SD3, Qwen-Image or another model", r"(?<!joint_)(?<!single_)transformer_blocks[._]\d"),
    ("an SD3 LoRA", r"joint_blocks[._]\d"),
    ("a Wan LoRA", r"(^|[._])blocks[._]\d+[._](self|cross)_attn"),
)
_TEXT_ENCODER = r"^(lora_te\d?_|text_encoder)"


@dataclass(frozen=True)
class LoraReport:
    """What became of a LoRA file's modules.

    Attributes:
        matched: how many were applied.
        modules: how many the file holds.
        unmatched: the names of those that the model does not have.
        unread: tensors that no kind of adapter has a place for.
    """

    matched: int
    modules: int
    unmatched: tuple[str, ...]
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"matched {self.matched} of {self.modules} modules"
        if self.unmatched:
            text += f"; not in this model: {listed(self.unmatched)}"
        return f"{text}; not applied: {listed(self.unread)}" if self.unread else text


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
            module = name.removesuffix(".weight")
            targets |= {f"{prefix}{module}": target for prefix in DOTTED_PREFIXES}
            targets |= {f"{prefix}{module.replace('.', '_')}": target for prefix in UNDERSCORED_PREFIXES}
    return targets


def load_lora(model: ModelPatcher, path: str | os.PathLike, strength: float) -> tuple[ModelPatcher, LoraReport]:
    """A clone of an AuraFlow model, packed or dense, with a LoRA file's patches.

    Args:
        model: not changed.
        path: a safetensors or torch file of any kind of adapter that ComfyUI knows.
        strength: factor of the change; may be negative.

    Raises:
        ValueError: when the model is not AuraFlow.
        ModelFileError: when the file cannot be read, is no LoRA, has no module that is in the model, or has some that
            are another model's.
    """
    if not isinstance(model.model, AuraFlow):
        raise ValueError(f"The model is {type(model.model).__name__}, not AuraFlow: connect an AuraFlow model.")
    state = {_ADAPTER.sub("", name): tensor for name, tensor in _read(path).items()}
    modules = {_SUFFIX.sub("", name) for name in state if _SUFFIX.search(name)}
    if not modules:
        raise ModelFileError(
            path,
            found=f"{len(state)} tensors of which none is a LoRA's ({listed(list(state))})",
            expected="a LoRA of AuraFlow",
            advice="Pick a LoRA file; a whole model belongs in a model loader.",
        )
    targets = {name: target for name, target in key_map(model.model.state_dict()).items() if name in modules}
    # Flux has linears of AuraFlow's names and shapes (single_transformer_blocks.0.attn.to_q), and others besides.
    unknown = sorted(modules - targets.keys())
    other_model = _other_model(unknown)
    if not targets or other_model:
        raise TensorsError(
            path,
            found=f"{other_model or _kind(modules)} ({listed(unknown)})",
            expected="a LoRA of AuraFlow",
            advice="Some of its modules have AuraFlow's names, but are another model's: pick a LoRA made for AuraFlow."
            if targets
            else "None of its modules is in this model, so it would change nothing: pick a LoRA made for AuraFlow.",
            tensors=sorted(modules),
        )
    clone = model.clone()
    applied = set(clone.add_patches(comfy.lora.load_lora(state, targets, log_missing=False), strength))
    matched = {name for name, target in targets.items() if target in applied or _bias(target) in applied}
    unread = tuple(name for name in state if not _SUFFIX.search(name))
    return clone, LoraReport(len(matched), len(modules), tuple(sorted(modules - matched)), unread)


def _bias(target: str | tuple) -> str:
    """The key of the bias beside a weight, which a change of the bias alone goes to."""
    return (target if isinstance(target, str) else target[0]).removesuffix(".weight") + ".bias"


def _read(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    try:
        return comfy.utils.load_torch_file(os.fspath(path), safe_load=True)
    except FileNotFoundError:
        raise
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        with open(path, "rb") as file:
            recognised = recognise_bytes(file.read(HEAD_BYTES), path)
        found, advice = recognised or ("no readable tensors", "Download it again, or choose another file.")
        if found == "a safetensors file":
            found, advice = "a safetensors file that is cut off or damaged", "Download it again."
        raise ModelFileError(path, found=found, expected="a LoRA of AuraFlow", advice=advice) from error


def _other_model(modules: Iterable[str]) -> str | None:
    """Whose LoRA this is, by modules that AuraFlow does not have."""
    for what, pattern in _OTHER_LORAS:
        if any(re.search(pattern, name) for name in modules):
            return what
    return None


def _kind(modules: Iterable[str]) -> str:
    text_encoder = any(re.search(_TEXT_ENCODER, name) for name in modules)
    return "a text encoder's LoRA" if text_encoder else "a LoRA of an unknown model"
