"""What a quantization type is: a name, ggml's number for it, the sizes of its block and its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantType:
    """One of ggml's tensor types.

    Attributes:
        name: ggml's name, e.g. ``"Q4_K"``.
        id: ggml's ``enum ggml_type`` value, as stored in a GGUF tensor table.
        block_size: number of weights in a block; a row is a whole number of blocks.
        type_size: bytes of a packed block.
        dequantize_blocks: ``(n_blocks, type_size) uint8`` → ``(n_blocks, block_size) float32``
            on the same device, equal bit by bit to ggml's ``dequantize_row_*``.
    """

    name: str
    id: int
    block_size: int
    type_size: int
    dequantize_blocks: Callable[[torch.Tensor], torch.Tensor]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Bytes of a packed row of ``columns`` weights.

        Raises:
            ValueError: when the row is not a whole number of blocks.
        """
        blocks, rest = divmod(columns, self.block_size)
        if rest:
            raise ValueError(f"a row of {columns} is not a whole number of {self.name} blocks of {self.block_size}")
        return blocks * self.type_size

    def columns(self, row_bytes: int) -> int:
        """How many weights a packed row of whole blocks has: the inverse of `row_bytes`."""
        return row_bytes // self.type_size * self.block_size

    def dequantize(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Unpack rows of blocks.

        Args:
            packed: ``(…, row_bytes) uint8``, any device.
            dtype: a floating dtype of the result.

        Returns:
            ``(…, columns)`` on ``packed``'s device: the float32 value, rounded once to ``dtype``. F32 as float32
            shares ``packed``'s memory.
        """
        blocks = packed.reshape(-1, self.type_size)
        columns = self.columns(packed.shape[-1])
        return self.dequantize_blocks(blocks).to(dtype).reshape(*packed.shape[:-1], columns)
