"""The matrix product on a CPU: every thread takes tiles of rows, dequantizes and multiplies them for itself.

A dense copy of a whole weight costs more in page faults than its dequantization; a tile that is made once and kept
costs none. Threads that share no product do not wait for each other at its end either. Our own C dequantizes where it
is compiled, straight into the dtype of the product; else libgguf does where it is installed, or torch: the same
numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from ..quant_types import STORED_DTYPES, QuantType
from ..quant_types.grids import grid
from . import native
from .tiles import in_tiles, tile

# Bytes of a thread's tile that is only passed on: small enough for its core's cache.
TILE_BYTES = 4 * 2**20

# Bytes of one that is multiplied. Each product takes its input apart anew: the fewer rows a tile has, the more often.
# On an EPYC, 4 MB take up to 1.35 times the dense product, 16 MB and more 0.89 to 1.08; on a Xeon with AVX-512, 4 MB
# 1.13 to 1.23 times, 16 MB and more 0.97 to 1.11. The numbers are the same.
PRODUCT_TILE_BYTES = 24 * 2**20
ALL_PRODUCT_TILES_BYTES = 128 * 2**20  # of all threads that work for a caller

PAGE, CACHE_LINE = 4096, 64  # bytes

LOW_RANK_ROWS = 256  # of input that a thread takes at a time beside a weight

# Which source has a type, and what its functions' names end in for a dtype.
IN_C = {
    **dict.fromkeys(("Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"), "dequantize_q.c"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), "dequantize_k.c"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"), "dequantize_values.c"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "dequantize_iq.c"),
}
SUFFIXES = {torch.float32: "", torch.bfloat16: "_bf16", torch.float16: "_f16"}


def linear(input: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, bias: torch.Tensor | None) -> torch.Tensor:
    """``input @ dequantize(packed).T + bias`` without a dense copy of the weight.

    Args:
        input: ``(…, in_features)``, any float dtype.
        packed: ``(out_features, row_bytes) uint8``, rows contiguous.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(…, out_features)`` in ``input``'s dtype, in memory as `new_product`'s.
    """
    if STORED_DTYPES.get(quant_type.name) == input.dtype:
        return torch.nn.functional.linear(input, packed.view(input.dtype), bias)
    product = new_product(input, packed.shape[0])
    x = input.reshape(-1, input.shape[-1])
    out = product.view(len(x), packed.shape[0])

    def multiply(start: int, stop: int, weights: torch.Tensor) -> None:
        torch.mm(x, weights.t(), out=out[:, start:stop])

    in_dequantized_tiles(multiply, packed, quant_type, x.dtype, product_tile_bytes())
    if bias is not None:
        out += bias
    return product


def new_product(input: torch.Tensor, columns: int) -> torch.Tensor:
    """Memory for a product of ``input`` ``(…, in_features)``: ``(…, columns)``, of one dtype and device.

    Rows whole pages apart, as AuraFlow's are, all fall into a few places of a core's cache, and a product writes to
    many at a time. So they are a cache line further apart, which takes some 5 % off the products of the MLP.
    """
    size = input.dtype.itemsize
    apart = columns if columns * size % PAGE else columns + CACHE_LINE // size
    return input.new_empty(*input.shape[:-1], apart)[..., :columns]


def add_low_rank(output: torch.Tensor, input: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> None:
    """``output += input @ down.T @ up.T``, in one pass over the tokens: what is between stays in a core's cache.

    Args:
        output: ``(…, out_features)``, contiguous or as `new_product` gives it.
        input: ``(…, in_features)``.
        down, up: ``(rank, in_features)`` and ``(out_features, rank)``.
    """
    x, out = input.reshape(-1, input.shape[-1]), output.view(-1, output.shape[-1])

    def add(start: int, stop: int) -> None:
        out[start:stop].addmm_(x[start:stop] @ down.t(), up.t())

    in_tiles(add, len(x), LOW_RANK_ROWS)


def input_gradient(gradient: torch.Tensor, packed: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """``gradient @ dequantize(packed)``, the gradient of `linear`'s input, without a dense copy of the weight.

    Args:
        gradient: ``(…, out_features)``, any float dtype; of `linear`'s output.
        packed: ``(out_features, row_bytes) uint8``.

    Returns:
        ``(…, in_features)`` in ``gradient``'s dtype.
    """
    if STORED_DTYPES.get(quant_type.name) == gradient.dtype:
        return gradient @ packed.view(gradient.dtype)
    rows, size, nbytes = packed.shape[0], quant_type.block_size, quant_type.type_size
    blocks = packed.shape[1] // nbytes
    columns = blocks * size
    g = gradient.reshape(-1, rows)
    out = g.new_empty(g.shape[0], columns)
    dequantize_into = row_dequantizer(quant_type, g.dtype)

    def multiply(start: int, stop: int) -> None:  # some blocks of every row: no two tiles add to the same numbers
        weights = tile(rows * (stop - start) * size, g.dtype).view(rows, -1)
        dequantize_into(packed[:, start * nbytes : stop * nbytes].contiguous(), weights)
        torch.mm(g, weights, out=out[:, start * size : stop * size])

    in_tiles(multiply, blocks, product_tile_bytes() // (g.dtype.itemsize * rows * size))
    return out.view(*gradient.shape[:-1], columns)


def dequantize(packed: torch.Tensor, quant_type: QuantType, dtype: torch.dtype) -> torch.Tensor:
    """``QuantType.dequantize``, bit by bit the same, on every core.

    Args:
        packed: ``(rows, row_bytes) uint8``, rows contiguous.
        dtype: any float dtype.

    Returns:
        ``(rows, columns)``; F32 as float32 shares ``packed``'s memory.
    """
    if quant_type.name == "F32" and dtype == torch.float32:
        return quant_type.dequantize(packed, dtype)
    rows = packed.shape[0]
    columns = quant_type.columns(packed.shape[1])
    out = in_large_pages(rows, columns, dtype)
    dequantize_into = row_dequantizer(quant_type, dtype)

    def unpack(start: int, stop: int) -> None:
        dequantize_into(packed[start:stop], out[start:stop])

    in_tiles(unpack, rows, TILE_BYTES // (4 * columns))
    return out


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


def in_large_pages(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a dense weight or a product; numpy asks Linux for large pages, which it can fill in a quarter of the
    time."""
    if rows == 0:  # which torch does not take from numpy as another dtype
        return torch.empty(0, columns, dtype=dtype, device="cpu")
    return torch.from_numpy(np.empty((rows, columns * dtype.itemsize), dtype=np.uint8)).view(dtype)


