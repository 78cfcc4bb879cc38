"""Reads GGUF files, versions 2 and 3, and trusts nothing in them.

The layout, little endian throughout, from ggml's ``docs/gguf.md``::

    header    "GGUF"  version u32  tensor count u64  key-value count u64
    metadata  per key: key string, value type u32, value
    table     per tensor: name string, dimensions u32, sizes u64 (innermost first), type u32, offset u64
    padding   to a multiple of general.alignment (32 when absent); offsets count from here
    data      the packed tensors, each at a multiple of the alignment

    string    length u64, UTF-8 bytes
    array     element type u32, length u64, elements

Every length is compared with the limits below and with the size of the file before anything is allocated for it.
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import BinaryIO, NamedTuple

import torch

from ..quant_types import NOT_WEIGHT_TYPES, QUANT_TYPES, TYPES_BY_ID
from ..quant_types.base import QuantType
from .errors import ModelFileError
from .recognise import recognise_bytes

MAX_HEADER_BYTES = 32 << 20  # all before the tensor data; a vocabulary of 256 k with its merges takes half of it
MAX_TEXT_BYTES = 8 << 20  # keys, names and string values together; strings in arrays are not decoded
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 1024
MAX_KEY_VALUES = 1 << 16
MAX_TENSORS = 1 << 15
MAX_ARRAYS = 1 << 12
MAX_ARRAY_NESTING = 4
MAX_DIMENSIONS = 4
MAX_PARTS = 1000
MIN_ALIGNMENT = 8
MAX_ALIGNMENT = 64 << 10
DEFAULT_ALIGNMENT = 32
READ_BYTES = 256 << 10

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# The formats before GGUF: their magics are little-endian integers, so that the letters stand in reverse.
OLD_MAGICS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}

_HEADER = struct.Struct("<4sIQQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_TYPE_AND_OFFSET = struct.Struct("<IQ")
_ARRAY_HEAD = struct.Struct("<IQ")
_STRING = 8
_ARRAY = 9
_SCALARS = {
    type_id: struct.Struct("<" + code)
    for type_id, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_SMALLEST_KEY_VALUE = 8 + 4 + 1
_SMALLEST_TENSOR_ENTRY = 8 + 4 + 8 + _TYPE_AND_OFFSET.size

_INCOMPLETE = "The download is incomplete: download it again."
_DAMAGED = "The file is damaged: download it again."
_BADLY_WRITTEN = "The file is damaged, or the program that wrote it is at fault: get it from another source."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a GGUF file, as its table describes it.

    Attributes:
        name: its name in the file.
        shape: in torch's order, outermost first.
        type: the quantization type.
        part: index of the split part that holds it, 0 in an unsplit file.
        offset: where its bytes begin in that part, from the beginning of the file.
        nbytes: how many bytes it takes there.
    """

    name: str
    shape: tuple[int, ...]
    type: QuantType
    part: int
    offset: int
    nbytes: int


class LazyArray(Sequence):
    """An array of the metadata: its numbers, bools or strings are decoded when asked for.

    Raises:
        ModelFileError: on access to a string that is not UTF-8.
    """

    def __init__(self, data: bytearray, start: int, length: int, element_type: int, *, path: str, place: str):
        self._data = data
        self._start = start
        self._length = length
        self._element_type = element_type
        self._path = path
        self._place = place

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._element(i) for i in range(*index.indices(self._length))]
        return self._element(range(self._length)[index])

    def _element(self, index: int) -> int | float | bool | str:
        if self._element_type == _STRING:
            return self._text(self._string_starts[index])
        scalar = _SCALARS[self._element_type]
        return scalar.unpack_from(self._data, self._start + index * scalar.size)[0]

    def _text(self, start: int) -> str:
        (length,) = _U64.unpack_from(self._data, start)
        text = self._data[start + _U64.size : start + _U64.size + length]
        return _decode(text, self._path, self._place)

    @cached_property
    def _string_starts(self) -> array:
        starts = array("Q")
        position = self._start
        for _ in range(self._length):
            starts.append(position)
            position += _U64.size + _U64.unpack_from(self._data, position)[0]
        return starts


