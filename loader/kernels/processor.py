"""Whose the processor is, and what it multiplies in hardware, as torch says or shows."""

from __future__ import annotations

import functools
import platform
import timeit
from collections.abc import Callable
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
PROBED_ROWS, PROBED = 128, 1024  # rows of input, and rows and columns of the weight


@functools.cache
def made_by_amd() -> bool:
    """Whether the processor is AMD's, by its vendor string: as Linux and Windows have it, not elsewhere."""
    return "AuthenticAMD" in (CPUINFO.read_text() if CPUINFO.exists() else platform.processor())


def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are faster than those of float32: AMX, AVX-512 BF16, or ARM's BF16."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
        return bool(supported())
    return _any("_is_amx_tile_supported", "_is_avx512_bf16_supported")


@functools.cache
def multiplies_int8() -> bool:
    """Whether torch's products of int8 with sums in int32 are faster than those of float32.

    They take a fraction of the time with AMX or VNNI, and without them, or without a build of torch for them, a
    multiple. No function of torch tells which for all processors; so this makes some of each, once, which takes 0.2 s
    where int8 is slow.
    """
    x, weight = torch.ones(PROBED_ROWS, PROBED), torch.ones(PROBED, PROBED)
    x_int8, weight_int8 = x.to(torch.int8), weight.to(torch.int8)
    in_float32 = _least_seconds(lambda: x @ weight.t())
    try:
        return _least_seconds(lambda: torch._int_mm(x_int8, weight_int8.t())) < in_float32
    except (AttributeError, RuntimeError):  # older versions of torch have none, or none for CPUs
        return False


def _least_seconds(run: Callable[[], object]) -> float:
    """Wall time of the fastest of two runs, after one that may have to set something up."""
    run()
    return min(timeit.repeat(run, number=1, repeat=2))


def _any(*names: str) -> bool:
    """Whether one of ``torch.cpu``'s functions says so; older versions of torch lack some."""
    return any(getattr(torch.cpu, name, bool)() for name in names)
