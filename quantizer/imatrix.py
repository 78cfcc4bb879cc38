"""Importance matrices: how large the inputs of each linear are, column by column, in llama.cpp's GGUF format.

The quantizers that take one minimise ``Σ_j m_j (w_j − ŵ_j)²`` over a row, with ``m_j`` the mean square of the linear's
``j``-th input: the error of the output, for inputs that are not correlated. The file (llama.cpp's
``tools/imatrix/imatrix.cpp``) holds for the weight ``<name>``::

    <name>.in_sum2   float32 (1, columns)   Σ x_j² over all rows x that entered the linear
    <name>.counts    float32 (1, 1)         the number of these rows

with the metadata ``general.type = "imatrix"``, ``imatrix.datasets`` (strings that say where the inputs came from),
``imatrix.chunk_count`` and ``imatrix.chunk_size`` (rows of a chunk). Names are native ones, with ``.weight``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from ..loader.files.errors import ModelFileError
from ..loader.files.gguf_file import GGUFFile, open_gguf
from ..loader.quant_types import QUANT_TYPES
from .writer import TensorSpec, write_gguf

SUMS, COUNTS = ".in_sum2", ".counts"
ADVICE = "Collect one with the node Collect Importance for GGUF, from this model or one that it was fine-tuned from."


@dataclass
class ImportanceMatrix:
    """Sums of squares of linears' inputs.

    Attributes:
        sums: ``(columns,) float32`` by native name of the weight.
        counts: number of rows summed up, by the same names.
        datasets: where the rows came from.
        chunks: number of evaluations of the model.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Add the inputs ``(rows, columns)``, of any floating dtype, of the weight ``name``."""
        sums = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square_()
        if name in self.sums:
            sums += self.sums[name].to(sums.device)
        self.sums[name] = sums
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def moments(self, name: str) -> np.ndarray | None:
        """The mean squares ``(columns,) float32`` of the inputs of the weight ``name``; None when it has none."""
        if not self.counts.get(name):
            return None
        return (self.sums[name] / self.counts[name]).cpu().numpy()

    @contextmanager
    def collecting(self, model: torch.nn.Module) -> Iterator[None]:
        """Add what enters the linears of ``model``, whose names are native, as long as the context lasts."""

        def hook(name: str):
            def add(_, inputs: tuple[torch.Tensor, ...]) -> None:
                self.add(name, inputs[0].reshape(-1, inputs[0].shape[-1]))

            return add

        def count(*_) -> None:
            self.chunks += 1

        handles = [model.register_forward_pre_hook(count)]
        handles += [
            module.register_forward_pre_hook(hook(f"{name}.weight"))
            for name, module in model.named_modules()
            if hasattr(module, "in_features")  # ComfyUI's linears of quantized weights are no torch.nn.Linear
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def write_imatrix(target: str | os.PathLike, matrix: ImportanceMatrix, *, overwrite: bool = False) -> None:
    """Write ``matrix`` as a GGUF file; errors are those of `write_gguf`."""
    float32 = QUANT_TYPES["F32"]
    tensors, values = [], {}
    for name, sums in matrix.sums.items():
        for suffix, row in ((SUMS, sums.cpu().numpy()), (COUNTS, np.array([matrix.counts[name]], np.float32))):
            tensors.append(TensorSpec(name + suffix, (1, len(row)), float32))
            values[name + suffix] = row
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": matrix.datasets,
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": max(matrix.counts.values(), default=0) // max(matrix.chunks, 1),
    }
    write_gguf(target, metadata, tensors, lambda tensor: [memoryview(values[tensor.name])], overwrite=overwrite)


def read_imatrix(path: str | os.PathLike) -> ImportanceMatrix:
    """Read an importance matrix.

    Raises:
        ModelFileError: the file is no importance matrix, is damaged, or holds numbers that cannot be sums of squares.
    """
    file = open_gguf(path)
    pairs = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not pairs:
        raise _refused(path, "a GGUF file without sums of squares", "an importance matrix")
    matrix = ImportanceMatrix(
        datasets=[str(name) for name in file.metadata.get("imatrix.datasets", ())],
        chunks=int(file.metadata.get("imatrix.chunk_count", 0)),
    )
    for name in pairs:
        sums, counts = _numbers(file, name + SUMS), _numbers(file, name + COUNTS)
        if counts.numel() != 1:
            raise _refused(path, f"{counts.numel()} counts for {name}", "one, for a linear without experts")
        matrix.sums[name], matrix.counts[name] = sums, round(counts.item())
    return matrix


def _numbers(file: GGUFFile, name: str) -> torch.Tensor:
    info = file.tensors.get(name)
    if info is None or info.type.name != "F32":
        found = f"no {name}" if info is None else f"{name} as {info.type.name}"
        raise _refused(file.path, found, "sums and their counts in float32")
    numbers = file.packed(name).view(torch.float32)
    if not (torch.isfinite(numbers).all() and (numbers >= 0).all()):
        raise _refused(file.path, f"NaN, infinity or negative numbers in {name}", "sums of squares")
    return numbers


def check_imatrix(
    matrix: ImportanceMatrix, path: str | os.PathLike, columns: Mapping[str, int], required: Mapping[str, str]
) -> list[str]:
    """Check that ``matrix`` fits a model.

    Args:
        matrix: the matrix, read from ``path``.
        columns: the length of a row of each weight that is to be quantized, by native name.
        required: the names of those types among them that cannot be made without moments, by the weight's name.

    Returns:
        The weights of ``columns`` that ``matrix`` does not cover.

    Raises:
        ModelFileError: ``matrix`` is another model's, or lacks moments of a required weight.
    """
    for name, length in columns.items():
        if name in matrix.sums and len(matrix.sums[name]) != length:
            raise _refused(path, f"{len(matrix.sums[name])} sums for {name}", f"{length}, one for each column")
    missing = [name for name in columns if not matrix.counts.get(name)]
    if columns and len(missing) == len(columns):
        raise _refused(path, f"none of the model's weights, but {next(iter(matrix.sums))}", "AuraFlow's native names")
    for name in missing:
        if name in required:
            raise _refused(path, f"no moments for {name}", f"those that {required[name]} cannot be made without")
    return missing


def _refused(path: str | os.PathLike, found: str, expected: str) -> ModelFileError:
    return ModelFileError(path, found=found, expected=expected, advice=ADVICE)
