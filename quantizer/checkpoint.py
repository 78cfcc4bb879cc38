"""Where a conversion's weights come from: any checkpoint, read one tensor at a time.

Tensor data are read from the file, not mapped, where the format allows it (safetensors): a read that fails is an error
here and not a crash, and the memory in use is that of one tensor. ``.pt`` files and GGUF are mapped by their readers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..loader.errors import ModelFileError
from ..loader.gguf_file import TensorInfo, open_gguf
from ..loader.quant_types.base import QuantType
from ..loader.recognise import HEAD_BYTES, recognise_bytes

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

GGUF_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TILE = 1 << 22  # weights of a GGUF file dequantized at a time

# A scaled fp8 weight is fp8 · scale. Both generations of ComfyUI's names: x.scale_weight and x.weight_scale.
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
# What else comes with such weights, and says nothing about their values.
FP8_COMPANIONS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
# What stands beside weights of other formats: nvfp4, int4 with two levels of scales, bitsandbytes.
OTHER_COMPANIONS = (".weight_scale_2", ".weight_s_channel", ".absmax")

# model-00001-of-00003.safetensors; of a variant model.fp16-00001-of-00003.safetensors (diffusers) or
# model-00001-of-00003.fp16.safetensors (older ones)
_SHARD = re.compile(
    r"(?P<model>.+?)(?P<variant>\.\w+)?-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<older>\.\w+)?\.safetensors"
)


class Checkpoint(ABC):
    """Named tensors, read on demand.

    Attributes:
        path: what the user named; errors say it.
        files: the files that hold the tensors.
        metadata: the file's own metadata, as it stands there.
        shapes: name → shape (outermost dimension first), in the file's order.
    """

    path: str
    files: tuple[str, ...]
    metadata: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype that ``read`` gives; float32 for a packed tensor."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor, shaped as in ``shapes``.

        Raises:
            ModelFileError: its data cannot be read.
        """

    def packed(self, name: str) -> tuple[QuantType, torch.Tensor] | None:
        """The type and the rows, ``(rows, row_bytes) uint8``, of a tensor that is packed in blocks; else None."""
        return None

    def fingerprint(self) -> str:
        """SHA-256, in hex, over the names, shapes and dtypes of all tensors and the text of the metadata."""
        table = [[name, list(shape), str(self.dtype(name))] for name, shape in self.shapes.items()]
        metadata = {key: value for key, value in self.metadata.items() if isinstance(value, (str, int, float))}
        return hashlib.sha256(json.dumps([table, metadata], sort_keys=True).encode()).hexdigest()


def open_checkpoint(source: str | os.PathLike, part: str | None = None) -> Checkpoint:
    """Open a safetensors file, the index of a sharded one or one of its shards, a diffusers model folder (of which
    ``part``, the transformer by default, is taken), a ``.ckpt`` or ``.pt`` file, or a GGUF file.

    Raises:
        ModelFileError: ``source`` is none of these, is damaged, or a part of it is missing.
    """
    path = Path(source)
    if path.is_dir():
        path = _in_folder(path, part or "transformer")
    if not path.is_file():
        raise ModelFileError(
            source, found="no such file", expected="a checkpoint", advice="Check the path and its spelling."
        )
    name = path.name.lower()
    if name.endswith(".gguf"):
        return GGUFCheckpoint(str(path))
    if name.endswith((".ckpt", ".pt", ".pth", ".bin")):
        return ScaledFP8Checkpoint(TorchCheckpoint(str(path)))
    if name.endswith((".safetensors", ".sft")):
        path = _index_of_shard(path)
    elif not re.search(r"\.safetensors\.index(\.\w+)?\.json$", name):
        raise ModelFileError(
            path,
            found=f"the ending {path.suffix!r}",
            expected=".safetensors, .safetensors.index.json, .gguf, .ckpt, .pt, .pth, .bin, or a diffusers folder",
            advice="Give the file the ending of its format, or choose another file.",
        )
    return ScaledFP8Checkpoint(SafetensorsCheckpoint(str(path)))


def swap_halves(rows: torch.Tensor) -> torch.Tensor:
    """The second half of the rows first."""
    return torch.cat(rows.chunk(2)[::-1])


def _in_folder(folder: Path, part: str) -> Path:
    """The one checkpoint of a diffusers model folder, or of the folder in it that is called like the part."""
    if (folder / part).is_dir():
        folder = folder / part
    for pattern in ("*.safetensors.index*.json", "*.safetensors", "*.bin"):
        candidates = sorted(folder.glob(pattern))
        # beside variants (diffusion_pytorch_model.fp16.safetensors), the plain one
        ending = pattern.replace("*", "")
        plain = [path for path in candidates if path.name in (f"diffusion_pytorch_model{ending}", f"model{ending}")]
        if len(candidates) == 1 or plain:
            return plain[0] if plain else candidates[0]
        if candidates:
            _index_of_shard(candidates[0])  # says so, if they are parts without their index
            raise ModelFileError(
                folder,
                found=f"several checkpoints: {', '.join(path.name for path in candidates)}",
                expected="one",
                advice="Name the file to be converted.",
            )
    raise ModelFileError(
        folder,
        found="a folder without a safetensors or .bin file",
        expected="a diffusers model folder, or its transformer or text_encoder folder",
        advice="Choose the folder that has model_index.json, or the checkpoint file itself.",
    )


