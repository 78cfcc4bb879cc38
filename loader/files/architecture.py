"""A model as a table of its tensors.

Nothing here knows a particular model. An :class:`Architecture` lists the tensors of one, under the names that ComfyUI
has for them ("native") and under those of another project, with shapes in terms of named dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

NATIVE = "native"
# Of a transformer; the defaults of an Architecture.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "")
OTHER_PARTS = ("text_encoders.", "text_encoder.", "cond_stage_model.", "conditioner.", "vae.", "first_stage_model.")

_LAYER_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,3})\.")


@dataclass(frozen=True)
class Size:
    """``times`` × the named dimension: ``6 * Size("embedding_length")``."""

    dimension: str
    times: int = 1

    def __rmul__(self, times: int) -> Size:
        return Size(self.dimension, times * self.times)

    def __str__(self) -> str:
        return self.dimension if self.times == 1 else f"{self.times} × {self.dimension}"


@dataclass(frozen=True)
class Row:
    """A tensor of the model, or one of each layer of a stack: then ``{}`` in its names stands for the layer's number.

    Attributes:
        native, other: its name in both spellings.
        shape: outermost first, as torch has it.
        required: a file without it is incomplete.
        bare: a parameter that is in no module, with a leading 1 in its shape that files may lack.
        dense: a small weight that no packed product is made with: it is dequantized when it is loaded.
        swap_halves: the other spelling has the two halves of its rows the other way round.
        also: further native names, for a tensor that some files have under another one, or twice.
    """

    native: str
    other: str
    shape: tuple[int | Size, ...]
    required: bool = True
    bare: bool = False
    dense: bool = False
    swap_halves: bool = False
    also: tuple[str, ...] = ()

    @property
    def stack(self) -> str | None:
        """The native name of the stack of layers it is in, e.g. ``double_layers``."""
        stack, layered, _ = self.native.partition(".{}.")
        return stack if layered else None

    def template(self, spelling: str) -> str:
        return self.native if spelling == NATIVE else self.other

    def name(self, spelling: str, layer: int | None) -> str:
        return self.template(spelling).replace("{}", str(layer))


def linear(
    native: str, other: str, shape: tuple[int | Size, int | Size], *, bias: bool = False, swap_halves: bool = False
) -> tuple[Row, Row]:
    """The rows of a linear module: a required weight of ``shape`` (out, in), and a bias, required or optional."""
    return (
        Row(f"{native}.weight", f"{other}.weight", shape, swap_halves=swap_halves),
        Row(f"{native}.bias", f"{other}.bias", shape[:1], required=bias, swap_halves=swap_halves),
    )


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model as a table.

    Attributes:
        name: its ``general.architecture``, and the first part of its annotations' keys.
        title: what a person calls it, with its article: "an AuraFlow transformer".
        advice: what to do with a file that is something unknown.
        rows: its tensors.
        layers: the least number of layers of each stack, by the stack's native name. The number that a file has is
            the dimension of that name.
        fixed: dimensions that cannot differ from file to file.
        square: dimensions that have to be square numbers.
        annotations: the dimensions whose sum is written into a file's metadata, by key without the ``<name>.``.
        constants: what else is written there and has to agree, likewise.
        conventions: what else is written there and need not agree, likewise.
        array_lengths: dimensions that are the length of an array in the metadata, by the array's whole key.
        names_annotated: the metadata list the biases and the spelling too.
        aliases: other values of ``general.architecture`` that files of the model have.
        spellings: the native one and the other one.
        written: the spelling in which files are made.
        prefixes: what may stand before all names.
        other_parts: how names begin that belong to other parts than this model, with the prefix or without.
    """

    name: str
    title: str
    advice: str
    rows: tuple[Row, ...]
    layers: Mapping[str, int]
    fixed: Mapping[str, int]
    square: tuple[str, ...]
    annotations: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, object] = field(default_factory=dict)
    conventions: Mapping[str, object] = field(default_factory=dict)
    array_lengths: Mapping[str, str] = field(default_factory=dict)
    names_annotated: bool = True
    aliases: tuple[str, ...] = ()
    spellings: tuple[str, str] = (NATIVE, "diffusers")
    written: str = NATIVE
    prefixes: tuple[str, ...] = PREFIXES
    other_parts: tuple[str, ...] = OTHER_PARTS

    @cached_property
    def _index(self) -> dict[str, dict[tuple[str, ...], Row]]:
        index = {
            spelling: {tuple(row.template(spelling).split(".{}.")): row for row in self.rows}
            for spelling in self.spellings
        }
        index[NATIVE] |= {tuple(name.split(".{}.")): row for row in self.rows for name in row.also}
        return index

    def find(self, name: str, spelling: str) -> tuple[Row, int | None] | None:
        """The row of a tensor's name (without prefix) and its layer's number, or None when it is not in the table."""
        index = self._index[spelling]
        if row := index.get((name,)):
            return row, None
        number = _LAYER_NUMBER.search(name)
        if number and (row := index.get((name[: number.start()], name[number.end() :]))):
            return row, int(number[1])
        return None

    def written_name(self, native: str) -> str:
        """The name under which a made file has the tensor of a native name."""
        row, layer = self.find(native, NATIVE)
        return row.name(self.written, layer)

    def spell(self, name: str, spelling: str) -> str:
        """Translate a tensor's name from the other spelling into ``spelling``.

        Raises:
            ValueError: when the other spelling has no such name.
        """
        (other,) = (known for known in self.spellings if known != spelling)
        found = self.find(name, other)
        if found is None:
            raise ValueError(f"{name} is not among the {other} names of {self.title}")
        row, layer = found
        return row.name(spelling, layer)
