"""Float32 to a type's blocks, byte by byte as ggml packs them: by libgguf, or by our own C where that is faster."""

from __future__ import annotations

import numpy as np
import torch

try:
    import libgguf
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Making GGUF files needs ggml's quantizers: pip install libgguf", name="libgguf"
    ) from error

from ..loader.kernels import native
from ..loader.kernels.tiles import in_tiles
from ..loader.quant_types.base import QuantType

IN_C = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), "quantize_q.c"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), "quantize_k.c"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), "quantize_iq4.c"),
}
ROWS = 128  # that a thread takes at a time


def quantize(rows: torch.Tensor, quant_type: QuantType, moments: np.ndarray | None = None) -> np.ndarray:
    """``(rows, columns) float32`` → ``(rows, row_bytes) uint8``, as ggml packs them.

    Args:
        rows: finite numbers that ``quant_type`` can hold.
        quant_type: the type.
        moments: ``(columns,) float32``, the mean square of what each column is multiplied with.
    """
    rows = rows.contiguous()
    n_rows, columns = rows.shape
    packed = np.empty((n_rows, quant_type.row_bytes(columns)), dtype=np.uint8)
    source = IN_C.get(quant_type.name)
    in_c = native.function(source, f"quantize_{quant_type.name.lower()}") if source else None
    if in_c is None:
        libgguf.quantize_rows_into_raw(quant_type.id, rows.numpy(), packed, n_rows, columns, moments)
        return packed

    moments = None if moments is None else np.ascontiguousarray(moments, np.float32)
    importance = None if moments is None else moments.ctypes.data

    rows_at, packed_at = rows.data_ptr(), packed.ctypes.data
    row_bytes, packed_bytes = rows.element_size() * columns, packed.shape[1]

    def quantize_tile(start: int, stop: int) -> None:
        in_c(rows_at + start * row_bytes, importance, packed_at + start * packed_bytes, stop - start, columns)

    in_tiles(quantize_tile, n_rows, ROWS)
    return packed
