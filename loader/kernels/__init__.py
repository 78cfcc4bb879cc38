"""A packed weight dequantized, or its matrix product, in the way that suits the device."""

from __future__ import annotations

import torch

from ..quant_types import QuantType
from . import cpu, gpu


def packed_linear(
    input: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``input @ dequantize(packed).T + bias``.

    Args:
        input: ``(…, in_features)``, float32, bfloat16 or float16; its dtype is the compute type.
        packed: ``(out_features, row_bytes) uint8`` on ``input``'s device.
        quant_type: the type of ``packed``.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(…, out_features)`` in ``input``'s dtype.
    """
    if input.device.type == "cpu":
        return cpu.linear(input, packed, quant_type, bias)
    return gpu.linear(input, packed, quant_type, bias)


def dequantize(packed: torch.Tensor, quant_type: QuantType, dtype: torch.dtype) -> torch.Tensor:
    """``QuantType.dequantize`` of ``(rows, row_bytes) uint8``, in the way that suits the device; the same bits."""
    if packed.device.type == "cpu":
        return cpu.dequantize(packed, quant_type, dtype)
    return gpu.dequantize(packed, quant_type, dtype)
