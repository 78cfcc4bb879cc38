"""Packed weights pass through the host functions that offloading and dynamic VRAM are made of."""

import comfy.memory_management
import comfy.model_management
import pytest
import torch
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.comfyui.ops import GGUFOps
from auraflow_gguf.loader.weights.layout import is_packed
from comfy_kitchen.tensor import QuantizedTensor

from .aura_files import make_gguf


@pytest.fixture(scope="module")
def linear():
    return load_model(make_gguf("Q4_0"), torch.float32).model.diffusion_model.single_layers[0].attn.w1q


def test_gathering_into_one_buffer_gives_the_weight_back(linear):
    """What dynamic VRAM does with a module's weight and bias: one buffer, and views that look like the originals."""
    geometries = comfy.memory_management.tensors_to_geometries([linear.weight, linear.bias])
    size = comfy.memory_management.vram_aligned_size(geometries)
    assert linear.weight.nbytes <= size < linear.weight.nbytes + 2048
    buffer = torch.zeros(size, dtype=torch.uint8)
    comfy.model_management.cast_to_gathered([linear.weight, linear.bias], buffer)
    weight, bias = comfy.memory_management.interpret_gathered_like(geometries, buffer)
    assert bias is None
    assert is_packed(weight)
    assert torch.equal(weight.dequantize(), linear.weight.dequantize())


def test_streaming_through_a_cast_buffer_gives_the_weight_back(linear):
    """What offloading does: an empty twin on the device, filled from the weight."""
    twin = torch.empty_like(linear.weight, dtype=None, device="cpu")
    twin.copy_(linear.weight, non_blocking=True)
    assert is_packed(twin)
    assert twin._qdata.data_ptr() != linear.weight._qdata.data_ptr()
    assert torch.equal(twin.dequantize(), linear.weight.dequantize())


def test_moving_a_module_moves_what_it_holds(linear):
    module = GGUFOps.Linear(3072, 3072, bias=False, dtype=torch.float32)
    assert module.weight is None
    assert module.bias is None
    module._load_from_state_dict({"weight": linear.weight}, "", {}, True, [], [], [])
    module.to("meta")
    assert isinstance(module.weight, QuantizedTensor)
    assert module.weight.device.type == module.weight._qdata.device.type == "meta"


def test_size_on_the_device_is_the_packed_size():
    model = load_model(make_gguf("Q4_0"), torch.float32)
    packed = [p for p in model.model.diffusion_model.parameters() if is_packed(p) and p._params.quant_type == "Q4_0"]
    assert sum(p.nbytes for p in packed) == sum(p.numel() for p in packed) * 18 // 32
    assert model.model_size() < sum(p.nbytes for p in packed) + 150 * 2**20
