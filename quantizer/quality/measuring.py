"""Measures what each type does to each group of weights: the transformer's output with that group alone quantized."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ...loader.files.auraflow import AURAFLOW
from ...loader.files.matching import Match, match
from ...loader.quant_types import QUANT_TYPES
from ...loader.weights.layout import is_packed
from ..checkpoints import Checkpoint
from ..imatrix import ImportanceMatrix
from ..quantize import quantize
from ..recipe import NEEDS_IMATRIX, RECIPES, kept_type
from ..writer import ALIGNMENT
from .evaluation import Inputs, mean_square, transformer
from .groups import Group, group_weights
from .measurements import Measurements
from .resumed import Resumed
from .sensitivity import quantized

MEASURED, MEASURED_QUICKLY = ("Q2_K", "Q3_K", "Q4_K", "Q6_K"), ("Q2_K", "Q4_K")
SUBSTITUTES = ("Q4_0", "Q8_0")  # measured where no row is a whole number of the others' blocks
WRITTEN = tuple(name for name in RECIPES if name in QUANT_TYPES and name not in ("F32", "F16", "BF16"))
COARSER = 0.9  # of the bits of the coarsest measured type

RULER_ROWS, RULER_COLUMNS = 4, 512  # of each weight, that rulers are made of
PROGRESS = 10_000  # units of it
AFTER_THE_LAYERS = ("modF.1", "final_linear")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Subject:
    """A checkpoint that types are chosen for.

    Attributes:
        checkpoint: of any width.
        match: its tensors as AuraFlow's.
        matrix: the importance matrix, empty where there is none.
        measured: the types to measure.
        choice: the types that may be chosen.
        groups: its weights, of those that can be quantized.
    """

    checkpoint: Checkpoint
    match: Match
    matrix: ImportanceMatrix
    measured: tuple[str, ...]
    choice: tuple[str, ...] = WRITTEN
    groups: tuple[Group, ...] = ()

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        matrix: ImportanceMatrix,
        measured: Sequence[str],
        choice: Sequence[str] = WRITTEN,
    ) -> Subject:
        """Raises `ModelFileError` when the checkpoint is no AuraFlow transformer."""
        found = match(AURAFLOW, checkpoint.shapes, metadata=checkpoint.metadata, path=checkpoint.path, fixed={})
        bare = cls(checkpoint, found, matrix, tuple(measured), tuple(choice))
        return replace(bare, groups=tuple(filter(bare.measurable, group_weights(found.weights))))

    def _writable(self, group: Group) -> list[str]:
        columns = [self.match.weights[name].shape[-1] for name in group.weights]
        covered = all(self.matrix.moments(name) is not None for name in group.weights)
        return [
            name
            for name in WRITTEN
            if (covered or name not in NEEDS_IMATRIX)
            and not any(count % QUANT_TYPES[name].block_size for count in columns)
        ]

    def measurable(self, group: Group) -> list[str]:
        """The types that a group is measured at."""
        types = self._writable(group)
        return [name for name in self.measured if name in types] or [name for name in SUBSTITUTES if name in types]

    def types(self, group: Group) -> list[str]:
        """The types that a group is measured at or may get: no much coarser ones than those, of which nothing would be
        known."""
        measurable = self.measurable(group)
        least = COARSER * min(QUANT_TYPES[name].bits_per_weight for name in measurable)
        return [
            name
            for name in self._writable(group)
            if name in measurable or (name in self.choice and QUANT_TYPES[name].bits_per_weight >= least)
        ]

    def weights(self, group: Group) -> int:
        return sum(math.prod(self.match.weights[name].shape) for name in group.weights)

    def nbytes(self, group: Group, type_name: str | None) -> int:
        """What a group takes in a file; None is to keep it in 16 bit."""
        total = 0
        for name in group.weights:
            source = self.match.weights[name]
            kept = kept_type(name, self.checkpoint.dtype(source.name))
            quant_type = QUANT_TYPES[type_name] if type_name else kept
            nbytes = math.prod(source.shape[:-1]) * quant_type.row_bytes(source.shape[-1])
            total += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return total

    def first_layer(self, group: Group) -> int:
        """The layer that a group first acts in, by number; those before the layers act in the first, and those after
        them in one behind the last."""
        double, single = (self.match.dimensions[stack] for stack in ("double_layers", "single_layers"))
        if not group.layer:
            return double + single if group.kind in AFTER_THE_LAYERS else 0
        stack, _, number = group.layer.partition(".")
        return int(number) + (double if stack == "single_layers" else 0)

    def missing(self, kept: Measurements) -> list[tuple[Group, str]]:
        """What is not measured yet, in the order of the layers."""
        missing = [
            (group, name)
            for group in self.groups
            for name in self.measurable(group)
            if name not in kept.errors.get(group.name, {})
        ]
        return sorted(missing, key=lambda pair: self.first_layer(pair[0]))

    def without_ruler(self, kept: Measurements) -> list[Group]:
        return [group for group in self.groups if set(self.types(group)) - set(kept.rulers.get(group.name, ()))]


def measure(
    subject: Subject,
    path: str | os.PathLike,
    inputs: Inputs,
    kept: Measurements,
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> None:
    """Measure what is missing in ``kept``, and save it after each measurement.

    Args:
        subject: whose groups are measured.
        path: its checkpoint, at best a GGUF file, which is mapped.
        inputs: what the transformer is run on.
        kept: what is measured already.
        say: is told what it costs.
        progress: called with the work done so far and in all.
    """
    if not subject.missing(kept) and not subject.without_ruler(kept):
        say(f"All is measured already, in {kept.path.name}.")
        return
    say(f"Measuring on {inputs.source.about}. What is measured is kept in {kept.path.name}.")
    with transformer(path, inputs) as model:
        linears = {
            AURAFLOW.spell(f"{name}.weight", "native"): module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        for group in subject.without_ruler(kept):
            inputs.check()
            kept.rulers[group.name] = _rulers(subject, group, linears)
        kept.save()
        resumed = Resumed(model, inputs)
        begin = time.monotonic()
        reference = resumed.outputs()
        seconds = time.monotonic() - begin
        missing = subject.missing(kept)
        costs = _costs(subject, missing, linears, resumed.layers, seconds)
        say(
            f"{len(missing)} measurements of {len(reference)} evaluations, each {seconds / len(reference):.2f} s, or "
            f"less where only later layers change: about {_duration(sum(costs))}."
        )
        done = 0.0
        for (group, name), cost in zip(missing, costs, strict=True):
            resumed.start_at(subject.first_layer(group))
            members = [linears[weight] for weight in group.weights]
            moments = [subject.matrix.moments(weight) for weight in group.weights]
            with quantized(members, QUANT_TYPES[name], moments):
                error = mean_square(resumed.outputs(), reference)
            kept.errors.setdefault(group.name, {})[name] = error
            kept.save()
            done += cost
            if progress:
                progress(max(1, round(PROGRESS * done / sum(costs))), PROGRESS)


def _costs(
    subject: Subject,
    missing: Sequence[tuple[Group, str]],
    linears: dict[str, torch.nn.Linear],
    layers: int,
    seconds: float,
) -> list[float]:
    """Seconds that each measurement will take, given those of all evaluations in full."""
    rates = {name: _seconds_a_weight(subject, linears, name) for name in dict.fromkeys(name for _, name in missing)}
    costs, layer = [], 0
    for group, name in missing:
        first = subject.first_layer(group)
        part = 1 - first / layers
        advance = 1 - layer / layers if first > layer else 0.0
        costs.append(seconds * (part + advance) + rates[name] * subject.weights(group))
        layer = first
    return costs


def _seconds_a_weight(subject: Subject, linears: dict[str, torch.nn.Linear], name: str) -> float:
    """How long a weight takes to be quantized, timed on one of the model's linears."""
    group = next(group for group in subject.groups if name in subject.measurable(group))
    linear, moments = linears[group.weights[0]], subject.matrix.moments(group.weights[0])
    begin = time.monotonic()
    with quantized([linear], QUANT_TYPES[name], [moments]):
        return (time.monotonic() - begin) / linear.weight.numel()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _rulers(subject: Subject, group: Group, linears: dict[str, torch.nn.Linear]) -> dict[str, float]:
    """The relative square error of a group's weights, by type, of a sample; as the importance matrix weighs it."""
    errors, norm = dict.fromkeys(subject.types(group), 0.0), 0.0
    for name in group.weights:
        weight = linears[name].weight
        rows, columns = weight.shape
        block = max(QUANT_TYPES[type_name].block_size for type_name in errors)
        width = min(columns, RULER_COLUMNS) // block * block
        begin = (columns - width) // 2 // block * block
        chosen = torch.linspace(0, rows - 1, min(RULER_ROWS, rows)).long()
        sample = _rows(weight, chosen)[:, begin : begin + width].contiguous()
        moments = subject.matrix.moments(name)
        moments = None if moments is None else moments[begin : begin + width]
        factor = torch.ones(width) if moments is None else torch.from_numpy(moments)
        share = weight.numel() / sample.numel()
        norm += share * (factor * sample.square()).sum().item()
        for type_name in errors:
            quant_type = QUANT_TYPES[type_name]
            blocks = torch.from_numpy(quantize(sample, quant_type, moments))
            difference = quant_type.dequantize(blocks) - sample
            errors[type_name] += share * (factor * difference.square()).sum().item()
    return {type_name: error / norm if norm else 0.0 for type_name, error in errors.items()}


def _rows(weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Some rows of a weight that may be packed, ``(rows, columns) float32``, in main memory."""
    if is_packed(weight):
        rows = weight._qdata[chosen.to(weight.device)]
        return QUANT_TYPES[weight._params.quant_type].dequantize(rows).cpu()
    return weight[chosen.to(weight.device)].float().cpu()
