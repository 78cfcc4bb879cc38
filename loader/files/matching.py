"""What a file's tensors mean: how their names and shapes fit the table of a model.

:func:`match` reads a file's names and shapes against an :class:`~.architecture.Architecture`: every required tensor has
to be there, an optional one may be missing, and a tensor that the table does not have is an error, unless it belongs to
another part of an all-in-one file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isclose, isqrt, prod

from .architecture import NATIVE, Architecture, Row, Size
from .errors import ModelFileError, listed, shown
from .recognise import recognise, recognise_architecture

ORIG_SHAPE = "comfy.gguf.orig_shape."
COMPILED = "_orig_mod."  # what torch.compile puts before the names in a module that is compiled, at any depth
MAX_DIMENSIONS = 4


class TensorsError(ModelFileError):
    """A file whose tensors do not make up the model; ``tensors`` holds the names of all that are wrong."""

    def __init__(self, path: str, *, found: str, expected: str, advice: str, tensors: Sequence[str]):
        super().__init__(path, found=found, expected=expected, advice=advice)
        self.tensors = tuple(tensors)

    def __reduce__(self):
        fields = {"found": self.found, "expected": self.expected, "advice": self.advice, "tensors": self.tensors}
        return partial(TensorsError, **fields), (self.path,)


@dataclass(frozen=True)
class Source:
    """Where a weight of the model comes from.

    Attributes:
        name: the tensor's name in the file, prefix included.
        shape: the shape that the model wants, leading 1 of bare parameters included.
        swap_halves: whether the two halves of its rows have to change places.
    """

    name: str
    shape: tuple[int, ...]
    swap_halves: bool


@dataclass(frozen=True)
class Match:
    """How a file's tensors make up a model.

    Attributes:
        spelling: one of the architecture's.
        prefix: what stands before the names of the model's tensors, ``""`` for nothing.
        weights: the weights by native name, in the file's order.
        dimensions: the numbers of layers by stack, and the architecture's named dimensions.
        skipped: names in the file that belong to other parts than this model (such as a VAE), or of tensors that the
            file has twice.
        architecture: what was matched.
    """

    spelling: str
    prefix: str
    weights: dict[str, Source]
    dimensions: dict[str, int]
    skipped: tuple[str, ...]
    architecture: Architecture


@dataclass(frozen=True)
class _Found:
    row: Row
    layer: int | None
    name: str


def match(
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    metadata: Mapping[str, object],
    path: str,
    fixed: Mapping[str, int] | None = None,
) -> Match:
    """Read a file's tensors as the weights of a model.

    Args:
        architecture: the model.
        shapes: the shape of each tensor in the file by its name, outermost first.
        metadata: the file's metadata: annotations and ``comfy.gguf.orig_shape.*`` are honoured.
        path: the file, for messages.
        fixed: dimensions that must have these values, in place of ``architecture.fixed``.

    Raises:
        ModelFileError: when the file is something else, incomplete, or contradicts itself. A :class:`TensorsError`
            when particular tensors are at fault.
    """
    reading = _Reading(architecture, shapes, metadata, path)
    reading.check_kind()
    fixed = architecture.fixed if fixed is None else fixed
    dimensions = dict(fixed) | reading.count_layers(fixed)
    reading.check_names(dimensions)
    weights = reading.fit_shapes(dimensions)
    result = Match(reading.spelling, reading.prefix, weights, dimensions, tuple(reading.skipped), architecture)
    _check_annotations(result, metadata, path)
    return result


def check_kind(
    architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], *, metadata: Mapping[str, object], path: str
) -> None:
    """What `match` finds out first: that a file is the model's, if perhaps a damaged one.

    Raises:
        ModelFileError: it is something else.
    """
    _Reading(architecture, shapes, metadata, path).check_kind()


def choose(architectures: Sequence[Architecture], shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """The first of the models that a file's tensors may make up; the first of all where they make up none."""
    readings = (_Reading(architecture, shapes, {}, "") for architecture in architectures)
    return next((reading.architecture for reading in readings if reading.is_of_the_kind()), architectures[0])


