"""The tiled product on a CPU equals the product with the dequantized weight, whatever dequantizes.

Torch multiplies here; test_multiply.py is about our own C.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import libgguf
import pytest
import torch
from auraflow_gguf.loader.kernels import add_low_rank, cpu, dequantizers, native, packed_linear, processor, tiles
from auraflow_gguf.loader.kernels.tiles import in_tiles
from auraflow_gguf.loader.quant_types import QUANT_TYPES

from ...compiled import build_or_skip
from ..quant_types.blocks import FLOATS, QUANTIZED, random_blocks

COLUMNS = 768
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
ROWS = 43  # in tiles of 5 rows, the last has 3; in one for each of three threads, 13


def random_rows(name: str, rows: int = ROWS) -> torch.Tensor:
    """``(rows, row_bytes) uint8`` of finite weights."""
    quant_type = QUANT_TYPES[name]
    if name in FLOATS:
        dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows)).to(dtype).view(torch.uint8)
    blocks = random_blocks(name, rows * COLUMNS // quant_type.block_size)
    if name == "MXFP4":
        blocks[:, 0] = 120 + blocks[:, 0] % 8  # exponents whose sums float32 can hold
    return torch.from_numpy(blocks).view(rows, -1)


def quantized_rows(name: str) -> torch.Tensor:
    """``(ROWS, row_bytes) uint8`` of normally distributed weights."""
    return torch.from_numpy(libgguf.quantize_rows(random_input(ROWS, seed=1).numpy(), QUANT_TYPES[name].id))


def random_input(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def torchs_products(monkeypatch):
    monkeypatch.setattr(processor, "made_by_amd", lambda: False)


@pytest.fixture(params=["c", "libgguf", "torch"])
def engine(request, monkeypatch):
    if request.param == "c":
        build_or_skip()
    if request.param != "c":
        monkeypatch.setattr(native, "function", lambda file, name: None)
    if request.param == "torch":
        monkeypatch.setattr(dequantizers, "_libgguf", lambda: None)
    dequantizers.row_dequantizer.cache_clear()
    yield request.param
    dequantizers.row_dequantizer.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch):
    for name in ("TILE_BYTES", "PRODUCT_TILE_BYTES"):
        monkeypatch.setattr(cpu, name, 5 * COLUMNS * 4)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", QUANT_TYPES)
def test_product_in_ragged_tiles(engine, threads, name):
    quant_type = QUANT_TYPES[name]
    packed = random_rows(name)
    dense = quant_type.dequantize(packed)
    x, bias = random_input(7), torch.randn(ROWS)
    scale = dense.abs().max() * COLUMNS
    assert ((cpu.linear(x, packed, quant_type, bias) - (x @ dense.t() + bias)).abs().max() / scale) < 1e-6
    half = cpu.linear(x.bfloat16(), packed, quant_type, None)
    assert half.dtype == torch.bfloat16
    assert ((half - x.bfloat16() @ dense.bfloat16().t()).abs().max() / scale) < 1e-2


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 9, COLUMNS), (0, COLUMNS)])
def test_dtypes_and_shapes(threads, dtype, shape):
    quant_type = QUANT_TYPES["Q6_K"]
    packed = quantized_rows("Q6_K")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = cpu.linear(x, packed, quant_type, None)
    expected = torch.nn.functional.linear(x, quant_type.dequantize(packed, dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-4 if dtype.itemsize > 2 else 0.5)


@pytest.mark.parametrize("shape", [(COLUMNS,), (2, 9, COLUMNS), (0, COLUMNS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_whole_pages_are_further_apart(dtype, shape):
    rows, quant_type = cpu.PAGE // dtype.itemsize, QUANT_TYPES["Q8_0"]
    packed = quantized_rows("Q8_0").repeat(-(-rows // ROWS), 1)[:rows]
    x, bias, down, up = (torch.randn(size).to(dtype) for size in (shape, rows, (3, COLUMNS), (rows, 3)))
    expected = torch.nn.functional.linear(x, quant_type.dequantize(packed, dtype), bias)
    near = {"rtol": 2e-2, "atol": 1e-3 if dtype == torch.float32 else 1}

    out = packed_linear(x, packed, quant_type, bias)
    torch.testing.assert_close(out, expected, **near)
    assert out.untyped_storage().nbytes() == x[..., 0].numel() * (cpu.PAGE + cpu.CACHE_LINE)
    arguments = (x, packed, "Q8_0", bias)
    torch.library.opcheck(torch.ops.auraflow_gguf.linear.default, arguments, test_utils="test_faketensor")

    with torch.inference_mode():
        add_low_rank(out, x, down, up)
    torch.testing.assert_close(out, expected + x @ down.t() @ up.t(), **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_in_ragged_pieces(threads, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "LOW_RANK_ROWS", 4)
    x, down, up = (random_input(rows, seed).to(dtype) for seed, rows in enumerate((22, 3, 7)))
    output = torch.ones(2, 11, 7, dtype=dtype)
    expected = output.double().view(22, 7) + x.double() @ down.double().t() @ up[:, :3].double().t()
    cpu.add_low_rank(output, x.view(2, 11, -1), down, up[:, :3])
    assert (output.view(22, 7) - expected).abs().max() < 16 * torch.finfo(dtype).eps * expected.abs().max()


def test_no_rows(threads):
    packed = random_rows("Q4_K")[:0]
    assert cpu.linear(random_input(2), packed, QUANT_TYPES["Q4_K"], None).shape == (2, 0)
    assert cpu.dequantize(packed, QUANT_TYPES["Q4_K"], torch.float32).shape == (0, COLUMNS)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", QUANT_TYPES)
def test_dequantizing_in_ragged_tiles(engine, threads, name):
    packed = random_rows(name)
    for dtype, bits in BITS.items():
        dense = cpu.dequantize(packed, QUANT_TYPES[name], dtype)
        assert torch.equal(dense.view(bits), QUANT_TYPES[name].dequantize(packed, dtype).view(bits))
    dense.mul_(2)  # a tensor like any other


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_all_engines_give_the_bits_of_the_formula(engine, name):
    packed = random_rows(name)
    for dtype, bits in BITS.items():
        rows = torch.empty(ROWS, COLUMNS, dtype=dtype)
        dequantizers.row_dequantizer(QUANT_TYPES[name], dtype)(packed, rows)
        assert torch.equal(rows.view(bits), QUANT_TYPES[name].dequantize(packed, dtype).view(bits))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ4_XS", "IQ3_S", "F16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_16_bits_equal_torchs(engine, threads, dtype, name):
    """Torch's products of the same tiles, so that sums are taken in the same order."""
    quant_type, packed = QUANT_TYPES[name], random_rows(name)
    x = random_input(7).mul_(1e-3).to(dtype)
    expected = torch.empty(7, ROWS, dtype=dtype)

    def multiply(start: int, stop: int) -> None:
        torch.mm(x, quant_type.dequantize(packed[start:stop], dtype).t(), out=expected[:, start:stop])

    in_tiles(multiply, ROWS, 5)
    assert torch.equal(cpu.linear(x, packed, quant_type, None).view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_c_there_is_no_pass_in_float32(dtype, monkeypatch):
    build_or_skip()
    monkeypatch.setattr(tiles, "_on_threads", lambda run, threads: run())  # all in this thread
    monkeypatch.setattr(tiles, "_local", threading.local())
    dequantizers.row_dequantizer.cache_clear()
    for name in QUANTIZED:
        packed = random_rows(name)
        cpu.linear(random_input(2).to(dtype), packed, QUANT_TYPES[name], None)
        cpu.input_gradient(torch.ones(2, ROWS, dtype=dtype), packed, QUANT_TYPES[name])
        cpu.dequantize(packed, QUANT_TYPES[name], dtype)
    assert list(tiles._local.tiles) == [(dtype, "")]


def test_it_serves_inside_and_outside_of_inference_mode(threads):
    quant_type = QUANT_TYPES["Q8_0"]
    packed = random_rows("Q8_0")
    x = random_input(2)
    with torch.inference_mode():
        inside = cpu.linear(x, packed, quant_type, None)
    with torch.no_grad():
        assert torch.equal(cpu.linear(x, packed, quant_type, None), inside)
    outside = cpu.linear(x, packed, quant_type, None)
    assert torch.equal(outside, inside)
    outside.mul_(2)  # a tensor like any other


def test_the_callers_default_device_is_not_the_buffers(threads, monkeypatch):
    monkeypatch.setattr(tiles, "_local", threading.local())
    x, packed = random_input(2), random_rows("Q8_0")
    with torch.device("meta"):
        out = cpu.linear(x, packed, QUANT_TYPES["Q8_0"], None)
    assert torch.equal(out, cpu.linear(x, packed, QUANT_TYPES["Q8_0"], None))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", [name for name in QUANT_TYPES if name != "F64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantized_weight(threads, name, dtype):
    quant_type, packed = QUANT_TYPES[name], random_rows(name)
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(2)).to(dtype)
    outputs = []
    for product in (packed_linear, lambda x, w, kind, b: torch.nn.functional.linear(x, kind.dequantize(w, x.dtype), b)):
        x, b = random_input(6).view(2, 3, -1).to(dtype).requires_grad_(), bias.clone().requires_grad_()
        y = product(x, packed, quant_type, b)
        (y * torch.linspace(-1, 1, ROWS).to(dtype)).sum().backward()
        outputs.append((y.detach(), x.grad, b.grad))
    scale = outputs[1][1].abs().max().item()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, expected in zip(*outputs, strict=True):
        assert ours.dtype == expected.dtype == dtype
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * scale)


