"""torch.compile: no graph breaks, and no traced tensor left in the caches of constants."""

import pytest
import torch
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from torch.utils._python_dispatch import return_and_correct_aliasing


class Packed(torch.Tensor):
    """A packed weight as a tensor subclass, as small as one can be: it is dequantized when it is multiplied."""

    @staticmethod
    def __new__(cls, blocks, qtype):
        shape = (len(blocks), QUANT_TYPES[qtype].block_size)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=blocks.device)

    def __init__(self, blocks, qtype):
        self.blocks, self.qtype = blocks, qtype

    def __repr__(self):
        return f"Packed({self.qtype}, {self.blocks.shape})"

    def __tensor_flatten__(self):
        return ["blocks"], self.qtype

    @staticmethod
    def __tensor_unflatten__(inner, qtype, outer_size, outer_stride):
        return Packed(inner["blocks"], qtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func is torch.ops.aten.mul.Tensor:
            packed, factor = args
            return QUANT_TYPES[packed.qtype].dequantize(packed.blocks) * factor
        return return_and_correct_aliasing(func, args, kwargs or {}, Packed(args[0].blocks, args[0].qtype))


def random_bytes(name):
    size = (6, QUANT_TYPES[name].type_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def same_bits(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize(
    "name", ["BF16", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "TQ1_0", "NVFP4", "IQ4_XS", "IQ2_XXS", "IQ1_M"]
)
def test_one_graph(name):
    torch.compiler.reset()
    blocks = random_bytes(name)
    compiled = torch.compile(QUANT_TYPES[name].dequantize, fullgraph=True, backend="eager")
    assert same_bits(compiled(blocks), QUANT_TYPES[name].dequantize(blocks))


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS", "IQ2_XXS"])
@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_tensor_subclass(name, first):
    torch.compiler.reset()
    packed, factor = Packed(random_bytes(name), name), torch.tensor(2.0)
    if first == "eager":
        QUANT_TYPES[name].dequantize(packed.blocks)
    compiled = torch.compile(torch.mul, fullgraph=True, backend="aot_eager")(packed, factor)
    assert same_bits(compiled, packed * factor)
