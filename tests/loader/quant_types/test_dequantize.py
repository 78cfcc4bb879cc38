"""Dequantization against ggml's C (libgguf, and llama.cpp's library) and gguf-py, bit by bit."""

import gguf
import libgguf
import numpy as np
import pytest
import torch
from auraflow_gguf.loader.quant_types import QUANT_TYPES

from ... import ggml
from .blocks import FLOATS, NON_FINITE_SCALES, QUANTIZED, SCALES, random_blocks

IN_GGUF_PY = [name for name in QUANTIZED if name not in ("Q1_0", "Q2_0")]


def by_ggml(name, packed):
    if name == "Q2_0":  # is newer than libgguf
        return torch.from_numpy(ggml.load_or_skip().dequantize(np.ascontiguousarray(packed), QUANT_TYPES[name]))
    return torch.from_numpy(libgguf.dequantize_rows(packed, QUANT_TYPES[name].id))


def by_gguf_py(name, packed):
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name]))


def dequantize(name, packed, dtype=torch.float32):
    return QUANT_TYPES[name].dequantize(torch.from_numpy(packed), dtype)


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def assert_same_bits_but_nan(ours, theirs):
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert_same_bits(ours.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), theirs.where(~theirs.isnan(), 0.0))


@pytest.mark.parametrize("name", QUANTIZED)
def test_random_bytes_equal_ggml(name):
    packed = random_blocks(name, 2048)
    assert_same_bits(dequantize(name, packed), by_ggml(name, packed))


@pytest.mark.parametrize("name", IN_GGUF_PY)
def test_random_bytes_equal_gguf_py(name):
    packed = random_blocks(name, 512, seed=1)
    assert_same_bits(dequantize(name, packed), by_gguf_py(name, packed))


@pytest.mark.parametrize("name", [*SCALES, "IQ1_M"])
def test_infinite_and_nan_scales(name):
    packed = random_blocks(name, 64, special=NON_FINITE_SCALES * 4)
    ours = dequantize(name, packed)
    assert not ours.isfinite().all()
    assert_same_bits_but_nan(ours, by_ggml(name, packed))
    if name in IN_GGUF_PY:
        assert_same_bits_but_nan(ours, by_gguf_py(name, packed))


@pytest.mark.parametrize(("name", "scale_bytes"), [("MXFP4", 1), ("NVFP4", 4)])
def test_every_small_float_scale(name, scale_bytes):
    packed = random_blocks(name, 256)
    packed[:, :scale_bytes] = np.arange(256, dtype=np.uint8)[:, None]
    assert_same_bits(dequantize(name, packed), by_ggml(name, packed))
    assert_same_bits(dequantize(name, packed), by_gguf_py(name, packed))


# ggml needs several seconds before it can quantize to the other IQ1 and IQ2.
@pytest.mark.parametrize("name", [name for name in QUANTIZED if name not in ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S")])
def test_quantized_weights(name):
    weights = np.random.default_rng(2).normal(0, 0.02, (3, 512)).astype(np.float32)
    if name == "Q2_0":
        packed = ggml.load_or_skip().quantize(weights, QUANT_TYPES[name])
    else:
        packed = libgguf.quantize_rows(weights, QUANT_TYPES[name].id)
    ours = dequantize(name, packed)
    assert_same_bits(ours, by_ggml(name, packed))
    assert torch.corrcoef(torch.stack((ours.flatten(), torch.from_numpy(weights).flatten())))[0, 1] > 0.7


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (5, 3), (2, 3, 4), (0, 2)], ids=str)
def test_shapes(name, shape):
    entry = QUANT_TYPES[name]
    blocks = random_blocks(name, int(np.prod(shape)))
    packed = blocks.reshape(*shape[:-1], shape[-1] * entry.type_size)
    ours = dequantize(name, packed)
    assert ours.shape == (*shape[:-1], shape[-1] * entry.block_size)
    assert ours.is_contiguous()
    if blocks.size:
        assert_same_bits(ours.reshape(-1), by_ggml(name, blocks.reshape(-1)))


@pytest.mark.parametrize("name", QUANTIZED)
def test_slices_and_odd_offsets(name):
    entry = QUANT_TYPES[name]
    packed = random_blocks(name, 24).reshape(6, 4 * entry.type_size)
    expected = by_ggml(name, packed)
    rows = torch.from_numpy(packed)

    assert_same_bits(entry.dequantize(rows[::2]), expected[::2])
    assert_same_bits(entry.dequantize(rows[:, entry.type_size :]), expected[:, entry.block_size :].contiguous())
    assert_same_bits(entry.dequantize(rows[3:4, : entry.type_size]), expected[3:4, : entry.block_size].contiguous())
    shifted = torch.cat((torch.zeros(3, dtype=torch.uint8), rows.flatten()))[3:]
    assert_same_bits(entry.dequantize(shifted.view(6, -1)), expected)
    assert_same_bits(entry.dequantize(shifted[: entry.type_size]), expected[0, : entry.block_size])


@pytest.mark.parametrize("name", FLOATS)
def test_slices_of_floats(name):
    entry = QUANT_TYPES[name]
    rows = torch.from_numpy(random_blocks(name, 24).reshape(6, 4 * entry.type_size))
    expected = entry.dequantize(rows)
    assert_same_bits(entry.dequantize(rows[::2]), expected[::2])
    assert_same_bits(entry.dequantize(rows[:, entry.type_size :]), expected[:, 1:].contiguous())


@pytest.mark.parametrize("name", QUANT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_rounded_once(name, dtype):
    packed = random_blocks(name, 64)
    assert torch.equal(
        dequantize(name, packed, dtype).view(torch.int16), dequantize(name, packed).to(dtype).view(torch.int16)
    )


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_inference_mode_and_back(name):
    packed = random_blocks(name, 8)
    with torch.inference_mode():
        inside = dequantize(name, packed)
    assert_same_bits(inside, dequantize(name, packed))


def test_f32_is_itself():
    packed = np.random.default_rng(3).integers(0, 256, (5, 64), dtype=np.uint8)
    assert_same_bits(dequantize("F32", packed), by_gguf_py("F32", packed))


def test_every_f16():
    packed = np.arange(0x10000, dtype=np.uint16).view(np.uint8)
    assert_same_bits_but_nan(dequantize("F16", packed), by_gguf_py("F16", packed))


def test_every_bf16():
    packed = np.arange(0x10000, dtype=np.uint16).view(np.uint8)
    assert_same_bits(dequantize("BF16", packed), by_gguf_py("BF16", packed))


def test_f64_is_rounded_to_float32():
    values = np.concatenate(
        (np.random.default_rng(4).normal(size=63), [-0.0, 1e-45, 1e300, np.inf, 1 + 2**-24])
    ).astype("<f8")
    with np.errstate(over="ignore"):
        assert_same_bits(dequantize("F64", values.view(np.uint8)), torch.from_numpy(values.astype(np.float32)))