class GGUFFile:
    """A GGUF file, or all parts of a split one, that has passed every check.

    Attributes:
        path: the file that was opened, absolute.
        version: its GGUF version.
        metadata: values by key: ``int``, ``float``, ``bool``, ``str``, `LazyArray`; an array of arrays is a tuple
            of those. Of a split file, the first part's.
        tensors: descriptions by name, in the order of the file.

    No file is held open. The first `packed` of a part maps that part into memory; the mapping ends with the last
    of this object and the tensors that came from it.
    """

    def __init__(self, path: str, parts: Sequence[_Part]):
        self.path = path
        self.version: int = parts[0].version
        self.metadata: Mapping[str, object] = parts[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            self.tensors.update(part.tensors)
        self._files = [(part.path, part.size) for part in parts]
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its name, outermost first."""
        return {name: info.shape for name, info in self.tensors.items()}

    def part(self, info: TensorInfo) -> tuple[str, int]:
        """The path of the file that holds a tensor, and how many bytes that had when it was opened."""
        return self._files[info.part]

    def packed(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, ``(nbytes,) uint8``: a view on the private, copy-on-write memory map of the file.

        Raises:
            KeyError: when the file has no tensor of that name.
            ModelFileError: when the file has shrunk or gone since it was opened.
        """
        info = self.tensors[name]
        if info.part not in self._storages:
            self._storages[info.part] = _map(*self._files[info.part])
        return torch.empty(0, dtype=torch.uint8).set_(self._storages[info.part], info.offset, (info.nbytes,))


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Read and check a GGUF file; of a split one, any part opens all parts, from the same folder.

    Raises:
        ModelFileError: when the file cannot be read, is not GGUF, or breaks a rule of the format or a limit.
    """
    path = os.path.abspath(path)
    part = _read_part(path)
    parts = [part] if part.split.count == 1 else _read_parts(part)
    return GGUFFile(path, parts)


class _Split(NamedTuple):
    """Which part of a split file a file is; of one that is not split, part 0 of 1."""

    number: int
    count: int
    tensor_count: int

    def __str__(self) -> str:
        return f"part {self.number + 1:,} of {self.count:,}, with {self.tensor_count:,} tensors in all"


@dataclass(frozen=True)
class _Part:
    path: str
    size: int
    version: int
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    split: _Split


def _read_part(path: str) -> _Part:
    try:
        with open(path, "rb") as file:
            header = _Header(file, path)
            version, tensor_count, key_value_count = _read_counts(header)
            metadata = _read_metadata(header, key_value_count)
            split = _read_split(header, metadata)
            tensors = _read_tensors(header, tensor_count, metadata, split.number)
            return _Part(path, header.size, version, metadata, tensors, split)
    except OSError as error:
        raise ModelFileError(
            path,
            found=f"that it cannot be read ({error.strerror})",
            expected="a GGUF file",
            advice="Check that the file is there and that you may read it.",
        ) from error


class _Header:
    """What comes before the tensor data, read from the file only as far as it is needed."""

    def __init__(self, file: BinaryIO, path: str):
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.data = bytearray()
        self.position = 0
        self.place = "the header"
        self._file = file
        self._text_bytes = 0
        self._arrays = 0

    def refuse(self, found: str, expected: str, advice: str = _DAMAGED) -> ModelFileError:
        return ModelFileError(self.path, found=found, expected=expected, advice=advice)

    def need(self, end: int) -> None:
        """Have the bytes up to ``end`` in ``data``."""
        if end > MAX_HEADER_BYTES:
            raise self.refuse(
                f"{self.place} reaching to byte {end:,}",
                f"all metadata and names within the first {MAX_HEADER_BYTES:,} bytes",
            )
        while end > len(self.data):
            piece = self._file.read(READ_BYTES) if end <= self.size else b""
            if not piece:
                size = self.size if end > self.size else len(self.data)
                raise self.refuse(_bytes(size), f"at least {end:,} bytes, for {self.place}", _INCOMPLETE)
            self.data += piece

    def skip(self, nbytes: int) -> int:
        """Go past ``nbytes``; returns where they begin in ``data``."""
        start = self.position
        self.need(start + nbytes)
        self.position = start + nbytes
        return start

    def unpack(self, layout: struct.Struct) -> tuple:
        return layout.unpack_from(self.data, self.skip(layout.size))

    def text(self, limit: int = MAX_TEXT_BYTES) -> str:
        (length,) = self.unpack(_U64)
        self._text_bytes += length
        if length > limit:
            raise self.refuse(f"a string of {length:,} bytes in {self.place}", f"at most {limit:,}")
        if self._text_bytes > MAX_TEXT_BYTES:
            raise self.refuse(
                f"{self._text_bytes:,} bytes of text up to {self.place}", f"at most {MAX_TEXT_BYTES:,} in all"
            )
        start = self.skip(length)
        return _decode(self.data[start : self.position], self.path, self.place)

    def value(self, value_type: int) -> object:
        if value_type == _STRING:
            return self.text()
        if value_type == _ARRAY:
            return self._array(depth=1)
        self._check_scalar(value_type)
        return self.unpack(_SCALARS[value_type])[0]

    def _array(self, depth: int) -> LazyArray | tuple:
        element_type, length = self.unpack(_ARRAY_HEAD)
        self._arrays += 1
        if self._arrays > MAX_ARRAYS:
            raise self.refuse(f"more than {MAX_ARRAYS:,} arrays up to {self.place}", "fewer")
        if element_type == _ARRAY:
            if depth == MAX_ARRAY_NESTING:
                raise self.refuse(f"arrays nested more than {depth} deep in {self.place}", f"at most {depth} levels")
            self.need(self.position + length * _ARRAY_HEAD.size)
            return tuple(self._array(depth + 1) for _ in range(length))
        start = self.position
        if element_type == _STRING:
            self._skip_strings(length)
        else:
            self._check_scalar(element_type)
            self.skip(length * _SCALARS[element_type].size)
        return LazyArray(self.data, start, length, element_type, path=self.path, place=self.place)

    def _skip_strings(self, count: int) -> None:
        self.need(self.position + count * _U64.size)
        unpack_from = _U64.unpack_from
        data = self.data
        position = self.position
        readable = len(data) - _U64.size
        for _ in range(count):
            if position > readable:
                self.need(position + _U64.size)
                readable = len(data) - _U64.size
            position += _U64.size + unpack_from(data, position)[0]
        self.need(position)
        self.position = position

    def _check_scalar(self, value_type: int) -> None:
        if value_type not in _SCALARS:
            raise self.refuse(f"value type {value_type} in {self.place}", "one of GGUF's value types, 0 to 12")


def _read_counts(header: _Header) -> tuple[int, int, int]:
    """Version, number of tensors, number of key-value pairs."""
    header.need(min(header.size, _HEADER.size))
    magic = bytes(header.data[: len(MAGIC)])
    if not MAGIC.startswith(magic):
        raise _not_gguf(header, magic)
    _, version, tensor_count, key_value_count = header.unpack(_HEADER)
    if version not in VERSIONS:
        raise _other_version(header, version)
    if tensor_count > MAX_TENSORS:
        raise header.refuse(f"a table of {tensor_count:,} tensors", f"at most {MAX_TENSORS:,}")
    if key_value_count > MAX_KEY_VALUES:
        raise header.refuse(f"{key_value_count:,} metadata entries", f"at most {MAX_KEY_VALUES:,}")
    smallest = header.position + key_value_count * _SMALLEST_KEY_VALUE + tensor_count * _SMALLEST_TENSOR_ENTRY
    if smallest > header.size:
        raise header.refuse(
            _bytes(header.size),
            f"at least {smallest:,} bytes, for {key_value_count:,} metadata entries and {tensor_count:,} tensors",
            _INCOMPLETE,
        )
    return version, tensor_count, key_value_count


def _not_gguf(header: _Header, magic: bytes) -> ModelFileError:
    if magic in OLD_MAGICS:
        return header.refuse(
            f"the {OLD_MAGICS[magic]} format, which came before GGUF", "a GGUF file", "Download the model as GGUF."
        )
    recognised = recognise_bytes(bytes(header.data), header.path)
    if recognised is None:
        return header.refuse(
            f"the bytes {magic.hex(' ')} at its beginning",
            f"a GGUF file, which begins with {MAGIC.hex(' ')}",
            "This is not a GGUF file: check what you downloaded.",
        )
    found, advice = recognised
    return header.refuse(found, "a GGUF file", advice)


def _other_version(header: _Header, version: int) -> ModelFileError:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, *VERSIONS):
        return header.refuse(
            f"a big-endian GGUF file of version {swapped}",
            "a little-endian one",
            "Download the file for little-endian machines, or convert the model again.",
        )
    return header.refuse(
        f"GGUF version {version}",
        "version 2 or 3",
        "Download a newer file of this model, or convert it again."
        if version < min(VERSIONS)
        else "Update the AuraFlow GGUF pack if the file is new; else the file is damaged: download it again.",
    )


def _read_metadata(header: _Header, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for index in range(count):
        header.place = f"metadata entry {index + 1} of {count:,}"
        key = header.text(MAX_KEY_BYTES)
        if key in metadata:
            raise header.refuse(f"the metadata key {_quote(key)} twice", "each key once", _BADLY_WRITTEN)
        header.place = f"the metadata key {_quote(key)}"
        (value_type,) = header.unpack(_U32)
        metadata[key] = header.value(value_type)
    return metadata


def _integer(header: _Header, metadata: Mapping[str, object], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int:
        raise header.refuse(f"a {key} that is no integer", "an integer", _BADLY_WRITTEN)
    return value


def _read_split(header: _Header, metadata: Mapping[str, object]) -> _Split:
    # llama-gguf-split writes a count of 0 into the files that it merges.
    count = max(_integer(header, metadata, "split.count", 0), 1)
    if count > MAX_PARTS:
        raise header.refuse(f"a file split in {count:,}", f"at most {MAX_PARTS:,} parts")
    number = _integer(header, metadata, "split.no", 0)
    if not 0 <= number < count:
        raise header.refuse(
            f"split.no = {number} in a file split in {count:,}", f"a number from 0 to {count - 1:,}", _BADLY_WRITTEN
        )
    return _Split(number, count, _integer(header, metadata, "split.tensors.count", 0))


def _read_tensors(header: _Header, count: int, metadata: Mapping[str, object], part: int) -> dict[str, TensorInfo]:
    alignment = _integer(header, metadata, "general.alignment", DEFAULT_ALIGNMENT)
    if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise header.refuse(
            f"general.alignment = {alignment}",
            f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT:,}",
            _BADLY_WRITTEN,
        )
    entries: dict[str, TensorInfo] = {}
    for index in range(count):
        header.place = f"entry {index + 1} of {count:,} in the tensor table"
        info = _read_tensor(header, alignment, part)
        if info.name in entries:
            raise header.refuse(f"two tensors named {_quote(info.name)}", "each name once", _BADLY_WRITTEN)
        entries[info.name] = info
    data_start = -(-header.position // alignment) * alignment
    tensors = {name: replace(info, offset=data_start + info.offset) for name, info in entries.items()}
    _check_extents(header, tensors)
    return tensors


def _read_tensor(header: _Header, alignment: int, part: int) -> TensorInfo:
    """The next entry of the table, its offset still counted from the beginning of the data."""
    name = header.text(MAX_NAME_BYTES)
    header.place = f"the table's entry for tensor {_quote(name)}"
    (dimensions,) = header.unpack(_U32)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise header.refuse(f"{dimensions:,} dimensions in {header.place}", f"1 to {MAX_DIMENSIONS}")
    sizes = header.unpack(struct.Struct(f"<{dimensions}Q"))
    type_id, offset = header.unpack(_TYPE_AND_OFFSET)
    if 0 in sizes:
        raise header.refuse(f"tensor {_quote(name)} of sizes {_sizes(sizes)}", "sizes above 0", _BADLY_WRITTEN)
    quant_type = TYPES_BY_ID.get(type_id)
    if quant_type is None:
        known = (
            f"{NOT_WEIGHT_TYPES[type_id]}, which is no type for weights"
            if type_id in NOT_WEIGHT_TYPES
            else f"{type_id}"
        )
        raise header.refuse(
            f"tensor {_quote(name)} of type {known}",
            "a quantization type that ggml still has",
            f"Download the model in another type. These can be loaded: {', '.join(QUANT_TYPES)}.",
        )
    if sizes[0] % quant_type.block_size:
        raise header.refuse(
            f"tensor {_quote(name)} of sizes {_sizes(sizes)} in {quant_type.name}",
            f"a first size that is a multiple of {quant_type.block_size}",
            _BADLY_WRITTEN,
        )
    if offset % alignment:
        raise header.refuse(
            f"tensor {_quote(name)} at offset {offset:,}", f"a multiple of the alignment, {alignment:,}", _BADLY_WRITTEN
        )
    nbytes = quant_type.row_bytes(sizes[0]) * math.prod(sizes[1:])
    return TensorInfo(name, sizes[::-1], quant_type, part, offset, nbytes)


def _check_extents(header: _Header, tensors: Mapping[str, TensorInfo]) -> None:
    in_order = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in pairwise(in_order):
        if after.offset < before.offset + before.nbytes:
            raise header.refuse(
                f"tensors {_quote(before.name)} and {_quote(after.name)} in the same bytes",
                "each in its own",
                _BADLY_WRITTEN,
            )
    if in_order:
        last = in_order[-1]
        end = last.offset + last.nbytes
        if end > header.size:
            raise header.refuse(
                _bytes(header.size), f"{end:,} bytes, where tensor {_quote(last.name)} ends", _INCOMPLETE
            )


def _read_parts(opened: _Part) -> list[_Part]:
    """All parts of the split file that ``opened`` is one of, in order."""
    number, count, _ = opened.split
    suffix = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if not opened.path.endswith(suffix):
        raise ModelFileError(
            opened.path,
            found=f"{opened.split}",
            expected=f"a name that ends in {suffix}",
            advice="Give all parts the names they were downloaded with, and keep them in one folder.",
        )
    stem = opened.path.removesuffix(suffix)
    paths = [f"{stem}-{index + 1:05d}-of-{count:05d}.gguf" for index in range(count)]
    missing = [os.path.basename(path) for path in paths if not os.path.exists(path)]
    if missing:
        others = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise ModelFileError(
            opened.path,
            found=f"{opened.split}",
            expected=f"{', '.join(missing[:3])}{others} beside it",
            advice="Download the missing parts into the same folder.",
        )
    parts = [opened if index == number else _read_part(path) for index, path in enumerate(paths)]
    _check_parts(opened, parts)
    return parts


def _check_parts(opened: _Part, parts: Sequence[_Part]) -> None:
    advice = "Download all parts of one model again, into a folder of their own."
    names: set[str] = set()
    for index, part in enumerate(parts):
        expected = opened.split._replace(number=index)
        if part.split != expected:
            raise ModelFileError(part.path, found=f"{part.split}", expected=f"{expected}", advice=advice)
        for name in part.tensors:
            if name in names:
                raise ModelFileError(
                    part.path,
                    found=f"tensor {_quote(name)}, which an earlier part has too",
                    expected="each tensor in one part",
                    advice=advice,
                )
            names.add(name)
    if len(names) != opened.split.tensor_count:
        raise ModelFileError(
            opened.path,
            found=f"{len(names):,} tensors in all parts together",
            expected=f"{opened.split.tensor_count:,}",
            advice=advice,
        )


def _map(path: str, size: int) -> torch.UntypedStorage:
    try:
        return torch.UntypedStorage.from_file(path, shared=False, nbytes=size)
    except RuntimeError as error:
        raise ModelFileError(
            path,
            found="that it cannot be mapped into memory any more",
            expected=f"the {size:,} bytes it had when it was opened",
            advice="Leave the file in place while the model is in use, and load it again.",
        ) from error


def _decode(text: bytearray, path: str, place: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(
            path,
            found=f"byte 0x{text[error.start]:02x} in {place}, which is not UTF-8",
            expected="UTF-8 text",
            advice=_DAMAGED,
        ) from None


def _quote(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:79] + "…")


def _sizes(sizes: Sequence[int]) -> str:
    return " × ".join(f"{size:,}" for size in sizes)


def _bytes(count: int) -> str:
    return f"{count:,} bytes" if count else "an empty file (0 bytes)"