def _index_of_shard(path: Path) -> Path:
    """The index of the checkpoint that a file is a part of; of a whole one the file itself."""
    shard = _SHARD.fullmatch(path.name)
    if not shard:
        return path
    model, variant = shard["model"], shard["variant"] or ""
    names = (
        f"{model}.safetensors.index{variant or shard['older'] or ''}.json",
        f"{model}{variant}.safetensors.index.json",  # a point in the model's own name
    )
    index = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if index is None and int(shard["count"]) == 1:
        return path
    if index is None:
        raise ModelFileError(
            path,
            found=f"part {int(shard['number'])} of {int(shard['count'])}, and no index of the parts",
            expected=f"{names[0]} beside it",
            advice="Download the index and all parts into one folder.",
        )
    return index


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


class TorchCheckpoint(Checkpoint):
    """A ``torch.save`` file, its state dict plain or under ``state_dict`` or ``model``; no code in it is run."""

    def __init__(self, path: str):
        self.path = path
        self.files = (path,)
        self.metadata = {}
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ModelFileError(
                path,
                found=f"what torch.load refuses ({str(error).splitlines()[0]})",
                expected="a torch.save file of tensors alone, complete, written by torch 1.6 or newer",
                advice="Download it again, or get it as safetensors.",
            ) from error
        except ValueError as error:  # an empty file cannot be mapped
            raise ModelFileError(
                path, found="an empty file", expected="a torch.save file", advice="Download it again."
            ) from error
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        tensors = content.items() if isinstance(content, dict) else ()
        self._tensors = {name: t for name, t in tensors if isinstance(name, str) and isinstance(t, torch.Tensor)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


class GGUFCheckpoint(Checkpoint):
    """A GGUF file; its packed tensors are dequantized to float32."""

    def __init__(self, path: str):
        self.path = path
        self.files = (path,)
        self._file = open_gguf(path)
        self.metadata = self._file.metadata
        self.shapes = self._file.shapes

    def dtype(self, name: str) -> torch.dtype:
        return GGUF_DTYPES.get(self._file.tensors[name].type.name, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        info = self._file.tensors[name]
        tensor = torch.empty(info.shape, dtype=self.dtype(name))
        columns = info.shape[-1]
        step = max(1, TILE // columns)
        for rows, out in zip(self._rows(info).split(step), tensor.reshape(-1, columns).split(step), strict=True):
            out.copy_(info.type.dequantize(rows, out.dtype))
        return tensor

    def packed(self, name: str) -> tuple[QuantType, torch.Tensor] | None:
        info = self._file.tensors[name]
        if info.type.block_size == 1:
            return None
        return info.type, self._rows(info)

    def _rows(self, info: TensorInfo) -> torch.Tensor:
        return self._file.packed(info.name).reshape(-1, info.type.row_bytes(info.shape[-1]))


class ScaledFP8Checkpoint(Checkpoint):
    """Another checkpoint, its scaled fp8 weights multiplied by their scales.

    A weight with a scale is read as float32, ``fp8 · scale``, with the scale of the whole tensor (ComfyUI's
    ``float8_e4m3fn`` and ``float8_e5m2`` formats). Scales and their companions are not among ``shapes``.
    """

    def __init__(self, inner: Checkpoint):
        self._inner = inner
        other = next((name for name in inner.shapes if name.endswith(OTHER_COMPANIONS)), None)
        if other:
            raise ModelFileError(
                inner.path,
                found=f"weights in another quantized format than fp8 ({other})",
                expected="bfloat16, float16, float32 or fp8 with one scale a weight",
                advice="Convert the original checkpoint instead.",
            )
        self.path, self.files, self.metadata = inner.path, inner.files, inner.metadata
        self._scales = {
            name.removesuffix(ending) + ".weight": name
            for name in inner.shapes
            for ending in WEIGHT_SCALES
            if name.endswith(ending)
        }
        hidden = {*self._scales.values(), *(name for name in inner.shapes if name.endswith(FP8_COMPANIONS))}
        self.shapes = {name: shape for name, shape in inner.shapes.items() if name not in hidden}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._scales else self._inner.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._inner.read(name)
        if not tensor.dtype.is_floating_point:
            raise ModelFileError(
                self.path,
                found=f"{name} as {tensor.dtype}",
                expected="floating-point weights",
                advice="Convert the original checkpoint (bfloat16, float16, float32 or fp8) instead.",
            )
        if name not in self._scales:
            return tensor
        scale = self._inner.read(self._scales[name]).float()
        if scale.numel() != 1:
            raise ModelFileError(
                self.path,
                found=f"{self._scales[name]} of shape {tuple(scale.shape)}",
                expected="one scale for the whole tensor",
                advice="Convert the original checkpoint (bfloat16, float16, float32 or plain fp8) instead.",
            )
        return tensor.float().mul_(scale.reshape(()))
