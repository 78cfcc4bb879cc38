"""The product of tokens with a weight in C of our own, which dequantizes it while it lays it out.

Torch multiplies in MKL and oneDNN, which are Intel's. On AMD's processors MKL makes about three quarters of the float32
products that a core could, and this nine tenths; of those of bfloat16 it makes 3 to 7 % more than oneDNN, both with a
dense weight. On others torch multiplies: on Intel's the two have not been compared, and AMX, which in bfloat16 is a
multiple of AVX-512, is not used here.
"""

from __future__ import annotations

import ctypes

import torch

from ..quant_types import STORED_DTYPES, QuantType
from . import native, processor
from .dequantizers import dequantizer_in_c, row_dequantizer
from .tiles import in_tiles, tile

NAMES = {torch.float32: "multiply", torch.bfloat16: "multiply_bf16"}

# As in multiply.c: most rows of a group; words of a part of the columns, and of a row that are dequantized at a time;
# tokens that are multiplied at a time. A panel of rows is of 24 or 48.
GROUPS = {torch.float32: 384, torch.bfloat16: 192}
DEPTHS, CHUNK = {torch.float32: 256, torch.bfloat16: 1536}, 256
SIDE, PANEL = 8, 48

TILE_ROWS = 384  # that a thread takes at a time
TOKENS = 2048  # most that are multiplied with a weight before it is dequantized anew for others


def multiplies(input: torch.Tensor) -> bool:
    """Whether `multiply` is the faster one for this input ``(tokens, columns)``."""
    return processor.made_by_amd() and can_multiply(input)


def can_multiply(input: torch.Tensor) -> bool:
    """Whether `multiply` takes this input at all: float32, or bfloat16 where the processor has products of it."""
    in_words = input.numel() > 0 and input.shape[1] * input.element_size() % 4 == 0 and input.stride(1) == 1
    return in_words and _in_c(input.dtype) is not None


def multiply(input: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, out: torch.Tensor) -> None:
    """``out = input @ dequantize(packed).T``, with sums in float32.

    The bits of a token's product depend neither on other tokens nor on other rows, nor on the threads. Torch takes sums
    in another order: with normal weights, both are 3e-7 from the exact product in float32, and 1.7e-3 in bfloat16.

    Args:
        input: ``(tokens, columns)``, for which `can_multiply`.
        packed: ``(rows, row_bytes) uint8``, rows contiguous.
        out: ``(tokens, rows)`` of ``input``'s dtype, tokens contiguous.
    """
    parts = -(-len(input) // TOKENS)
    for some, to in zip(input.tensor_split(parts), out.tensor_split(parts), strict=True):
        _multiply_with(some, packed, quant_type, to)


def _multiply_with(input: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, out: torch.Tensor) -> None:
    dtype, columns = out.dtype, quant_type.columns(packed.shape[1])
    product = _in_c(dtype)
    dequantizer, grid = dequantizer_in_c(quant_type, dtype) or (None, None)
    dequantizer_address = ctypes.cast(dequantizer, ctypes.c_void_p).value if dequantizer else None
    grid_address = None if grid is None else grid.data_ptr()
    is_dense = STORED_DTYPES.get(quant_type.name) == dtype

    def multiply_rows(start: int, stop: int) -> None:
        rows = packed[start:stop]
        if not is_dense and dequantizer is None:
            rows = tile(len(rows) * columns, dtype, "rows").view(-1, columns)
            row_dequantizer(quant_type, dtype)(packed[start:stop], rows)
        scratch = tile(scratch_words(dtype, len(input)), torch.int32, "scratch")
        product(
            *(input.data_ptr(), input.stride(0) * input.element_size(), len(input)),
            *(rows.data_ptr(), rows.stride(0) * rows.element_size()),
            *(dequantizer_address, grid_address, quant_type.type_size, quant_type.block_size),
            *(len(rows), columns, out[:, start:].data_ptr(), out.stride(0) * out.element_size(), scratch.data_ptr()),
        )

    in_tiles(multiply_rows, len(packed), TILE_ROWS, PANEL)


def scratch_words(dtype: torch.dtype, tokens: int) -> int:
    """The size of what a thread writes to meanwhile."""
    return SIDE * CHUNK + GROUPS[dtype] * (DEPTHS[dtype] + -(-tokens // SIDE) * SIDE)


def _in_c(dtype: torch.dtype) -> native.Function | None:
    return native.function("multiply.c", NAMES[dtype]) if dtype in NAMES else None
