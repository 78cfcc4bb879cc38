"""Packed weights with row scales: what is multiplied in int8, what exactly, and who refuses."""

import comfy_kitchen
import pytest
import torch
from auraflow_gguf.loader.kernels import int8, packed_linear
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.loader.weights import int8_linear as module
from auraflow_gguf.loader.weights.int8_linear import can_be_int8, int8_linear, packed_int8_linear, with_row_scales
from auraflow_gguf.loader.weights.layout import linear, pack
from gguf import GGMLQuantizationType, quantize

from ..quant_types.blocks import random_blocks

CPU = torch.device("cpu")
ROWS, COLUMNS = 24, 512
SMOOTHING = torch.ones(COLUMNS).index_fill_(0, torch.tensor([3, 300, 301]), 64.0)


def weight_of(name: str, columns: int = COLUMNS):
    packed = random_blocks(name, ROWS * columns // QUANT_TYPES[name].block_size, seed=1)
    return pack(torch.from_numpy(packed), name, (ROWS, columns), torch.float32)


@pytest.fixture
def weight():
    return with_row_scales(weight_of("Q4_K"), CPU)


@pytest.fixture
def input():
    return torch.randn(2, 20, COLUMNS, generator=torch.Generator().manual_seed(0))


def test_which_weights_can_be_int8():
    assert can_be_int8(weight_of("Q8_0"))
    assert not can_be_int8(weight_of("Q8_0", 384))
    assert not can_be_int8(torch.randn(ROWS, COLUMNS))
    assert not can_be_int8(pack(torch.randn(4, 512).view(torch.uint8), "F32", (4, 512), torch.bfloat16))


def test_scales_go_where_the_weight_goes(weight):
    scales = weight._params.scale
    assert scales.shape == (ROWS,)
    assert torch.equal(weight.dequantize(), weight_of("Q4_K").dequantize())
    twin = torch.empty_like(weight)
    twin.copy_(weight)
    for moved in (weight.clone(), weight.to("cpu", torch.bfloat16), twin, torch.nn.Parameter(weight, False)):
        assert torch.equal(moved._params.scale, scales)
        assert moved._params.scale.dtype == torch.float32
    assert weight.to("meta")._params.scale.device.type == "meta"


def test_the_product_is_that_of_comfy_kitchens_eager_backend(weight, input):
    exact = linear(input, weight)
    with torch.no_grad():
        ours = int8_linear(input, weight)
    dense = int8.int8_weight(weight._qdata, QUANT_TYPES["Q4_K"], weight._params.scale)
    with comfy_kitchen.use_backend("eager"):
        theirs = module._product(input, dense, weight._params.scale, None)
    assert (ours - theirs).norm() / exact.norm() < 2e-4  # here and there, rotations round to other integers
    assert 1e-3 < (ours - exact).norm() / exact.norm() < 2e-2


def test_channels_that_stand_out_are_smoothed(input):
    """A channel of 50 times the activations, which the weight takes back, costs next to nothing."""
    weight, before = (torch.randn(n, COLUMNS, generator=torch.Generator().manual_seed(n)) for n in (ROWS, COLUMNS))
    chosen = SMOOTHING > 1
    before[chosen] *= 50
    weight[:, chosen] /= 50
    input = input * torch.where(chosen, 50.0, 1.0)
    plain, before, weight = (_packed_q8_0(w) for w in (torch.ones(COLUMNS, COLUMNS), before, weight))
    smoothed = with_row_scales(weight, CPU, before)
    assert ((smoothed._params.smoothing > 1) == chosen).all()
    assert smoothed._params.smoothing.log2().frac().eq(0).all()
    assert with_row_scales(weight_of("Q4_K"), CPU, plain)._params.smoothing is None
    exact = linear(input, weight)
    with torch.no_grad():
        error, without = (
            (int8_linear(input, w) - exact).norm() / exact.norm() for w in (smoothed, with_row_scales(weight, CPU))
        )
    assert error < 0.015 < 3 * error < without
    moved = smoothed.to("meta")
    assert {t.device.type for t in (moved._params.scale, moved._params.smoothing)} == {"meta"}
    arguments = (weight._qdata, QUANT_TYPES["Q8_0"], smoothed._params.scale, smoothed._params.smoothing, None)
    with comfy_kitchen.use_backend("eager"), torch.no_grad():
        theirs = module._by_comfy_kitchen(input, *arguments)
        assert (int8_linear(input, smoothed) - theirs).norm() / exact.norm() < 2e-4


def _packed_q8_0(weight: torch.Tensor):
    packed = torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType.Q8_0))
    return pack(packed, "Q8_0", tuple(weight.shape), torch.float32)


def test_few_rows_gradients_and_weights_without_scales_are_exact(weight, input):
    bias = torch.randn(ROWS)
    with torch.no_grad():
        assert torch.equal(int8_linear(input[:, :8], weight, bias), linear(input[:, :8], weight, bias))
        assert torch.equal(int8_linear(input, weight_of("Q4_K"), bias), linear(input, weight, bias))
        dense = weight.dequantize()
        assert torch.equal(int8_linear(input, dense), torch.nn.functional.linear(input, dense))
    assert torch.equal(int8_linear(input, weight, bias), linear(input, weight, bias))


def test_compiled_to_one_operator(weight, input):
    arguments = (input, weight._qdata, "Q4_K", weight._params.scale, SMOOTHING, torch.randn(ROWS))
    torch.library.opcheck(torch.ops.auraflow_gguf.int8_linear.default, arguments, test_utils=("test_faketensor",))
    compiled = torch.compile(packed_int8_linear, fullgraph=True, backend="eager", dynamic=True)
    with torch.inference_mode():
        for rows in (20, 3):
            x = input[:, :rows]
            expected = packed_int8_linear(x, weight._qdata, QUANT_TYPES["Q4_K"], weight._params.scale)
            assert torch.equal(compiled(x, weight._qdata, QUANT_TYPES["Q4_K"], weight._params.scale), expected)
    assert torch.equal(
        packed_int8_linear(input[:, :3], weight._qdata, QUANT_TYPES["Q4_K"], weight._params.scale),
        packed_linear(input[:, :3], weight._qdata, QUANT_TYPES["Q4_K"]),
    )


def test_who_refuses(monkeypatch):
    monkeypatch.setattr(int8, "refused_by_cpu", lambda: None)
    assert module.refused(CPU, torch.float32) is None
    monkeypatch.setattr(int8, "refused_by_cpu", lambda: "no int8 products here")
    assert module.refused(CPU, torch.float32) == "no int8 products here"
    monkeypatch.delattr(comfy_kitchen, "int8_linear")
    assert "comfy-kitchen is too old" in module.refused(CPU, torch.float32)


def test_a_gpu_of_eager_kernels_alone_refuses(monkeypatch):
    with comfy_kitchen.use_backend("eager"):
        assert "no kernels" in module.refused(torch.device("meta"), torch.float32)
    assert "do not work there" in module.refused(torch.device("vulkan"), torch.float32)
