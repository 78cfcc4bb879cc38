"""The matrix product on a CPU: every thread takes tiles of rows, dequantizes and multiplies them for itself.

A dense copy of a whole weight costs more in page faults than its dequantization; a tile that is made once and kept
costs none. Threads that share no product do not wait for each other at its end either. What multiplies is torch, or
our own C where that is faster.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..quant_types import STORED_DTYPES, QuantType
from . import multiply
from .dequantizers import row_dequantizer
from .tiles import in_tiles, tile

# Bytes of a thread's tile that is only passed on: small enough for its core's cache.
TILE_BYTES = 4 * 2**20

# Bytes of one that is multiplied. Each product takes its input apart anew: the fewer rows a tile has, the more often.
# On an EPYC, 4 MB take up to 1.35 times the dense product, 16 MB and more 0.89 to 1.08; on a Xeon with AVX-512, 4 MB
# 1.13 to 1.23 times, 16 MB and more 0.97 to 1.11. The numbers are the same.
PRODUCT_TILE_BYTES = 24 * 2**20
ALL_PRODUCT_TILES_BYTES = 128 * 2**20  # of all threads that work for a caller

PAGE, CACHE_LINE = 4096, 64  # bytes

MANY = 64  # tokens, rows and columns that pay for laying out a weight that need not be dequantized

LOW_RANK_ROWS = 256  # of input that a thread takes at a time beside a weight


def linear(input: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, bias: torch.Tensor | None) -> torch.Tensor:
    """``input @ dequantize(packed).T + bias`` without a dense copy of the weight.

    Args:
        input: ``(…, in_features)``, any float dtype.
        packed: ``(out_features, row_bytes) uint8``, rows contiguous.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(…, out_features)`` in ``input``'s dtype, in memory as `new_product`'s.
    """
    x, rows = input.reshape(-1, input.shape[-1]), packed.shape[0]
    is_dense = STORED_DTYPES.get(quant_type.name) == input.dtype
    in_our_c = multiply.multiplies(x) and (not is_dense or min(len(x), rows, x.shape[1]) >= MANY)
    if is_dense and not in_our_c:
        return torch.nn.functional.linear(input, packed.view(input.dtype), bias)
    product = input.new_empty(*input.shape[:-1], rows) if is_dense else new_product(input, rows)
    out = product.view(len(x), rows)
    if in_our_c:
        multiply.multiply(x, packed, quant_type, out)
    else:
        _multiply_in_torch(x, packed, quant_type, out)
    if bias is not None:
        out += bias
    return product


def _multiply_in_torch(x: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, out: torch.Tensor) -> None:
    def multiply_tile(start: int, stop: int, weights: torch.Tensor) -> None:
        torch.mm(x, weights.t(), out=out[:, start:stop])

    in_dequantized_tiles(multiply_tile, packed, quant_type, x.dtype, product_tile_bytes())


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
