"""The matrix product on a CPU: tiles of rows are dequantized into one small buffer and multiplied at once.

A dense copy of a whole weight costs more in page faults than its dequantization; a tile that stays in the
cache costs neither. libgguf dequantizes where it is installed, torch where it is not: the same numbers.
"""

from __future__ import annotations

import functools
import threading

import torch

from ..quant_types import QuantType

# Bytes of the float32 tile. Each tile's product ends with its threads waiting for each other, which is dear on a
# busy machine, so a tile is no smaller than the cache asks for.
TILE_BYTES = 8 * 1024 * 1024

_local = threading.local()


def linear(input: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, bias: torch.Tensor | None) -> torch.Tensor:
    """``input @ dequantize(packed).T + bias`` without a dense copy of the weight.

    Args:
        input: ``(…, in_features)``, any float dtype.
        packed: ``(out_features, row_bytes) uint8``, rows contiguous.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(…, out_features)`` in ``input``'s dtype.
    """
    columns = input.shape[-1]
    rows = packed.shape[0]
    x = input.reshape(-1, columns)
    out = x.new_empty(x.shape[0], rows)
    tile_rows = max(1, min(rows, TILE_BYTES // (4 * columns)))
    tile = _tile(tile_rows * columns).view(tile_rows, columns)
    dequantize_into = row_dequantizer(quant_type)
    for start in range(0, rows, tile_rows):
        stop = min(start + tile_rows, rows)
        weights = tile[: stop - start]
        dequantize_into(packed[start:stop], weights)
        torch.mm(x, weights.to(x.dtype).t(), out=out[:, start:stop])
    if bias is not None:
        out += bias
    return out.view(*input.shape[:-1], rows)


@functools.cache
def row_dequantizer(quant_type: QuantType):
    """The fastest ``(packed rows uint8, float32 rows) -> None`` for a type: libgguf's, or torch's."""
    libgguf = _libgguf()
    if libgguf is None or quant_type.block_size == 1 or not libgguf.row_size(quant_type.id, quant_type.block_size):
        return functools.partial(_dequantize_with_torch, quant_type)

    def dequantize_with_libgguf(packed: torch.Tensor, out: torch.Tensor) -> None:
        # As one long row: libgguf starts threads by rows, which would fight with torch's for the cores.
        libgguf.dequantize_rows_into_raw(quant_type.id, packed.numpy(), out.numpy(), 1, out.numel())

    return dequantize_with_libgguf


def _dequantize_with_torch(quant_type: QuantType, packed: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(quant_type.dequantize(packed))


@functools.cache
def _libgguf():
    try:
        import libgguf
    except ImportError:
        return None
    return libgguf


def _tile(elements: int) -> torch.Tensor:
    """This thread's float32 buffer of at least ``elements``, made once and kept."""
    tile = getattr(_local, "tile", None)
    if tile is None or tile.numel() < elements:
        with torch.inference_mode(False):  # so that it can be written in every mode
            tile = _local.tile = torch.empty(elements, dtype=torch.float32)
    return tile[:elements]