def annotations(match: Match, name: str | None = None) -> dict[str, object]:
    """The metadata that describe a matched file: GGUF's keys with their values (docs/format.md).

    Args:
        match: the file.
        name: the ``general.architecture`` under which they stand, one of the architecture's aliases.
    """
    architecture, dimensions = match.architecture, match.dimensions
    name = name or architecture.name
    values: dict[str, object] = {"general.architecture": name}
    for key, parts in architecture.annotations.items():
        if all(part in dimensions for part in parts):
            values[f"{name}.{key}"] = sum(dimensions[part] for part in parts)
    values |= {f"{name}.{key}": value for key, value in architecture.constants.items()}
    if architecture.names_annotated:
        biased = [weight.removesuffix(".bias") for weight in match.weights if weight.endswith(".bias")]
        values[f"{name}.bias"] = sorted(biased)
        values[f"{name}.tensor_names"] = match.spelling
    return values


def _value(value: object) -> str:
    """A metadata value, made safe to print."""
    if _is_array(value):
        return f"[{listed(value)}]"
    return shown(repr(value))


def _is_array(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


class _Reading:
    """A file's tensors under the spelling and the prefix by which most of them have a row.

    Attributes:
        plain: the names in the file without torch.compile's addition, by the names in the file.
        found: these tensors, by native name.
        skipped, unknown: the names of all others.
    """

    def __init__(
        self,
        architecture: Architecture,
        shapes: Mapping[str, tuple[int, ...]],
        metadata: Mapping[str, object],
        path: str,
    ):
        self.architecture = architecture
        self.shapes = shapes
        self.metadata = metadata
        self.path = path
        self.plain = {name: name.replace(COMPILED, "") for name in shapes}
        self.spelling, self.prefix = NATIVE, ""
        self.found: dict[str, _Found] = {}
        for prefix in architecture.prefixes:
            for spelling in architecture.spellings:
                found = self._find(spelling, prefix)
                if len(found) > len(self.found):
                    self.spelling, self.prefix, self.found = spelling, prefix, found
        named = {tensor.name for tensor in self.found.values()}
        self.skipped = [name for name in shapes if name not in named and self._is_left_out(name)]
        self.unknown = [name for name in shapes if name not in named and not self._is_left_out(name)]

    def _find(self, spelling: str, prefix: str) -> dict[str, _Found]:
        found = {}
        for name, plain in self.plain.items():
            if plain.startswith(prefix) and (hit := self.architecture.find(plain.removeprefix(prefix), spelling)):
                row, layer = hit
                native = row.name(NATIVE, layer)
                if native not in found or plain == prefix + row.name(spelling, layer):
                    found[native] = _Found(row, layer, name)
        return found

    def _is_left_out(self, name: str) -> bool:
        """Whether a tensor belongs to another part, or is one of the model's for the second time."""
        plain = self.plain[name]
        inner = plain.removeprefix(self.prefix)
        twice = plain.startswith(self.prefix) and self.architecture.find(inner, self.spelling)
        return (
            bool(twice)
            or plain.startswith(self.architecture.other_parts)
            or inner.startswith(self.architecture.other_parts)
        )

    def is_of_the_kind(self) -> bool:
        """Whether the file has at least half of the kinds of tensors: it is the model, if perhaps incomplete."""
        required = sum(row.required for row in self.architecture.rows)
        return 2 * len({tensor.row for tensor in self.found.values() if tensor.row.required}) >= required

    def check_kind(self) -> None:
        """Tell a file of another model from an incomplete one."""
        title = self.architecture.title
        if self.is_of_the_kind():
            return
        recognised = recognise({self.plain[name]: shape for name, shape in self.shapes.items()}, self.metadata)
        if recognised and recognised.what != title:
            raise ModelFileError(self.path, found=recognised.what, expected=title, advice=recognised.advice)
        if not recognised:
            names = list(self.shapes)
            what = f"{len(names)} tensors of an unknown model ({listed(names)})" if names else "no tensors"
            raise ModelFileError(self.path, found=what, expected=title, advice=self.architecture.advice)

    def check_look_alike(self, *, throughout: bool) -> None:
        """Tell a model with names of this one from a damaged file, when something is wrong with the tensors.

        Args:
            throughout: it is wrong with half of them, so that another model of the same family will be meant too.
        """
        shapes = {self.plain[tensor.name]: self.shapes[tensor.name] for tensor in self.found.values()}
        recognised = recognise(shapes, {})
        if not throughout and recognised == recognise_architecture(self.architecture.name):
            return
        if recognised and recognised.what != self.architecture.title:
            raise ModelFileError(
                self.path, found=recognised.what, expected=self.architecture.title, advice=recognised.advice
            )

    def count_layers(self, fixed: Mapping[str, int]) -> dict[str, int]:
        counts = {}
        for stack, least in self.architecture.layers.items():
            numbers = {tensor.layer for tensor in self.found.values() if tensor.row.stack == stack}
            counts[stack] = fixed.get(stack, max(len(numbers), least))
            absent = sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
            if absent:
                raise ModelFileError(
                    self.path,
                    found=f"{stack} up to number {max(numbers)} without {listed(absent)}",
                    expected="layers numbered without holes",
                    advice="Layers were lost or removed: download the file again, or convert the model again.",
                )
            if len(numbers) > counts[stack]:
                self.check_look_alike(throughout=True)
                raise ModelFileError(
                    self.path,
                    found=f"{len(numbers)} layers of {stack}",
                    expected=f"{counts[stack]}",
                    advice=f"The file is not {self.architecture.title} of the known size: use another file.",
                )
        return counts

    def check_names(self, counts: Mapping[str, int]) -> None:
        title = self.architecture.title
        wanted, missing, throughout = 0, [], False
        for row in self.architecture.rows:
            if row.required:
                layers = range(counts[row.stack]) if row.stack else [None]
                absent = [layer for layer in layers if row.name(NATIVE, layer) not in self.found]
                wanted += len(layers)
                missing += [self.prefix + row.name(self.spelling, layer) for layer in absent]
                throughout |= len(layers) > 1 and 2 * len(absent) >= len(layers)
        if missing:
            self.check_look_alike(throughout=throughout)
            instead = f", but with the unknown {listed(self.unknown)}" if self.unknown else ""
            have = f"{wanted - len(missing)} of the {wanted} tensors of {title}"
            raise TensorsError(
                self.path,
                found=f"{have}, without {listed(missing)}{instead}",
                expected="all of them",
                advice="The file is incomplete or its tensors were renamed: "
                "download it again, or convert the model again.",
                tensors=missing,
            )
        if self.unknown:
            raise TensorsError(
                self.path,
                found=f"{title} with unknown tensors in it: {listed(self.unknown)}",
                expected="no other tensors than the model's",
                advice="To leave them out would give wrong pictures. Use a file of the unmodified architecture.",
                tensors=self.unknown,
            )

    def fit_shapes(self, dimensions: dict[str, int]) -> dict[str, Source]:
        """Fit each tensor's shape to its row's, giving ``dimensions`` the values that it does not have yet."""
        weights, wrong = {}, []
        for native, tensor in self.found.items():
            shape = self._logical_shape(tensor)
            wanted = _bind(tensor.row.shape, shape, dimensions)
            if shape != wanted:
                wrong.append((tensor.name, shape, wanted))
            weights[native] = Source(tensor.name, shape, tensor.row.swap_halves and self.spelling != NATIVE)
        if wrong:
            self.check_look_alike(throughout=2 * len(wrong) >= len(weights))
            name, shape, wanted = wrong[0]
            more = f", one of {len(wrong)} wrong shapes" if len(wrong) > 1 else ""
            raise TensorsError(
                self.path,
                found=f"{name} of shape {_written(shape)}{more}",
                expected=_written(wanted),
                advice=f"The file is not {self.architecture.title} of the known size, or was converted wrongly: "
                "use another file, or convert the model again.",
                tensors=[name for name, _, _ in wrong],
            )
        for dimension in self.architecture.square:
            length = dimensions[dimension]
            if isqrt(length) ** 2 != length:
                raise ModelFileError(
                    self.path,
                    found=f"{dimension} {length}",
                    expected="a square number",
                    advice="The tensor was cut or rearranged: download the file again, or convert the model again.",
                )
        return weights

    def _logical_shape(self, tensor: _Found) -> tuple[int, ...]:
        """The tensor's shape as the model has it: by its ``orig_shape``, and with the leading 1 of a bare parameter."""
        row, shape = tensor.row, self.shapes[tensor.name]
        for key in (ORIG_SHAPE + tensor.name, ORIG_SHAPE + tensor.name.removeprefix(self.prefix)):
            if key in self.metadata:
                shape = self._orig_shape(key, shape, same_rows=not row.bare)
                break
        if row.bare and len(shape) == len(row.shape) - 1:
            return (1, *shape)
        return shape

    def _orig_shape(self, key: str, shape: tuple[int, ...], *, same_rows: bool) -> tuple[int, ...]:
        """The shape under ``key``. Rows of linears are packed one by one, so theirs must keep their length."""
        value = self.metadata[key]
        if _is_array(value) and 1 <= len(value) <= MAX_DIMENSIONS and all(isinstance(size, int) for size in value):
            original = tuple(value)
            if min(original) > 0 and prod(original) == prod(shape) and (not same_rows or original[-1:] == shape[-1:]):
                return original
        rows = f" in rows of {shape[-1]}" if same_rows and shape else ""
        raise ModelFileError(
            self.path,
            found=f"{shown(key)} = {_value(value)} for a tensor of shape {_written(shape)}",
            expected=f"a shape of {prod(shape)} elements{rows}",
            advice="The tensor was rearranged in a way that cannot be undone: convert the model again.",
        )


def _bind(wanted: tuple[int | Size, ...], shape: tuple[int, ...], dimensions: dict[str, int]) -> tuple[int | Size, ...]:
    """``wanted`` in numbers; a dimension still without a value takes it from ``shape``."""
    if len(wanted) == len(shape):
        for size, length in zip(wanted, shape, strict=True):
            if isinstance(size, Size) and length and length % size.times == 0:
                dimensions.setdefault(size.dimension, length // size.times)
    return tuple(
        size.times * dimensions[size.dimension] if isinstance(size, Size) and size.dimension in dimensions else size
        for size in wanted
    )


def _written(shape: Sequence[int | Size]) -> str:
    return f"({', '.join(map(str, shape))})"


def _check_annotations(match: Match, metadata: Mapping[str, object], path: str) -> None:
    name = metadata.get("general.architecture")
    for key, value in annotations(match, name if name in match.architecture.aliases else None).items():
        if key not in metadata or _same(metadata[key], value):
            continue
        annotated = metadata[key]
        if key == "general.architecture" and not (isinstance(annotated, str) and recognise_architecture(annotated)):
            continue
        raise _contradiction(path, f"{key} = {_value(annotated)}", _value(value))
    for key, dimension in match.architecture.array_lengths.items():
        length = match.dimensions[dimension]
        if _is_array(metadata.get(key)) and len(metadata[key]) != length:
            raise _contradiction(path, f"{len(metadata[key])} {key}", str(length))


def _contradiction(path: str, annotated: str, value: str) -> ModelFileError:
    return ModelFileError(
        path,
        found=f"{annotated} in its metadata, but {value} by its tensors",
        expected="metadata that agree with the tensors",
        advice="The file was altered or wrongly converted: download it again, or convert the model again.",
    )


def _same(annotated: object, value: object) -> bool:
    if isinstance(value, float):  # stored as float32
        return isinstance(annotated, float) and isclose(annotated, value, rel_tol=1e-6)
    if not isinstance(value, list):
        return annotated == value
    return _is_array(annotated) and len(annotated) == len(value) and {str(item) for item in annotated} == set(value)
