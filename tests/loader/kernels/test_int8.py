"""Rotated int8 weights: comfy-kitchen's rotation, one scale a row, the same bits in C, and the product's error."""

import pytest
import torch
from auraflow_gguf.loader.kernels import int8, native, processor
from auraflow_gguf.loader.kernels.native import build
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from comfy_kitchen.backends.eager.quantization import quantize_int8_convrot_weight, quantize_int8_rowwise
from comfy_kitchen.tensor.int8_utils import _build_hadamard

from ...compiled import build_or_skip, built_with
from ..quant_types.blocks import random_blocks

COLUMNS = 768
TYPES = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS", "IQ3_S"]


def rows_of(name: str, rows: int = 43) -> torch.Tensor:
    return torch.from_numpy(random_blocks(name, rows * COLUMNS // QUANT_TYPES[name].block_size)).view(rows, -1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The C without intrinsics and large vectors, as it is for processors that have no AVX2."""
    build_or_skip()
    return built_with(build._compiler(), ["-DPLAIN"], tmp_path_factory.mktemp("plain"))


@pytest.fixture(params=["c", "plain c", "torch"])
def engine(request, monkeypatch):
    if request.param == "c":
        build_or_skip()
    elif request.param == "plain c":
        monkeypatch.setattr(native, "function", request.getfixturevalue("plain"))
    else:
        monkeypatch.setattr(native, "function", lambda source, name: None)
    int8._in_c.cache_clear()
    yield request.param
    int8._in_c.cache_clear()
    native._library.cache_clear()


def test_the_rotation_is_that_of_comfy_kitchen():
    basis = int8.rotated(torch.eye(256))
    assert torch.equal(basis, _build_hadamard(256))
    twice = int8.rotated(int8.rotated(torch.arange(512.0)))
    assert torch.equal(twice, torch.arange(512.0))


SMOOTHING = 2.0 ** torch.randint(0, 8, (COLUMNS,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TYPES)
def test_smoothed_columns(engine, name):
    packed, quant_type = rows_of(name), QUANT_TYPES[name]
    expected = int8.rotated(quant_type.dequantize(packed) * SMOOTHING)
    scales = int8.row_scales(packed, quant_type, SMOOTHING)
    assert torch.equal(scales, expected.abs().amax(1) / 127)
    weight = int8.int8_weight(packed, quant_type, scales, SMOOTHING)
    assert torch.equal(weight, int8.rounded_(expected, scales).to(torch.int8))


def test_norms(monkeypatch):
    monkeypatch.setattr(int8, "NORM_ROWS", 16)
    rows, columns = int8.norms(rows_of("Q4_K"), QUANT_TYPES["Q4_K"])
    dense = QUANT_TYPES["Q4_K"].dequantize(rows_of("Q4_K"))
    torch.testing.assert_close(rows, dense.norm(dim=1))
    torch.testing.assert_close(columns, dense.norm(dim=0))


def test_which_channels_are_smoothed():
    """By the root of what their activations and weights differ by, beside the median's, in powers of two."""
    ones = torch.ones(16)
    assert int8.smoothing_of(ones, ones) is None
    assert int8.smoothing_of(3 * ones, 5 * ones) is None
    outputs, inputs = ones.clone(), ones.clone()
    outputs[:4] = torch.tensor([4.0, 16.0, 256.0, 2.0**60])
    inputs[1], inputs[5], inputs[6] = 1 / 16, 1 / 4, 0
    expected = torch.tensor([1.0, 16.0, 16.0, 4096.0, 1.0, 1.0, 4096.0] + 9 * [1.0])
    assert torch.equal(int8.smoothing_of(outputs, inputs), expected)
    assert torch.equal(int8.smoothed(expected[None].half(), expected), torch.ones(1, 16, dtype=torch.float16))


@pytest.mark.parametrize("name", TYPES)
def test_scales_and_weights(engine, name):
    assert (int8._in_c(QUANT_TYPES[name]) is None) == (engine == "torch")
    packed, quant_type = rows_of(name), QUANT_TYPES[name]
    expected = int8.rotated(quant_type.dequantize(packed))
    scales = int8.row_scales(packed, quant_type)
    assert torch.equal(scales, expected.abs().amax(1) / 127)
    weight = int8.int8_weight(packed, quant_type, scales)
    assert weight.dtype == torch.int8
    assert torch.equal(weight, int8.rounded_(expected.clone(), scales).to(torch.int8))
    assert (weight.abs().amax(1) == 127).all()
    assert ((weight * scales[:, None] - expected).abs() <= 0.5001 * scales[:, None]).all()
    kitchen, kitchen_scales = quantize_int8_convrot_weight(quant_type.dequantize(packed), 256)
    torch.testing.assert_close(scales[:, None], kitchen_scales)
    assert (weight != kitchen).float().mean() < 1e-3  # other sums round elsewhere
    assert (weight.int() - kitchen.int()).abs().max() <= 1


def test_rows_of_zeros_and_of_nan(engine):
    packed = torch.zeros(3, QUANT_TYPES["Q8_0"].row_bytes(COLUMNS), dtype=torch.uint8)
    packed[2, :2] = 255  # a scale that is NaN
    scales = int8.row_scales(packed, QUANT_TYPES["Q8_0"])
    assert torch.equal(scales[:2], torch.full((2,), int8.TINY))
    out = int8.linear_on_cpu(torch.ones(20, COLUMNS), packed, QUANT_TYPES["Q8_0"], scales, None, None)
    assert torch.equal(out[:, :2], torch.zeros(20, 2))
    assert out[:, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tokens_of_any_dtype(engine, monkeypatch, dtype):
    monkeypatch.setattr(int8, "TOKENS", 7)
    input = torch.randn(40, 2 * COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    input[3] *= 2**-20
    input[5, 8], input[20, 9] = torch.nan, torch.inf
    for given in (input[:, :COLUMNS], input[:, ::2]):
        tokens, scales = int8._tokens(given, SMOOTHING)
        expected, expected_scales = int8._tokens(given.float(), SMOOTHING)
        torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(tokens[scales.isfinite()], expected[scales.isfinite()])


@pytest.mark.parametrize("smoothing", [None, SMOOTHING], ids=["as they are", "smoothed"])
@pytest.mark.parametrize("has_int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_integers(engine, monkeypatch, has_int8, dtype, smoothing):
    monkeypatch.setattr(int8, "TORCH_ROWS", 5)
    monkeypatch.setattr(int8, "TOKENS", 7)
    monkeypatch.setattr(int8, "PRODUCT_ROWS", 22)
    monkeypatch.setattr(processor, "multiplies_int8", lambda: has_int8)
    packed, quant_type = rows_of("Q4_K", 83), QUANT_TYPES["Q4_K"]
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 13, COLUMNS, generator=generator).to(dtype)
    bias = torch.randn(83, generator=generator).to(dtype)
    scales = int8.row_scales(packed, quant_type, smoothing)
    out = int8.linear_on_cpu(input, packed, quant_type, scales, smoothing, bias)
    assert out.dtype == dtype
    x, x_scales = quantize_int8_rowwise(int8.rotated(input.float() if smoothing is None else input.float() / smoothing))
    weight = int8.int8_weight(packed, quant_type, scales, smoothing)
    expected = (x.double() @ weight.double().T) * x_scales.double()
    expected = expected * scales + bias.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=8 * eps, atol=8 * eps * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_written_as_what_they_are_worth(engine, dtype):
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-(2**31), 2**31 - 1, (5, 37), generator=generator).int()
    token_scales = torch.randn(5, generator=generator).exp() / 2**16
    scales = torch.randn(37, generator=generator).exp()
    scales[3], scales[20], token_scales[4] = torch.nan, torch.inf, 1e-42
    out = torch.full((5, 40), 7.0, dtype=dtype)
    int8._write(sums, token_scales, scales, out[:, 1:38])
    expected = (sums.float() * (token_scales[:, None] * scales)).to(dtype)
    torch.testing.assert_close(out[:, 1:38], expected, rtol=0, atol=0, equal_nan=True)
    assert (out[:, [0, 38, 39]] == 7).all()


def test_what_a_cpu_says_of_itself(monkeypatch):
    monkeypatch.setattr(int8, "_in_c", lambda quant_type: print)
    monkeypatch.setattr(processor, "multiplies_int8", lambda: False)
    assert "no faster than float32" in int8.refused_by_cpu()
    monkeypatch.setattr(processor, "multiplies_int8", lambda: True)
    assert int8.refused_by_cpu() is None
    monkeypatch.setattr(int8, "_in_c", lambda quant_type: None)
    assert "cli.py compile" in int8.refused_by_cpu()
