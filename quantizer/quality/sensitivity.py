"""What each group of weights costs and buys: the error of the model's output when that group alone is quantized."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import mean

import numpy as np
import torch

from ...loader.files.auraflow import AURAFLOW
from ...loader.quant_types import QUANT_TYPES
from ...loader.quant_types.base import QuantType
from ...loader.weights.layout import is_packed, pack
from ..quantize import quantize
from .evaluation import Inputs, relative_error, transformer

# By native name; the first pattern that fits decides.
GROUPS = {
    "attention q, k, v": "*_layers.*.attn.w[12][qkv].weight",
    "attention output": "*_layers.*.attn.w[12]o.weight",
    "MLP c_fc1, c_fc2": "*_layers.*.mlp*.c_fc[12].weight",
    "MLP c_proj": "*_layers.*.mlp*.c_proj.weight",
    "modulation": "*_layers.*.mod*.weight",
    "embedders, output": "*.weight",
}
ALL = "all layers"


@dataclass(frozen=True)
class Sensitivity:
    """A group of weights, quantized alone.

    Attributes:
        group: a key of `GROUPS`, or `ALL` for everything in the layers at once.
        weights: how many there are.
        errors: by type, the relative error of the output, averaged over the timesteps.
        nbytes: by type, what the group takes.
    """

    group: str
    weights: int
    errors: dict[str, float]
    nbytes: dict[str, int]


def sensitivity(
    path: str | os.PathLike,
    type_names: Sequence[str],
    inputs: Inputs,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """Measure a checkpoint's groups of weights, each at each type.

    Args:
        path: what `open_checkpoint` takes, at best in 16 or 32 bit: errors are relative to its own output.
        type_names: names among `QUANT_TYPES` that need no importance matrix.
        inputs: what the transformer is run on.
        progress: called with the number of measurements made and of all.

    Raises:
        ModelFileError: ``path`` is no sound checkpoint of AuraFlow.
    """
    with transformer(path, inputs) as model:
        groups = _groups(model)
        reference = inputs.outputs(model)
        rows, done = [], 0
        for group, linears in groups.items():
            row = Sensitivity(group, sum(linear.weight.numel() for linear in linears), {}, {})
            for type_name in type_names:
                with quantized(linears, QUANT_TYPES[type_name]) as nbytes:
                    pairs = zip(inputs.outputs(model), reference, strict=True)
                    row.errors[type_name] = mean(relative_error(*pair) for pair in pairs)
                row.nbytes[type_name] = nbytes
                done += 1
                if progress:
                    progress(done, len(groups) * len(type_names))
            rows.append(row)
        return rows


def _groups(model: torch.nn.Module) -> dict[str, list[torch.nn.Linear]]:
    groups: dict[str, list[torch.nn.Linear]] = {group: [] for group in GROUPS}
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            native = AURAFLOW.spell(f"{name}.weight", "native")
            groups[next(group for group, pattern in GROUPS.items() if fnmatchcase(native, pattern))].append(module)
            if "_layers." in native:
                layers.append(module)
    return groups | {ALL: layers}


@contextmanager
def quantized(
    linears: Sequence[torch.nn.Linear], quant_type: QuantType, moments: Sequence[np.ndarray | None] | None = None
) -> Iterator[int]:
    """Quantize those whose rows are whole blocks, while the context lasts; gives the bytes of all.

    Args:
        linears: packed or dense.
        quant_type: the type.
        moments: of an importance matrix, for each linear; see `quantize`.
    """
    originals = [linear.weight for linear in linears]
    nbytes = 0
    try:
        for linear, its_moments in zip(linears, moments or [None] * len(linears), strict=True):
            if linear.in_features % quant_type.block_size == 0:
                weight = _requantize(linear.weight, quant_type, its_moments)
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            nbytes += linear.weight.nbytes
        yield nbytes
    finally:
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight = weight


def _requantize(weight: torch.Tensor, quant_type: QuantType, moments: np.ndarray | None) -> torch.Tensor:
    dense = weight.dequantize() if is_packed(weight) else weight
    blocks = torch.from_numpy(quantize(dense.float().cpu(), quant_type, moments)).to(weight.device)
    return pack(blocks, quant_type.name, tuple(weight.shape), weight.dtype)
