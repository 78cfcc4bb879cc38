"""Dequantizing one weight on a CPU, in the ways that there are, beside a plain copy of as many bytes.

A rate is the bytes that are read and written, packed and float32, in a second. Each way gets all the threads that it
can use; a copy of both sizes together shows what the machine's memory gives.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import gguf
import libgguf
import numpy as np
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions, dequantize_gguf_tensor

from ..loader.kernels import cpu
from ..loader.quant_types import QUANT_TYPES, QuantType
from .measure import seconds

ROWS, COLUMNS = 8192, 3072
SETTING_TEXT = f"a weight of {ROWS} × {COLUMNS} to float32; GB read and written in a second"
RUNS = 3


@torch.inference_mode()
def measure(types: tuple[str, ...], runs: int = RUNS) -> list[dict]:
    """One row a type: ``copy``, ``pack``, ``libgguf``, ``gguf-py`` and ``diffusers`` in GB/s, None where it cannot.

    ``pack`` is what a linear does: tile by tile, into memory that is reused. The others return a new array.
    """
    rows = []
    for type_name in types:
        rows.append({"type": type_name, **_rates(QUANT_TYPES[type_name], runs)})
        print("  ".join(f"{name} {value:.1f}" if name != "type" else f"{value:8}" for name, value in rows[-1].items()
                        if value is not None), flush=True)
    return rows


def _rates(quant_type: QuantType, runs: int) -> dict[str, float | None]:
    packed = _packed(quant_type)
    moved = packed.nbytes + 4 * ROWS * COLUMNS
    source, target = torch.zeros(moved // 2, dtype=torch.uint8), torch.zeros(moved // 2, dtype=torch.uint8)
    ways: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    ways["pack"] = lambda: cpu.dequantize_in_tiles(packed, quant_type)
    number = gguf.GGMLQuantizationType(quant_type.id)
    if quant_type.block_size > 1:
        ways["libgguf"] = lambda: libgguf.dequantize_rows(packed.numpy(), quant_type.id)
    ways["gguf-py"] = lambda: gguf.quants.dequantize(packed.numpy(), number)
    if number in dequantize_functions:
        parameter = GGUFParameter(packed, quant_type=number)
        ways["diffusers"] = lambda: dequantize_gguf_tensor(parameter)
    return {name: moved / 1e9 / _median(way, runs) for name, way in ways.items()}
