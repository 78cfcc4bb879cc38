"""How far two checkpoints of AuraFlow, or of its text encoder, are apart, weight by weight."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...loader.files.errors import ModelFileError, listed
from ...loader.files.matching import Match, Source, match
from ...loader.files.parts import part_of
from ..checkpoints import Checkpoint, open_checkpoint, swap_halves

TILE = 1 << 22  # weights compared at a time


@dataclass(frozen=True)
class Difference:
    """Two forms ``a``, the reference, and ``b`` of a weight.

    Attributes:
        name: its native name; "all" for all weights as one vector.
        relative_error: ``‖b − a‖ / ‖a‖``.
        cosine: ``a·b / (‖a‖ ‖b‖)``.
    """

    name: str
    relative_error: float
    cosine: float


@dataclass
class _Sums:
    """Σ a², Σ b², Σ ab and Σ (b − a)² over weights, in float64."""

    a: float = 0.0
    b: float = 0.0
    ab: float = 0.0
    difference: float = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.a += a.dot(a).item()
        self.b += b.dot(b).item()
        self.ab += a.dot(b).item()
        self.difference += (b - a).square().sum().item()

    def result(self, name: str) -> Difference:
        if self.difference == 0:
            return Difference(name, 0.0, 1.0)
        error = math.sqrt(self.difference / self.a) if self.a else math.inf
        norms = math.sqrt(self.a * self.b)
        return Difference(name, error, self.ab / norms if norms else 0.0)


def compare(
    a: str | os.PathLike,
    b: str | os.PathLike,
    *,
    progress: Callable[[int, int], None] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> tuple[Difference, list[Difference]]:
    """Compare two checkpoints, of any kinds and in any spellings.

    Args:
        a: the reference, as `open_checkpoint` takes it.
        b: the other.
        progress: called with the number of weights compared so far and in all.
        fixed: passed to `match`.

    Returns:
        The difference of all weights together, and that of each tensor, the worst first.

    Raises:
        ModelFileError: one of them is no sound checkpoint, or ``b`` has other tensors or shapes than ``a``.
    """
    (first, first_match), (second, second_match) = (_open(path, fixed) for path in (a, b))
    if first_match.architecture is not second_match.architecture:
        raise ModelFileError(
            second.path,
            found=second_match.architecture.title,
            expected=f"{first_match.architecture.title}, as {os.path.basename(first.path)} is",
            advice="Only two files of the same model can be compared.",
        )
    first_weights, second_weights = first_match.weights, second_match.weights
    others = {
        name
        for name in first_weights.keys() | second_weights.keys()
        if name not in first_weights
        or name not in second_weights
        or first_weights[name].shape != second_weights[name].shape
    }
    if others:
        raise ModelFileError(
            second.path,
            found=f"other shapes, or tensors that only one file has: {listed(sorted(others))}",
            expected=f"the tensors of {os.path.basename(first.path)}",
            advice="Only files of models of the same size can be compared.",
        )
    total, done = sum(math.prod(source.shape) for source in first_weights.values()), 0
    everything, differences = _Sums(), []
    for name, source in first_weights.items():
        other = second_weights[name]
        sums = _Sums()
        pair = _read(first, source), _read(second, other)
        for tile in zip(*(values.flatten().split(TILE) for values in pair), strict=True):
            a_tile, b_tile = (values.double() for values in tile)
            sums.add(a_tile, b_tile)
            everything.add(a_tile, b_tile)
        differences.append(sums.result(name))
        done += math.prod(source.shape)
        if progress:
            progress(done, total)
    differences.sort(key=lambda entry: (not math.isnan(entry.relative_error), -entry.relative_error))
    return everything.result("all"), differences


def _open(path: str | os.PathLike, fixed: Mapping[str, int] | None) -> tuple[Checkpoint, Match]:
    checkpoint = open_checkpoint(path)
    part = part_of(checkpoint.shapes)
    return checkpoint, match(part, checkpoint.shapes, metadata=checkpoint.metadata, path=checkpoint.path, fixed=fixed)


def _read(checkpoint: Checkpoint, source: Source) -> torch.Tensor:
    values = checkpoint.read(source.name).reshape(source.shape)
    return swap_halves(values) if source.swap_halves else values