def product_tile_bytes() -> int:
    """Bytes that a thread may keep for a product."""
    return min(PRODUCT_TILE_BYTES, ALL_PRODUCT_TILES_BYTES // torch.get_num_threads())


def in_dequantized_tiles(
    work: Callable[[int, int, torch.Tensor], object],
    packed: torch.Tensor,
    quant_type: QuantType,
    dtype: torch.dtype = torch.float32,
    tile_bytes: int | None = None,
) -> None:
    """Calls ``work(start, stop, weights)`` for tiles of rows, as `in_tiles` does.

    Args:
        work: may change ``weights``, ``(stop - start, columns)``, which are the thread's, and not keep them.
        packed: ``(rows, row_bytes) uint8``, rows contiguous.
        dtype: of ``weights``.
        tile_bytes: of ``weights``, at most, but for a single row; None for `TILE_BYTES`.
    """
    columns = quant_type.columns(packed.shape[1])
    dequantize_into = row_dequantizer(quant_type, dtype)

    def take(start: int, stop: int) -> None:
        weights = tile((stop - start) * columns, dtype).view(-1, columns)
        dequantize_into(packed[start:stop], weights)
        work(start, stop, weights)

    in_tiles(take, packed.shape[0], (tile_bytes or TILE_BYTES) // (dtype.itemsize * columns))
