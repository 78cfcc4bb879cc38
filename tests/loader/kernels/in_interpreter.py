"""The Triton kernels in Triton's interpreter: ``test_triton.py`` runs this file with TRITON_INTERPRET=1."""

import threading

import numpy as np
import pytest
import torch
import triton.language as tl
from auraflow_gguf.loader.kernels import cpu, gpu, int8, packed_linear, triton_kernels
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from triton.runtime import interpreter

from ..quant_types.blocks import NON_FINITE_SCALES, put_scales, random_blocks

NAMES = list(triton_kernels.FORMULAS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _rounding_to_bfloat16():
    """Triton 3.7's interpreter cuts float32 to bfloat16; hardware rounds, as ``test_triton.py`` finds in its code."""
    original = interpreter.InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(builder, source, dtype):
        if dtype.scalar != tl.bfloat16:
            return original(builder, source, dtype)
        rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16), dtype.scalar)

    interpreter.InterpreterBuilder.create_fp_trunc = create_fp_trunc
    yield
    interpreter.InterpreterBuilder.create_fp_trunc = original


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def dequantize(name, packed, dtype):
    """With the kernel, into the middle of a longer tensor, whose ends must stay as they are."""
    n, margin = packed.numel() // QUANT_TYPES[name].type_size * QUANT_TYPES[name].block_size, 64
    out = torch.full((n + 2 * margin,), torch.pi, dtype=dtype)
    triton_kernels.dequantize_into(out[margin:-margin], packed, QUANT_TYPES[name])
    assert (torch.cat((out[:margin], out[-margin:])) == torch.tensor(torch.pi, dtype=dtype)).all()
    return out[margin:-margin]


def small_weights(name, rows, blocks, seed=0):
    """``(rows, row_bytes) uint8`` with scales around 0.01."""
    random = np.random.default_rng(seed)
    packed = random_blocks(name, rows * blocks, seed=seed)
    put_scales(name, packed, random.normal(0, 0.01, (2, len(packed))).astype(np.float16).view(np.uint16))
    if name == "MXFP4":
        packed[:, 0] = random.integers(118, 122, len(packed))
    if name == "NVFP4":
        packed[:, :4] &= 0x1F
    return torch.from_numpy(packed).view(rows, -1)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 5), torch.float16), ((3, 5), torch.bfloat16), ((7, 33), torch.float32)], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_dequantized_bits(name, shape, dtype):
    packed = torch.from_numpy(random_blocks(name, shape[0] * shape[1], seed=shape[0]))
    expected = QUANT_TYPES[name].dequantize(packed, dtype).flatten()
    assert torch.equal(bits(dequantize(name, packed, dtype)), bits(expected))


@pytest.mark.parametrize("name", NAMES)
def test_infinite_and_nan_scales(name):
    packed = torch.from_numpy(random_blocks(name, 24, special=NON_FINITE_SCALES * 4))
    expected = QUANT_TYPES[name].dequantize(packed).flatten()
    ours = dequantize(name, packed, torch.float32)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(bits(ours.nan_to_num(nan=0.0)), bits(expected.nan_to_num(nan=0.0)))


@pytest.mark.parametrize(("name", "scale_bytes"), [("MXFP4", 1), ("NVFP4", 4)])
def test_every_small_float_scale(name, scale_bytes):
    packed = torch.from_numpy(random_blocks(name, 256))
    packed[:, :scale_bytes] = torch.arange(256)[:, None]
    assert torch.equal(
        bits(dequantize(name, packed, torch.float32)), bits(QUANT_TYPES[name].dequantize(packed).flatten())
    )


@pytest.mark.parametrize("name", NAMES)
def test_any_alignment(name):
    packed = torch.from_numpy(random_blocks(name, 5)).flatten()
    shifted = torch.cat((packed.new_zeros(3), packed))[3:]
    assert torch.equal(bits(dequantize(name, shifted, torch.float32)), bits(QUANT_TYPES[name].dequantize(packed)))


