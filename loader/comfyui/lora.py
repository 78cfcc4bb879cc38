"""LoRA files of AuraFlow as patches of a MODEL."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.utils
import torch
from comfy.model_base import AuraFlow
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter
from safetensors import SafetensorError

from ..files.errors import ModelFileError, listed
from ..files.matching import TensorsError
from ..files.recognise import HEAD_BYTES, recognise_bytes
from .fused import NotSeparable, Tensors, split
from .lora_names import fused_map, key_map, kind, modules_of, other_model
from .peft_dora import PeftDoRA

_MAGNITUDE = ".lora_magnitude_vector"


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
    modules, unread = modules_of(_read(path))
    if not modules:
        raise ModelFileError(
            path,
            found=f"{len(unread)} tensors of which none is a LoRA's ({listed(unread)})",
            expected="a LoRA of AuraFlow",
            advice="Pick a LoRA file; a whole model belongs in a model loader.",
        )
    weights = model.model.state_dict()
    targets, fused = key_map(weights), fused_map(weights)
    # Flux has linears of AuraFlow's names and shapes (single_transformer_blocks.0.attn.to_q), and others besides.
    unknown = sorted(modules.keys() - targets.keys() - fused.keys())
    other = other_model(unknown)
    if len(unknown) == len(modules) or other:
        raise TensorsError(
            path,
            found=f"{other or kind(modules)} ({listed(unknown)})",
            expected="a LoRA of AuraFlow",
            advice="Some of its modules have AuraFlow's names, but are another model's: pick a LoRA made for AuraFlow."
            if len(unknown) < len(modules)
            else "None of its modules is in this model, so it would change nothing: pick a LoRA made for AuraFlow.",
            tensors=sorted(modules),
        )
    parts = []
    for name, tensors in modules.items():
        if name in targets:
            parts.append(_Part(name, targets[name], tensors))
        elif name in fused:
            parts += _split(path, name, fused[name], tensors, weights)
    clone, applied = model.clone(), set()
    for some in _once_each(parts):
        added = set(clone.add_patches(_patches(path, some), strength))
        applied |= {part.module for part in some if part.target in added or _bias(part.target) in added}
    return clone, LoraReport(len(applied), len(modules), tuple(sorted(modules.keys() - applied)), tuple(unread))


@dataclass(frozen=True)
class _Part:
    """A module of a file, or what of a fused one is for one weight: its tensors, and where their change goes."""

    module: str
    target: str | tuple
    tensors: Tensors


def _split(
    path: str | os.PathLike, module: str, keys: tuple[str, ...], tensors: Tensors, weights: Mapping[str, torch.Tensor]
) -> Iterator[_Part]:
    try:
        pieces = split(tensors, len(keys), len(weights[keys[0]]))
    except NotSeparable as error:
        raise TensorsError(
            path,
            found=f"{module}, which {error}",
            expected="a change that can be cut into those of the weights that are joined in it",
            advice="AuraFlow's q, k and v are weights of their own here: train the LoRA without fused projections.",
            tensors=[module],
        ) from error
    for key, terms in zip(keys, pieces, strict=True):
        yield from (_Part(module, key, term) for term in terms)


def _once_each(parts: Iterable[_Part]) -> list[list[_Part]]:
    """The parts in groups that have each target once: ComfyUI takes a dictionary of patches by target."""
    groups: list[dict[str | tuple, _Part]] = []
    for part in parts:
        free = next((group for group in groups if part.target not in group), None)
        if free is None:
            groups.append(free := {})
        free[part.target] = part
    return [list(group.values()) for group in groups]


def _patches(path: str | os.PathLike, parts: list[_Part]) -> dict[str | tuple, object]:
    """ComfyUI's patches of modules that have a target each."""
    named = {f"{number} {part.module}": part for number, part in enumerate(parts)}
    state = {f"{name}{suffix}": tensor for name, part in named.items() for suffix, tensor in part.tensors.items()}
    patches = comfy.lora.load_lora(state, {name: part.target for name, part in named.items()}, log_missing=False)
    for part in parts:
        magnitude = part.tensors.get(_MAGNITUDE)
        if magnitude is not None:
            patches[part.target] = _peft_dora(path, part, patches.get(part.target), magnitude)
    return patches


def _peft_dora(path: str | os.PathLike, part: _Part, adapter: object, magnitude: torch.Tensor) -> PeftDoRA:
    up, down, alpha, *others = adapter.weights if isinstance(adapter, LoRAAdapter) else (None, None, None, None)
    if up is None or any(other is not None for other in others) or magnitude.numel() != len(up):
        raise TensorsError(
            path,
            found=f"{part.module} with PEFT's magnitudes of DoRA ({_MAGNITUDE.lstrip('.')}), but not on a LoRA of them",
            expected="lora_A and lora_B with as many rows as there are magnitudes",
            advice="Without the magnitudes it would be another change: download the file again, or export it anew.",
            tensors=[part.module],
        )
    return PeftDoRA(adapter.loaded_keys, (up.flatten(1), down.flatten(1), alpha, magnitude.flatten()))


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
