"""Unquantized types: a block is one number, little-endian.

==== ========== =====================================================
type bytes      value
==== ========== =====================================================
F32  ``f32[1]`` itself; the result is a view of the packed bytes
F16  ``f16[1]`` itself
BF16 ``u16[1]`` the upper half of a float32's bits
F64  ``f64[1]`` rounded to float32
==== ========== =====================================================
"""

from __future__ import annotations

import torch

# Types that torch holds as they are, and converts in one pass or none.
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize_f32(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float32)


def dequantize_f16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float16).float()


def dequantize_bf16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.bfloat16).float()


def dequantize_f64(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float64).float()
