"""A packed weight behaves as the tensor that it stands for."""

import libgguf
import numpy as np
import pytest
import torch
from auraflow_gguf.loader.weights.layout import is_packed, pack
from comfy_kitchen.tensor import QuantizedTensor

ROWS, COLUMNS = 24, 512


@pytest.fixture(params=["Q8_0", "Q4_K", "Q5_1", "IQ4_XS"])
def weight(request):
    dense = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    rows = libgguf.quantize_rows(dense, libgguf.GGMLQuantizationType[request.param])
    return pack(torch.from_numpy(rows), request.param, (ROWS, COLUMNS), torch.float32)


def expected(weight: QuantizedTensor) -> torch.Tensor:
    qtype = libgguf.GGMLQuantizationType[weight._params.quant_type]
    return torch.from_numpy(libgguf.dequantize_rows(weight._qdata.numpy(), qtype, COLUMNS))


@pytest.fixture(params=[True, False], ids=["inference", "no_grad"], autouse=True)
def _mode(request):
    with torch.inference_mode() if request.param else torch.no_grad():
        yield


def test_shows_its_logical_shape_and_its_packed_size(weight):
    assert is_packed(weight)
    assert weight.shape == (ROWS, COLUMNS)
    assert weight.dtype == torch.float32
    assert weight.nbytes == weight._qdata.nbytes < ROWS * COLUMNS * 4 / 3


def test_dequantizes_to_ggmls_values(weight):
    assert torch.equal(weight.dequantize(), expected(weight))


@pytest.mark.parametrize("bias", [None, torch.arange(ROWS, dtype=torch.float32)], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 5, COLUMNS), (0, COLUMNS)], ids=str)
def test_linear(weight, shape, bias):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(result, torch.nn.functional.linear(x, expected(weight), bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converting_changes_the_compute_type_alone(weight, dtype):
    half = weight.to(dtype)
    assert is_packed(half)
    assert torch.equal(half._qdata, weight._qdata)
    assert torch.equal(half.dequantize(), expected(weight).to(dtype))
    x = torch.randn(3, COLUMNS, dtype=dtype)
    assert torch.nn.functional.linear(x, half).dtype == dtype


def test_copies_as_comfyui_makes_them(weight):
    other = torch.empty_like(weight)
    other.copy_(weight)
    assert is_packed(other)
    assert other._qdata.data_ptr() != weight._qdata.data_ptr()
    assert torch.equal(other.dequantize(), expected(weight))
    assert torch.equal(weight.clone().detach().dequantize(), expected(weight))


def test_is_made_of_one_tensor_alone(weight):
    inner, context = weight.__tensor_flatten__()
    assert inner == ["_qdata"]
    again = QuantizedTensor.__tensor_unflatten__({"_qdata": weight._qdata}, context, None, None)
    assert torch.equal(again.dequantize(), expected(weight))


def test_refuses_to_be_made_from_dense_values(weight):
    with pytest.raises(TypeError, match="auraflow-gguf convert"):
        QuantizedTensor.from_float(torch.zeros(ROWS, COLUMNS), weight._layout_cls)
