"""Dequantizing one weight on a CPU, in every way that there is, beside a plain copy of as many bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import gguf
import libgguf
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions, dequantize_gguf_tensor

from ..loader.kernels import cpu
from ..loader.quant_types import QUANT_TYPES, STORED_DTYPES, QuantType
from .measure import seconds

ROWS, COLUMNS = 8192, 3072
RUNS = 5
SETTING_TEXT = f"a weight of {ROWS} × {COLUMNS} to a new float32 array; GB read and written in a second, medians"


@torch.inference_mode()
def measure(types: tuple[str, ...]) -> list[dict]:
    """One row a type: GB/s by way, for the ways that the type has.

    ``copy`` moves as many bytes within arrays that are there already: it shows the machine's memory bandwidth.
    """
    rows = []
    for type_name in types:
        rates = _rates(QUANT_TYPES[type_name])
        rows.append({"type": type_name, **rates})
        print(f"{type_name:8}" + "".join(f"  {way} {rate:.1f}" for way, rate in rates.items()), flush=True)
    return rows


def _rates(quant_type: QuantType) -> dict[str, float]:
    packed = _packed(quant_type)
    moved = packed.nbytes + 4 * ROWS * COLUMNS
    source, target = torch.zeros(2, moved // 2, dtype=torch.uint8)
    number = gguf.GGMLQuantizationType(quant_type.id)
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "pack": lambda: cpu.dequantize(packed, quant_type, torch.float32),
        "gguf-py": lambda: gguf.quants.dequantize(packed.numpy(), number),
    }
    if quant_type.name not in STORED_DTYPES:
        ways["libgguf"] = lambda: libgguf.dequantize_rows(packed.numpy(), quant_type.id)
    if number in dequantize_functions:
        parameter = GGUFParameter(packed, quant_type=number)
        ways["diffusers"] = lambda: dequantize_gguf_tensor(parameter)
    return {way: moved / 1e9 / _median_seconds(run) for way, run in ways.items()}


def _median_seconds(run: Callable[[], object]) -> float:
    run()
    return statistics.median(seconds(run) for _ in range(RUNS))


def _packed(quant_type: QuantType) -> torch.Tensor:
    """``(ROWS, row_bytes) uint8`` of normally distributed weights; the same few rows again and again."""
    rows = torch.randn(256, COLUMNS, generator=torch.Generator().manual_seed(0))
    if stored := STORED_DTYPES.get(quant_type.name):
        packed = rows.to(stored).view(torch.uint8)
    else:
        packed = torch.from_numpy(libgguf.quantize_rows(rows.numpy(), quant_type.id))
    return packed.repeat(ROWS // len(packed), 1)