@pytest.mark.parametrize(("name", "is_smoothed"), [*((name, False) for name in NAMES), ("Q4_K", True), ("Q8_0", True)])
def test_rotated_bits(name, is_smoothed):
    """Scales, and int8 into the middle of a longer tensor, whose ends must stay as they are."""
    rows, groups = 7, 5  # two programs, and a part of one
    quant_type, margin = QUANT_TYPES[name], 64
    packed = small_weights(name, rows, groups * 256 // quant_type.block_size)
    smoothing = 2.0 ** torch.randint(0, 8, (groups * 256,)) if is_smoothed else None
    expected = quant_type.dequantize(packed)
    expected = int8.rotated(expected * smoothing if is_smoothed else expected)
    scales = int8.scales_of(expected)
    maxima = torch.full((rows * groups + margin,), torch.pi)
    triton_kernels.rotate_into(maxima[:-margin].view(rows, groups), packed, quant_type, None, smoothing)
    assert torch.equal(int8.scales_of_maxima(maxima[:-margin].view(rows, groups).amax(1)), scales)
    out = torch.full((expected.numel() + 2 * margin,), 77, dtype=torch.int8)
    triton_kernels.rotate_into(out[margin:-margin].view(expected.shape), packed, quant_type, scales, smoothing)
    rounded = int8.rounded_(expected, scales)
    assert torch.equal(out[margin:-margin].view(expected.shape), rounded.to(torch.int8))
    assert (maxima[-margin:] == torch.tensor(torch.pi)).all()
    assert (torch.cat((out[:margin], out[-margin:])) == 77).all()


def test_a_nan_is_the_largest_magnitude():
    packed = small_weights("Q8_0", 2, 8)
    packed[1, 34:36] = 255
    scales = int8.scales_of_maxima(gpu.group_maxima(packed, QUANT_TYPES["Q8_0"]).amax(1))
    assert scales[0].isfinite()
    assert scales[1].isnan()


def check_product(ours, input, packed, name, bias):
    """Against float64: as close as float32 sums in any order are, and rounded once to the compute type."""
    weight = QUANT_TYPES[name].dequantize(packed, input.dtype).double()
    expected = input.double() @ weight.T + (0 if bias is None else bias.double())
    magnitude = input.double().abs() @ weight.abs().T
    assert ours.dtype == input.dtype
    assert ours.shape == (*input.shape[:-1], len(packed))
    rounding = 0 if input.dtype == torch.float32 else torch.finfo(input.dtype).eps / 2 * expected.abs()
    assert ((ours.double() - expected).abs() <= 1e-6 * magnitude.clamp(min=1) + 1.001 * rounding).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("input_rows", "dtype", "has_bias"),
    [(1, torch.float32, False), (2, torch.float16, True), (3, torch.bfloat16, True), (16, torch.float32, False)],
)
def test_product_of_few_rows(name, input_rows, dtype, has_bias):
    packed = small_weights(name, 11, 3)
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(input_rows, 3 * QUANT_TYPES[name].block_size, generator=generator).to(dtype)
    bias = torch.randn(11, generator=generator).to(dtype) if has_bias else None
    out = torch.full((input_rows * 11 + 64,), torch.pi, dtype=dtype)
    ours = out[:-64].view(input_rows, 11)
    triton_kernels.linear_into(ours, input, packed, QUANT_TYPES[name], bias)
    check_product(ours, input, packed, name, bias)
    assert (out[-64:] == torch.tensor(torch.pi, dtype=dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Q4_K", "MXFP4", "BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("batch", [(1,), (2, 3), (2, 9), (0, 3)], ids=str)
def test_linear(name, dtype, batch):
    columns = 512
    if name in triton_kernels.FORMULAS:
        packed = small_weights(name, 5, columns // QUANT_TYPES[name].block_size)
    else:
        stored = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[name]
        packed = torch.randn(5, columns).to(stored).view(torch.uint8)
    input, bias = torch.randn(*batch, columns).to(dtype), torch.randn(5).to(dtype)
    with torch.inference_mode():
        check_product(gpu.linear(input, packed, QUANT_TYPES[name], bias), input, packed, name, bias)
    assert CPU not in gpu._without_triton


def test_dequantize():
    packed = small_weights("Q6_K", 3, 2)
    ours = gpu.dequantize(packed, QUANT_TYPES["Q6_K"], torch.bfloat16)
    assert torch.equal(ours, QUANT_TYPES["Q6_K"].dequantize(packed, torch.bfloat16))


def test_dense_weights_share_a_buffer_and_grow_it(monkeypatch):
    monkeypatch.setattr(gpu, "_buffers", threading.local())
    input = torch.randn(20, 256)
    for rows, dtype in ((4, torch.float32), (6, torch.bfloat16), (9, torch.float32), (2, torch.float16)):
        packed = small_weights("Q4_K", rows, 1, seed=rows)
        x = input.to(dtype)
        check_product(gpu.linear(x, packed, QUANT_TYPES["Q4_K"], None), x, packed, "Q4_K", None)
    (buffer,) = gpu._buffers.by_stream.values()
    assert buffer.numel() == 9 * 256 * 4


@pytest.fixture
def _on_a_gpu(monkeypatch):
    """Tensors on the CPU are a GPU's, as the interpreter has them."""
    monkeypatch.setattr(cpu, "linear", gpu.linear)
    monkeypatch.setattr(cpu, "input_gradient", gpu.input_gradient)


@pytest.mark.usefixtures("_on_a_gpu")
def test_gradients_are_those_of_the_weight_that_was_used():
    first, second = small_weights("Q4_K", 4, 1, seed=1), small_weights("Q4_K", 4, 1, seed=2)
    input = torch.randn(20, 256, requires_grad=True)
    out = packed_linear(input, first, QUANT_TYPES["Q4_K"])
    packed_linear(input.detach(), second, QUANT_TYPES["Q4_K"])
    out.sum().backward()
    assert torch.equal(input.grad[0], QUANT_TYPES["Q4_K"].dequantize(first).sum(0))


def test_int8_weights_share_the_buffer_of_dense_ones(monkeypatch):
    monkeypatch.setattr(gpu, "_buffers", threading.local())
    packed = small_weights("Q4_K", 4, 2)
    expected = int8.rotated(QUANT_TYPES["Q4_K"].dequantize(packed))
    scales = int8.scales_of(expected)
    gpu.linear(torch.randn(20, 512), packed, QUANT_TYPES["Q4_K"], None)
    (buffer,) = gpu._buffers.by_stream.values()
    weight = gpu.int8_weight(packed, QUANT_TYPES["Q4_K"], scales)
    assert weight.data_ptr() == buffer.data_ptr()
    assert torch.equal(weight, int8.rounded_(expected, scales).to(torch.int8))
    apart = gpu.int8_weight(packed, QUANT_TYPES["Q4_K"], scales, reuse_buffer=False)
    assert apart.data_ptr() != buffer.data_ptr()


@pytest.mark.usefixtures("_on_a_gpu")
def test_compiled_once_for_any_number_of_rows():
    packed = small_weights("Q4_K", 5, 2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def compiled(input):
        return packed_linear(input, packed, QUANT_TYPES["Q4_K"]) * 2

    for rows in (20, 3, 33):
        input = torch.randn(rows, 512)
        check_product(compiled(input) / 2, input, packed, "Q4_K", None)
    assert len(graphs) == 1


@pytest.mark.usefixtures("_on_a_gpu")
def test_compiled_by_aot_autograd():
    packed, bias = small_weights("IQ2_XS", 5, 2), torch.randn(5)
    compiled = torch.compile(packed_linear, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 17, 512)
    check_product(compiled(input, packed, QUANT_TYPES["IQ2_XS"], bias), input, packed, "IQ2_XS", bias)
    torch.library.opcheck(torch.ops.auraflow_gguf.linear.default, (input, packed, "IQ2_XS", bias))
