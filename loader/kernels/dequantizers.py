"""What dequantizes rows on a CPU: our own C where it is compiled, straight into the dtype that is asked for.

Else libgguf does where it is installed, or torch: the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..quant_types import STORED_DTYPES, QuantType
from ..quant_types.grids import grid
from . import native
from .tiles import tile

# Which source has a type, and what its functions' names end in for a dtype.
IN_C = {
    **dict.fromkeys(("Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"), "dequantize_q.c"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), "dequantize_k.c"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"), "dequantize_values.c"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "dequantize_iq.c"),
}
SUFFIXES = {torch.float32: "", torch.bfloat16: "_bf16", torch.float16: "_f16"}


@functools.cache
def row_dequantizer(quant_type: QuantType, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """The fastest ``(packed rows uint8, rows of dtype) -> None`` for a type: in C, libgguf's, or one in torch."""
    if stored := STORED_DTYPES.get(quant_type.name):
        return lambda packed, out: out.copy_(packed.view(stored))
    if in_c := _row_dequantizer_in_c(quant_type, dtype):
        return in_c
    if dtype != torch.float32:
        into_float32 = row_dequantizer(quant_type, torch.float32)

        def dequantize_and_round(packed: torch.Tensor, out: torch.Tensor) -> None:
            values = tile(out.numel(), torch.float32).view(out.shape)
            into_float32(packed, values)
            out.copy_(values)

        return dequantize_and_round
    libgguf = _libgguf()
    if libgguf is None or not libgguf.row_size(quant_type.id, quant_type.block_size):
        return lambda packed, out: out.copy_(quant_type.dequantize(packed))

    def dequantize_with_libgguf(packed: torch.Tensor, out: torch.Tensor) -> None:
        # As one long row: libgguf starts threads by rows, which would fight with the others for the cores.
        libgguf.dequantize_rows_into_raw(quant_type.id, packed.numpy(), out.numpy(), 1, out.numel())

    return dequantize_with_libgguf


def _row_dequantizer_in_c(
    quant_type: QuantType, dtype: torch.dtype
) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    found = dequantizer_in_c(quant_type, dtype)
    if found is None:
        return None
    in_c, entries = found
    size, grid_address = quant_type.block_size, () if entries is None else (entries.data_ptr(),)
    return lambda packed, out: in_c(packed.data_ptr(), out.data_ptr(), out.numel() // size, *grid_address)


def dequantizer_in_c(quant_type: QuantType, dtype: torch.dtype) -> tuple[native.Function, torch.Tensor | None] | None:
    """The C that dequantizes a type into a dtype, and the grid that it takes last, if it takes one; None where there is
    no such C."""
    source, suffix = IN_C.get(quant_type.name), SUFFIXES.get(dtype)
    if source is None or suffix is None:
        return None
    in_c = native.function(source, f"dequantize_{quant_type.name.lower()}{suffix}")
    if in_c is None:
        return None
    if native.SOURCES[source] is not native.BLOCKS_AND_GRID:
        return in_c, None
    return in_c, grid("IQ1_S" if quant_type.name == "IQ1_M" else quant_type.name, torch.device("cpu"))


@functools.cache
def _libgguf():
    try:
        import libgguf
    except ImportError:
        return None
    return libgguf
