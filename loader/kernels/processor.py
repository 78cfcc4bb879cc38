"""What the processor multiplies in hardware, asked of torch."""

from __future__ import annotations

import platform

import torch


def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are faster than those of float32: AMX, AVX-512 BF16, or ARM's BF16."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
        return bool(supported())
    return _any("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def multiplies_int8() -> bool:
    """Whether products of int8 with sums in int32 are faster than those of float32: AMX, or AVX-512 VNNI."""
    return hasattr(torch, "_int_mm") and _any("_is_amx_tile_supported", "_is_vnni_supported")


def _any(*names: str) -> bool:
    """Whether one of ``torch.cpu``'s functions says so; older versions of torch lack some."""
    return any(getattr(torch.cpu, name, bool)() for name in names)
