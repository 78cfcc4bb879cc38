"""Types for groups of weights, so that a file of a given size has the least error.

The errors of groups add in squares, as those of independent causes do. So each group has a curve, squared error over
bytes, and bytes are spent where the sum falls most a byte: from each group's smallest type on, always the steepest step
that still fits.

A type that was not measured lies on the curve by its ruler, the squared relative error of the weights themselves: the
logarithm of the output's squared error is interpolated over that of the ruler, and beyond the finest measured type both
fall alike. A type whose ruler is much larger than that of the coarsest measured one is not chosen: what it does to the
output cannot be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

BEYOND = 1.1  # a ruler at most so many times that of the coarsest measured type


@dataclass(frozen=True)
class Candidate:
    """A type that a group may get.

    Attributes:
        type_name: ggml's.
        nbytes: what the group then takes.
        error: the output's squared relative error.
    """

    type_name: str
    nbytes: int
    error: float


def squared_errors(measured: Mapping[str, float], rulers: Mapping[str, float]) -> dict[str, float]:
    """The output's squared error by type, of the types that it can be told of.

    Args:
        measured: squared errors of some types.
        rulers: squared errors of the weights, of these types and of others.
    """
    points = sorted((rulers[name], error) for name, error in measured.items() if rulers[name] > 0 and error > 0)
    told = {name: _interpolated(points, ruler) for name, ruler in rulers.items() if points}
    told = {name: error for name, error in told.items() if error is not None}
    return told | {name: 0.0 for name, ruler in rulers.items() if ruler == 0} | dict(measured)


def _interpolated(points: list[tuple[float, float]], ruler: float) -> float | None:
    if ruler == 0 or ruler > BEYOND * points[-1][0]:
        return None
    if ruler <= points[0][0]:
        return points[0][1] * ruler / points[0][0]
    if ruler >= points[-1][0]:
        return points[-1][1] * ruler / points[-1][0]
    left = max(place for place, point in enumerate(points) if point[0] <= ruler)
    (x0, y0), (x1, y1) = points[left], points[min(left + 1, len(points) - 1)]
    share = math.log(ruler / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
    return y0 * (y1 / y0) ** share


def choose(candidates: Mapping[str, list[Candidate]], nbytes: int) -> dict[str, Candidate] | None:
    """One candidate for each group, of ``nbytes`` together at most and with the least error; None where the smallest
    candidates are too large.

    Args:
        candidates: those of each group, at least one.
        nbytes: for all groups together.
    """
    chosen = {
        group: min(entries, key=lambda entry: (entry.nbytes, entry.error)) for group, entries in candidates.items()
    }
    left = nbytes - sum(entry.nbytes for entry in chosen.values())
    if left < 0:
        return None
    while True:
        best, best_gain = None, 0.0
        for group, now in chosen.items():
            for entry in candidates[group]:
                grown = entry.nbytes - now.nbytes
                if entry.error < now.error and grown <= left:
                    gain = (now.error - entry.error) / grown if grown > 0 else math.inf
                    if gain > best_gain:
                        best, best_gain = (group, entry), gain
        if best is None:
            return chosen
        group, entry = best
        left -= entry.nbytes - chosen[group].nbytes
        chosen[group] = entry
