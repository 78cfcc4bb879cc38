"""What a checkpoint is to a conversion: named tensors, read one at a time."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from ...loader.quant_types.base import QuantType

FLOAT_TYPES = {torch.float64: "F32", torch.float32: "F32", torch.float16: "F16"}


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

    def exact_type(self, name: str) -> str:
        """The name of ggml's type that holds a tensor as it is: bfloat16 has all numbers of plain fp8. Float64, which
        nothing computes in, becomes float32."""
        stored = self.packed(name)
        return stored[0].name if stored else FLOAT_TYPES.get(self.dtype(name), "BF16")

    def fingerprint(self) -> str:
        """SHA-256, in hex, over the names, shapes and dtypes of all tensors and the text of the metadata."""
        table = [[name, list(shape), str(self.dtype(name))] for name, shape in self.shapes.items()]
        metadata = {key: value for key, value in self.metadata.items() if isinstance(value, (str, int, float))}
        return hashlib.sha256(json.dumps([table, metadata], sort_keys=True).encode()).hexdigest()


def swap_halves(rows: torch.Tensor) -> torch.Tensor:
    """The second half of the rows first."""
    return torch.cat(rows.chunk(2)[::-1])
