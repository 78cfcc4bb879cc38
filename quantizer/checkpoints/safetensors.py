"""safetensors files, whole or sharded.

Tensor data are read from the file, not mapped: a read that fails is an error here and not a crash, and the memory in
use is that of one tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...loader.files.errors import ModelFileError
from ...loader.files.recognise import HEAD_BYTES, recognise_bytes
from .checkpoint import Checkpoint

MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the limit of the safetensors library

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Of quantized weights, which are not converted, and only in newer torch; a file may have them in another part.
for _name, _dtype in (("U16", "uint16"), ("U32", "uint32"), ("U64", "uint64"), ("F8_E8M0", "float8_e8m0fnu")):
    if hasattr(torch, _dtype):
        SAFETENSORS_DTYPES[_name] = getattr(torch, _dtype)


@dataclass(frozen=True)
class _Entry:
    """A tensor of a safetensors file; ``begin`` is absolute in ``file``, in bytes."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file, or the ``.index.json`` of several."""

    def __init__(self, path: str):
        self.path = path
        self.metadata = {}
        self._entries: dict[str, _Entry] = {}
        self.files = _indexed_files(path) if path.endswith(".json") else (path,)
        for file in self.files:
            header, data_begin = _safetensors_header(file)
            self.metadata |= header.pop("__metadata__", {})
            self._entries |= _entries(file, header, data_begin)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        with open(entry.file, "rb") as file:
            file.seek(entry.begin)
            length = file.readinto(data.numpy())
        if length != entry.nbytes:
            raise _cut_off(entry.file, entry.begin + length, entry.begin + entry.nbytes)
        return data.view(entry.dtype).reshape(entry.shape)


def _indexed_files(path: str) -> tuple[str, ...]:
    """The shards that an index names, all of them present."""
    try:
        with open(path, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            path,
            found="JSON without a weight_map of file names" if isinstance(error, KeyError) else "no readable index",
            expected="the index of a sharded safetensors checkpoint",
            advice="Download it again.",
        ) from error
    folder = os.path.dirname(path)
    for name in names:
        if os.path.basename(name) != name or not os.path.isfile(os.path.join(folder, name)):
            raise ModelFileError(
                path,
                found=f"no file {name} beside it",
                expected=f"all {len(names)} parts in one folder",
                advice="Download the missing part.",
            )
    return tuple(os.path.join(folder, name) for name in names)


def _safetensors_header(path: str) -> tuple[dict, int]:
    """The parsed JSON header, and where the data begin."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_SAFETENSORS_HEADER:
            file.seek(0)
            found, advice = recognise_bytes(file.read(HEAD_BYTES), path) or (None, None)
            raise _not_safetensors(path, found or f"{size} bytes that do not begin like one", advice)
        if 8 + length > size:
            raise _cut_off(path, size, 8 + length)
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _not_safetensors(path, "a header that is not JSON") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise _not_safetensors(path, "a header that is not a table")
    return header, 8 + length


def _entries(path: str, header: dict, data_begin: int) -> Iterator[tuple[str, _Entry]]:
    size = os.path.getsize(path)
    for name, item in header.items():
        try:
            dtype, shape = SAFETENSORS_DTYPES[item["dtype"]], tuple(item["shape"])
            begin, end = item["data_offsets"]
            sound = 0 <= begin <= end and end - begin == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError) as error:
            raise _not_safetensors(path, f"a tensor {name} described as {item}"[:200]) from error
        if not sound:
            raise _not_safetensors(path, f"a tensor {name} of shape {list(shape)} in {end - begin} bytes")
        if data_begin + end > size:
            raise _cut_off(path, size, data_begin + end)
        yield name, _Entry(path, dtype, shape, data_begin + begin, end - begin)


def _not_safetensors(path: str, found: str, advice: str | None = None) -> ModelFileError:
    advice = advice or "Download it again, or choose another file."
    return ModelFileError(path, found=found, expected="a safetensors file", advice=advice)


def _cut_off(path: str, found: int, expected: int) -> ModelFileError:
    return ModelFileError(
        path,
        found=f"the end of the file after {found} bytes",
        expected=f"at least {expected} bytes",
        advice="The file is cut off: download or copy it again.",
    )
