"""Writes GGUF version 3 (little endian), tensor by tensor, so that a file appears whole or not at all.

Layout, after ggml's ``docs/gguf.md``::

    magic "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata:     key string | value type u32 | value                        (one after another)
    tensor table: name string | n_dims u32 | dims u64 … (innermost first) | type u32 | offset u64
    zeros up to a multiple of ALIGNMENT, then each tensor's bytes, each padded to a multiple of ALIGNMENT

A string is its length in bytes (u64) and its UTF-8; an offset counts from the end of the padded table.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from ..loader.files.errors import ModelFileError
from ..loader.quant_types.base import QuantType
from .unfinished import open_unfinished

ALIGNMENT = 32
METADATA_BYTES = 1 << 24  # at the beginning of a file, in which a key is looked for

# GGUF's metadata value types (enum gguf_metadata_value_type)
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, shape (outermost dimension first) and type."""

    name: str
    shape: tuple[int, ...]
    type: QuantType

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


def write_gguf(
    target: str | os.PathLike,
    metadata: Mapping[str, object],
    tensors: Sequence[TensorSpec],
    data: Callable[[TensorSpec], Iterable[memoryview]],
    *,
    overwrite: bool = False,
) -> None:
    """Write a GGUF file under a temporary name beside ``target``, and rename it when it is complete.

    Args:
        target: the file to make.
        metadata: str, bool, int (0 ≤ n < 2**64), float (stored as float32) or a sequence of one of these; integers
            in sequences are 0 ≤ n < 2**31.
        tensors: the tensor table, in the file's order.
        data: called once a tensor, in order; yields its packed bytes, in pieces of any size.
        overwrite: replace a ``target`` that exists.

    Raises:
        ModelFileError: ``target`` exists, its folder does not, or the disk has too little room.
        ValueError: ``data`` yielded more or fewer bytes than the tensor has.
        Whatever ``data`` raises. In every case, Ctrl-C too, the temporary file is removed and ``target`` is as it
        was. A killed process leaves at most the temporary file, see `unfinished`, which the next that makes the same
        target removes.
    """
    header = _header(metadata, tensors)
    with whole_file(target, file_size(metadata, tensors), overwrite=overwrite) as file:
        file.write(header)
        for tensor in tensors:
            written = sum(file.write(piece) for piece in data(tensor))
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes of data, {tensor.nbytes} announced")
            file.write(bytes(_padded(written) - written))


def file_size(metadata: Mapping[str, object], tensors: Sequence[TensorSpec]) -> int:
    """Bytes of the file that `write_gguf` makes."""
    return len(_header(metadata, tensors)) + sum(_padded(tensor.nbytes) for tensor in tensors)


@contextmanager
def whole_file(target: str | os.PathLike, size: int, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to be written under a temporary name beside ``target``, and renamed when the context ends without error.

    Args:
        target: the file to make.
        size: how many bytes it will have.
        overwrite: replace a ``target`` that exists.

    Raises:
        ModelFileError: as `write_gguf`, which says what is left when it fails.
    """
    target = os.path.abspath(target)
    check_target(target, size, overwrite)
    file = open_unfinished(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":
                file.close()  # Windows renames nothing that is open
            _refuse_existing(target, overwrite)  # one that another conversion has made meanwhile
            _replace(file.name, target)
    except BaseException as error:
        if os.path.exists(file.name):
            os.unlink(file.name)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise ModelFileError(
                target,
                found=_NO_ROOM[error.errno],
                expected="room for all of it",
                advice="The unfinished file was removed. Free some space, or write to another disk.",
            ) from error
        raise


def set_float(path: str | os.PathLike, key: str, value: float) -> None:
    """Change a float among the metadata of a file that `write_gguf` made.

    Raises:
        ValueError: it has none under that key.
    """
    sought = _string(key) + struct.pack("<I", _FLOAT32)
    with open(path, "r+b") as file:
        place = file.read(METADATA_BYTES).find(sought)
        if place < 0:
            raise ValueError(f"no float under {key}")
        file.seek(place + len(sought))
        file.write(struct.pack("<f", value))
        file.flush()
        os.fsync(file.fileno())


_NO_ROOM = {
    errno.ENOSPC: "a disk that became full while the file was written",
    errno.EDQUOT: "a disk quota that was used up while the file was written",
    errno.EFBIG: "a file system that takes no file of this size",
}


def _refuse_existing(target: str, overwrite: bool) -> None:
    if os.path.lexists(target) and not overwrite:
        raise ModelFileError(
            target,
            found="a file of that name",
            expected="none",
            advice="Choose another name, or allow it to be replaced (--overwrite).",
        )


def _replace(temporary: str, target: str) -> None:
    try:
        os.replace(temporary, target)
    except OSError as error:
        raise ModelFileError(
            target,
            found=f"that it cannot be replaced ({error.strerror})",
            expected="a file that no program has open",  # Windows keeps one that ComfyUI has loaded
            advice="Unload the model or close the program that uses it, or choose another name.",
        ) from error


def check_target(target: str, size: int, overwrite: bool) -> None:
    """Refuse an absolute path that a file of ``size`` bytes cannot be written to, as `write_gguf` does."""
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise ModelFileError(
            target,
            found=f"no folder {folder}",
            expected="a folder to write into",
            advice="Create the folder, or choose another place.",
        )
    if os.path.isdir(target):
        raise ModelFileError(
            target, found="a folder", expected="a file's name", advice="Give the name of the file to make in it."
        )
    _refuse_existing(target, overwrite)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ModelFileError(
            target,
            found=f"{free / 1e9:.2f} GB free in {folder}",
            expected=f"the {size / 1e9:.2f} GB that the file needs",
            advice="Free some space, write to another disk, or choose a smaller type.",
        )


def _header(metadata: Mapping[str, object], tensors: Sequence[TensorSpec]) -> bytes:
    """Everything before the tensors' data, padded to ``ALIGNMENT``."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += _string(key), _value(value)
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts += _string(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        parts.append(struct.pack("<IQ", tensor.type.id, offset))
        offset += _padded(tensor.nbytes)
    header = b"".join(parts)
    return header.ljust(_padded(len(header)), b"\0")


def _string(text: str) -> bytes:
    encoded = text.encode(errors="replace")  # JSON can spell half a surrogate pair
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: object) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [_scalar(item) for item in value]
        kind = items[0][0] if items else _STRING
        kind = _INT32 if kind == _UINT32 else kind  # as gguf-py and llama.cpp have arrays
        return struct.pack("<IIQ", _ARRAY, kind, len(items)) + b"".join(encoded for _, encoded in items)
    kind, encoded = _scalar(value)
    return struct.pack("<I", kind) + encoded


def _scalar(value: object) -> tuple[int, bytes]:
    match value:
        case str():
            return _STRING, _string(value)
        case bool():
            return _BOOL, struct.pack("<?", value)
        case int():
            return (_UINT32, struct.pack("<I", value)) if value < 2**32 else (_UINT64, struct.pack("<Q", value))
        case float():
            return _FLOAT32, struct.pack("<f", value)
    raise TypeError(f"metadata of type {type(value).__name__}")


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
