"""The C dequantizers give the bits of the formulas in torch, whoever compiles them and for whichever processor."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from auraflow_gguf.loader.kernels import dequantizers, native
from auraflow_gguf.loader.kernels.native import build
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.loader.quant_types.grids import grid

from ...compiled import build_or_skip, built_with, clang_or_skip
from ..quant_types.blocks import NON_FINITE_SCALES, QUANTIZED, SCALES, random_blocks

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
BLOCKS = 263  # odd, and enough for every byte
UNTOUCHED = 7  # what stands behind the end


@pytest.fixture(scope="module", params=["compiled", "clang", "plain"])
def function(request, tmp_path_factory) -> Callable[[str, str], native.Function]:
    """``(source, name) -> function``: as `compile` made it, by clang, and without intrinsics."""
    compiler = clang_or_skip() if request.param == "clang" else build._compiler()
    if request.param != "clang":
        build_or_skip()
    if request.param == "compiled":
        return native.function
    options = ["-DPLAIN"] if request.param == "plain" else ["-march=native"]
    return built_with(compiler, options, tmp_path_factory.mktemp(request.param))


def assert_bits_of_the_formula(function, name: str, blocks: np.ndarray) -> None:
    quant_type, source = QUANT_TYPES[name], dequantizers.IN_C[name]
    packed = torch.from_numpy(blocks)
    tables = []
    if native.SOURCES[source] is native.BLOCKS_AND_GRID:
        entries = grid("IQ1_S" if name == "IQ1_M" else name, torch.device("cpu"))
        tables = [entries.data_ptr()]
    for dtype, bits in BITS.items():
        expected = quant_type.dequantize(packed.flatten(), dtype)
        buffer = torch.full((expected.numel() + 64,), UNTOUCHED, dtype=dtype)
        dequantize = function(source, f"dequantize_{name.lower()}{dequantizers.SUFFIXES[dtype]}")
        dequantize(packed.data_ptr(), buffer.data_ptr(), len(packed), *tables)
        ours = buffer[:-64]
        assert (buffer[-64:] == UNTOUCHED).all()
        assert torch.equal(ours.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(ours.view(bits)[numbers], expected.view(bits)[numbers])


def test_every_type_is_in_c():
    assert set(dequantizers.IN_C) == set(QUANTIZED)


@pytest.mark.parametrize("name", QUANTIZED)
def test_random_bytes(function, name):
    blocks = random_blocks(name, BLOCKS)
    if name in ("MXFP4", "NVFP4"):
        blocks[:, 0] = np.arange(BLOCKS) % 256
    for count in (BLOCKS, 1, 0):
        assert_bits_of_the_formula(function, name, blocks[:count])


@pytest.mark.parametrize("name", [*SCALES, "IQ1_M"])
def test_infinite_and_nan_scales(function, name):
    assert_bits_of_the_formula(function, name, random_blocks(name, 67, special=NON_FINITE_SCALES * 4))


def test_halves_end_where_they_end(function):
    """Below 65520 a number, as 1394 · 47, becomes the largest half, and from there on an infinite one."""
    blocks = np.zeros((3, QUANT_TYPES["Q8_0"].type_size), dtype=np.uint8)
    blocks[:, :2] = np.array([[2047], [1394], [1365]], dtype=np.float16).view(np.uint8)
    blocks[:, 2:5] = [32, 47, 48]
    halves = QUANT_TYPES["Q8_0"].dequantize(torch.from_numpy(blocks), torch.float16)
    assert halves[:, :3].diag().tolist() == [2047 * 32, 65504, torch.inf]
    assert_bits_of_the_formula(function, "Q8_0", blocks)
