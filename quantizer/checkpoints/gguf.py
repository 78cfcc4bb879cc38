"""GGUF files as a source."""

from __future__ import annotations

import torch

from ...loader.files.gguf_file import TensorInfo, open_gguf
from ...loader.quant_types.base import QuantType
from .checkpoint import Checkpoint

GGUF_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TILE = 1 << 22  # weights of a GGUF file dequantized at a time


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