def test_the_backward_pass_keeps_no_dense_weight():
    """What is kept from the forward pass is the packed weight itself, also one that was made in inference mode."""
    with torch.inference_mode():
        packed = quantized_rows("Q4_K").clone()
    kept = []
    x = random_input(2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = packed_linear(x, packed, QUANT_TYPES["Q4_K"])
    assert kept == []
    y.sum().backward()
    dense = QUANT_TYPES["Q4_K"].dequantize(packed)
    torch.testing.assert_close(x.grad, dense.sum(dim=0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_gradients_under_torch_compile():
    packed = quantized_rows("Q6_K")
    x = random_input(5).requires_grad_()
    compiled = torch.compile(packed_linear, fullgraph=True, backend="aot_eager")
    compiled(x, packed, QUANT_TYPES["Q6_K"]).pow(2).sum().backward()
    dense = QUANT_TYPES["Q6_K"].dequantize(packed)
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ dense.T) @ dense, rtol=1e-4, atol=1e-2)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [3], indirect=True)
def test_callers_at_once_get_their_own_results(threads):
    names = ["Q8_0", "Q6_K", "Q5_1", "IQ4_XS"]
    work = {name: (random_input(11, seed), random_rows(name)) for seed, name in enumerate(names)}

    def product(name: str) -> torch.Tensor:
        x, packed = work[name]
        return cpu.linear(x, packed, QUANT_TYPES[name], None)

    alone = {name: product(name) for name in names}
    all_here = threading.Barrier(len(names))

    def call(name: str) -> bool:
        all_here.wait()
        return all(torch.equal(product(name), alone[name]) for _ in range(50))

    with ThreadPoolExecutor(len(names)) as callers:
        assert all(callers.map(call, names))
