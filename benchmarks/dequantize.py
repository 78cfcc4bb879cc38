"""Dequantizing one weight on a CPU, in every way that there is, beside a plain copy of as many bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import gguf
import libgguf
import numpy as np
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions, dequantize_gguf_tensor

from ..loader.kernels import cpu, dequantizers
from ..loader.kernels.tiles import in_tiles
from ..loader.quant_types import QUANT_TYPES, STORED_DTYPES, QuantType
from .measure import seconds

ROWS, COLUMNS = 8192, 3072
RUNS = 15
SETTING_TEXT = (
    f"a weight of {ROWS} × {COLUMNS} to float32; GB read and written in a second, medians of {RUNS} in turns; "
    "this pack and libgguf into an array that is there, diffusers and gguf-py into a new one, as they do"
)


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
    dense = torch.from_numpy(np.ones((ROWS, COLUMNS), np.float32))  # in large pages, where Linux has them
    dequantize_into = dequantizers.row_dequantizer(quant_type, torch.float32)

    def unpack(start: int, stop: int) -> None:
        dequantize_into(packed[start:stop], dense[start:stop])

    number = gguf.GGMLQuantizationType(quant_type.id)
    ways: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    if number in dequantize_functions:
        parameter = GGUFParameter(packed, quant_type=number)
        ways["diffusers"] = lambda: dequantize_gguf_tensor(parameter)
    # On one thread, and on libgguf's, before this pack: torch's, which diffusers uses, keep the cores afterwards.
    ways["gguf-py"] = lambda: gguf.quants.dequantize(packed.numpy(), number)
    if quant_type.name not in STORED_DTYPES:
        ways["libgguf"] = lambda: libgguf.dequantize_rows_into_raw(
            quant_type.id, packed.numpy(), dense.numpy(), ROWS, COLUMNS
        )
    ways["pack"] = lambda: in_tiles(unpack, ROWS, cpu.TILE_BYTES // dense[0].nbytes)
    taken = {way: [] for way in ways}
    for _ in range(RUNS):  # in turns: what new memory costs changes by the minute
        for way, run in ways.items():
            taken[way].append(seconds(run))
    return {way: moved / 1e9 / statistics.median(times) for way, times in taken.items()}


def _packed(quant_type: QuantType) -> torch.Tensor:
    """``(ROWS, row_bytes) uint8`` of normally distributed weights; the same few rows again and again."""
    rows = torch.randn(256, COLUMNS, generator=torch.Generator().manual_seed(0))
    if stored := STORED_DTYPES.get(quant_type.name):
        packed = rows.to(stored).view(torch.uint8)
    else:
        packed = torch.from_numpy(libgguf.quantize_rows(rows.numpy(), quant_type.id))
    return packed.repeat(ROWS // len(packed), 1)
