"""The tiled product on a CPU equals the product with the dequantized weight, with libgguf and without."""

import pytest
import torch
from auraflow_gguf.loader.kernels import cpu
from auraflow_gguf.loader.quant_types import QUANT_TYPES

from ..quant_types.blocks import FLOATS, random_blocks

COLUMNS = 768


def random_rows(name: str, rows: int) -> torch.Tensor:
    """``(rows, row_bytes) uint8`` of finite weights."""
    quant_type = QUANT_TYPES[name]
    if name in FLOATS:
        dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows)).to(dtype).view(torch.uint8)
    blocks = random_blocks(name, rows * COLUMNS // quant_type.block_size)
    if name == "MXFP4":
        blocks[:, 0] = 120 + blocks[:, 0] % 8  # exponents whose sums float32 can hold
    return torch.from_numpy(blocks).view(rows, -1)


@pytest.fixture(params=["libgguf", "torch"])
def engine(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu, "_libgguf", lambda: None)
    cpu.row_dequantizer.cache_clear()
    yield request.param
    cpu.row_dequantizer.cache_clear()


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_product_in_ragged_tiles(engine, name, monkeypatch):
    quant_type = QUANT_TYPES[name]
    monkeypatch.setattr(cpu, "TILE_BYTES", 5 * COLUMNS * 4)  # tiles of 5 rows: 13 rows end in one of 3
    packed = random_rows(name, 13)
    dense = quant_type.dequantize(packed)
    x = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(13)
    scale = dense.abs().max() * COLUMNS
    assert ((cpu.linear(x, packed, quant_type, bias) - (x @ dense.t() + bias)).abs().max() / scale) < 1e-6
    half = cpu.linear(x.bfloat16(), packed, quant_type, None)
    assert half.dtype == torch.bfloat16
    assert ((half - x.bfloat16() @ dense.bfloat16().t()).abs().max() / scale) < 1e-2


def test_both_engines_give_the_same_bits(monkeypatch):
    for quant_type in QUANT_TYPES.values():
        packed = random_rows(quant_type.name, 4)
        results = []
        for library in (cpu._libgguf, lambda: None):
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "_libgguf", library)
                cpu.row_dequantizer.cache_clear()
                results.append(torch.empty(4, COLUMNS))
                cpu.row_dequantizer(quant_type)(packed, results[-1])
        assert torch.equal(results[0].view(torch.int32), results[1].view(torch.int32)), quant_type.name
    cpu.row_dequantizer.cache_clear()


def test_the_tile_serves_inside_and_outside_of_inference_mode():
    quant_type = QUANT_TYPES["Q8_0"]
    packed = random_rows("Q8_0", 4)
    x = torch.randn(2, COLUMNS)
    cpu._local.__dict__.clear()
    with torch.inference_mode():
        inside = cpu.linear(x, packed, quant_type, None)
    with torch.no_grad():
        assert torch.equal(cpu.linear(x, packed, quant_type, None), inside)
