"""The types of a transformer's weights by layer and kind, and what each adds to the error where a file says it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ...loader.files.auraflow import AURAFLOW
from ...loader.files.gguf_file import GGUFFile, TensorInfo, open_gguf
from ...loader.files.matching import match
from ...loader.files.parts import part_of
from .groups import KINDS, SIDES, group_weights

GROUPS_KEY, ERRORS_KEY = "quantize.fit.groups", "quantize.fit.group_errors"


@dataclass(frozen=True)
class Cell:
    """Weights of one kind in one layer, or of one module outside of the layers.

    Attributes:
        group: their name, ``single_layers.3 MLP in``.
        types: the types that they have, the largest first.
        bits: a weight.
        error: what they add to the relative error of the transformer's output, in squares; None where nothing says it.
    """

    group: str
    types: tuple[str, ...]
    bits: float
    error: float | None


@dataclass(frozen=True)
class Layers:
    """A transformer's weights.

    Attributes:
        names: the layers, of double ones the side of the text and that of the image, ``double_layers.0 text``.
        cells: by kind, those of `KINDS`, a cell for each of ``names``; None where a layer has no such weights.
        others: the weights outside of the layers.
    """

    names: tuple[str, ...]
    cells: Mapping[str, tuple[Cell | None, ...]]
    others: tuple[Cell, ...]


def layers_of(path: str | os.PathLike, *, fixed: Mapping[str, int] | None = None) -> Layers | None:
    """The weights of a GGUF file by layer; None for a text encoder. ``fixed`` is passed to `match`.

    Raises:
        ModelFileError: the file is damaged, or neither an AuraFlow transformer nor its text encoder.
    """
    file = open_gguf(path)
    found = match(part_of(file.shapes), file.shapes, metadata=file.metadata, path=file.path, fixed=fixed)
    if found.architecture.name != AURAFLOW.name:
        return None
    infos = {name: file.tensors[source.name] for name, source in found.weights.items()}
    errors = _errors(file)
    cells = {
        group.name: _cell(group.name, [infos[name] for name in group.weights], errors.get(group.name))
        for group in group_weights(infos)
    }
    names = []
    for layer in range(found.dimensions["double_layers"]):
        names += [f"double_layers.{layer} {side}" for side in SIDES]
    names += [f"single_layers.{layer}" for layer in range(found.dimensions["single_layers"])]
    by_kind = {kind: tuple(cells.pop(f"{name} {kind}", None) for name in names) for kind in KINDS}
    return Layers(tuple(names), by_kind, tuple(cells.values()))


def layer_report(layers: Layers) -> str:
    """A table in lines of text, layers that are alike in one line."""

    def texts(cells: list[Cell | None]) -> list[str]:
        return ["" if cell is None else _text(cell) for cell in cells]

    stacks = list(dict.fromkeys(map(_stack, layers.names)))
    rows = [(name, texts([layers.cells[kind][place] for kind in KINDS])) for place, name in enumerate(layers.names)]
    lines = [("by layer", list(KINDS))]
    rows.sort(key=lambda row: stacks.index(_stack(row[0])))
    for row, alike in groupby(rows, key=lambda row: (_stack(row[0]), row[1])):
        layers_alike = [name for name, _ in alike]
        lines.append((_range(layers_alike[0], layers_alike[-1]), row[1]))
    width = max(len(name) for name, _ in lines) + 2
    column = max(len(text) for _, row in lines for text in row) + 2
    shown = [name.ljust(width) + "".join(text.ljust(column) for text in row).rstrip() for name, row in lines]
    return "\n".join([*shown, "others: " + ", ".join(f"{cell.group} {_text(cell)}" for cell in layers.others)])


def _stack(name: str) -> str:
    """What layers in one line of a report have in common."""
    return f"{name.partition('.')[0]} {name.partition(' ')[2]}"


def _range(first: str, last: str) -> str:
    rest = last.partition(".")[2]
    return first if first == last else f"{first.partition(' ')[0]}-{rest}"


def _text(cell: Cell) -> str:
    return "/".join(cell.types) + ("" if cell.error is None else f" {cell.error:.5f}")


def _cell(group: str, infos: list[TensorInfo], error: float | None) -> Cell:
    weights = sum(math.prod(info.shape) for info in infos)
    types = sorted({info.type for info in infos}, key=lambda quant_type: -quant_type.bits_per_weight)
    return Cell(
        group, tuple(quant_type.name for quant_type in types), 8 * sum(info.nbytes for info in infos) / weights, error
    )


def _errors(file: GGUFFile) -> dict[str, float]:
    """What a file says of its groups' errors; nothing where that is no table, as anybody can write anything."""
    table = [file.metadata.get(key) for key in (GROUPS_KEY, ERRORS_KEY)]
    if not all(isinstance(column, Sequence) and not isinstance(column, str) for column in table):
        return {}
    groups, errors = map(list, table)
    sound = len(groups) == len(errors) and all(isinstance(group, str) for group in groups)
    sound = sound and all(isinstance(error, float) and 0 <= error < math.inf for error in errors)
    return dict(zip(groups, errors, strict=True)) if sound else {}
