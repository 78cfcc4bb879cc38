"""The product in C: right for all shapes and types, and its bits those of one token with one row."""

import ctypes

import pytest
import torch
from auraflow_gguf.loader.kernels import cpu, dense_linear, multiply, native, packed_linear, processor, tiles
from auraflow_gguf.loader.kernels.dequantizers import dequantizer_in_c, row_dequantizer
from auraflow_gguf.loader.quant_types import QUANT_TYPES

from ...compiled import built_with, function_or_skip
from ..quant_types.blocks import QUANTIZED
from .test_cpu import BITS, COLUMNS, random_rows

EPSILONS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # of the sizes of all that is summed, or of the sum


@pytest.fixture(autouse=True)
def compiled():
    function_or_skip("multiply.c", "multiply")
    row_dequantizer.cache_clear()


@pytest.fixture(params=multiply.NAMES, ids=str)
def dtype(request):
    function_or_skip("multiply.c", multiply.NAMES[request.param])
    return request.param


def random(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(name: str, rows: int, columns: int) -> torch.Tensor:
    """``(rows, row_bytes) uint8`` of finite weights, of so many columns."""
    size = columns // QUANT_TYPES[name].block_size * QUANT_TYPES[name].type_size
    return random_rows(name, -(-rows * columns // COLUMNS)).flatten()[: rows * size].view(rows, size)


def product(x: torch.Tensor, packed: torch.Tensor, name: str) -> torch.Tensor:
    out = torch.full((len(x), len(packed) + 3), 7, dtype=x.dtype)
    multiply.multiply(x, packed, QUANT_TYPES[name], out[:, : len(packed)])
    assert (out[:, len(packed) :] == 7).all()
    return out[:, : len(packed)]


def assert_right(out: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    exact, sizes = x.double() @ dense.double().t(), x.double().abs() @ dense.double().abs().t()
    bound = EPSILONS[torch.float32] * sizes
    if out.dtype == torch.bfloat16:
        bound += EPSILONS[torch.bfloat16] * exact.abs()
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_every_type(threads, dtype, name):
    packed, x = random_rows(name), random(13, COLUMNS, dtype)
    assert_right(product(x, packed, name), x, QUANT_TYPES[name].dequantize(packed, dtype))


@pytest.mark.parametrize("name", ["Q8_0", "IQ3_S"])
@pytest.mark.parametrize("rows", [1, 24, 47, 48, 49, 96, 97, 385])
def test_rows(threads, dtype, name, rows):
    packed, x = random_rows(name, rows), random(9, COLUMNS, dtype)
    assert_right(product(x, packed, name), x, QUANT_TYPES[name].dequantize(packed, dtype))


@pytest.mark.parametrize("tokens", [*range(1, 18), 63, 64, 65, 200])
def test_tokens(dtype, tokens):
    packed, x = random_rows("Q4_K"), random(tokens, COLUMNS, dtype)
    assert_right(product(x, packed, "Q4_K"), x, QUANT_TYPES["Q4_K"].dequantize(packed, dtype))


@pytest.mark.parametrize("columns", [32, 64, 96, 256, 512, 544, 3072, 3104, 6144, 8192])
def test_columns(dtype, columns):
    packed, x = rows_of("Q5_1", 50, columns), random(11, columns, dtype)
    assert_right(product(x, packed, "Q5_1"), x, QUANT_TYPES["Q5_1"].dequantize(packed, dtype))


@pytest.mark.parametrize("columns", [2, 6, 258, 1026])
def test_columns_of_dense_rows(dtype, columns):
    name = "F32" if dtype == torch.float32 else "BF16"
    rows, x = random(50, columns, dtype, seed=1), random(11, columns, dtype)
    assert_right(product(x, rows.view(torch.uint8), name), x, rows)


def test_whole_numbers_are_exact(dtype):
    x = torch.arange(12 * 512).view(12, 512).remainder(7).sub(3).to(dtype)
    rows = torch.arange(50 * 512).view(50, 512).remainder(5).sub(2).to(dtype)
    name = "F32" if dtype == torch.float32 else "BF16"
    exact = (x.double() @ rows.double().t()).to(dtype)
    assert torch.equal(product(x, rows.view(torch.uint8), name), exact)


def test_bits_do_not_depend_on_other_tokens_and_rows(threads, dtype):
    packed, x = random_rows("Q6_K", rows=500), random(100, COLUMNS, dtype)
    whole = product(x, packed, "Q6_K").view(BITS[dtype])
    for tokens in (slice(0, 1), slice(3, 14), slice(50, 100)):
        for rows in (slice(0, 1), slice(31, 110), slice(499, 500)):
            part = product(x[tokens], packed[rows], "Q6_K").view(BITS[dtype])
            assert torch.equal(part, whole[tokens, rows])


@pytest.mark.parametrize("most", [1, 24, 69])
def test_many_tokens_are_taken_in_parts(threads, dtype, monkeypatch, most):
    packed, x = random_rows("Q4_0"), random(70, COLUMNS, dtype)
    whole, taken, scratch_words = product(x, packed, "Q4_0"), [], multiply.scratch_words
    monkeypatch.setattr(multiply, "scratch_words", lambda *of: taken.append(of[1]) or scratch_words(*of))
    monkeypatch.setattr(multiply, "TOKENS", most)
    assert torch.equal(product(x, packed, "Q4_0"), whole)
    assert most / 2 <= max(taken) <= most


def test_tokens_that_are_further_apart(dtype):
    packed, x = random_rows("Q8_0"), random(19, COLUMNS + 1, dtype)[:, :COLUMNS]
    assert torch.equal(product(x, packed, "Q8_0"), product(x.contiguous(), packed, "Q8_0"))
    one = x[:1].expand(5, -1)
    assert torch.equal(product(one, packed, "Q8_0"), product(x[:1], packed, "Q8_0").expand(5, -1))


def test_nan_and_infinity_stay_with_their_token(dtype):
    packed, x = random_rows("Q8_0"), random(10, COLUMNS, dtype)
    clean = product(x, packed, "Q8_0")
    x[3, 5], x[7, 6] = torch.nan, torch.inf
    out = product(x, packed, "Q8_0")
    assert out[3].isnan().all()
    assert not out[7].isfinite().any()
    others = [i for i in range(10) if i not in (3, 7)]
    assert torch.equal(out[others], clean[others])


def assert_same_bits(compiler: str, options: list[str], dtype: torch.dtype, tmp_path, monkeypatch) -> None:
    packed, x = random_rows("Q8_0", rows=101), random(29, COLUMNS, dtype)
    expected = product(x, packed, "Q8_0")
    monkeypatch.setattr(native, "function", built_with(compiler, options, tmp_path))
    assert torch.equal(product(x, packed, "Q8_0").view(BITS[dtype]), expected.view(BITS[dtype]))


def test_bits_do_not_depend_on_the_compiler(compiler, dtype, tmp_path, monkeypatch):
    assert_same_bits(compiler, ["-march=native"], dtype, tmp_path, monkeypatch)


def test_bits_do_not_depend_on_the_vectors(compiler, tmp_path, monkeypatch):
    """AVX2's are of 8 numbers, AVX-512's of 16; of bfloat16 there are AVX-512's alone."""
    assert_same_bits(compiler, ["-march=native", "-mno-avx512f"], torch.float32, tmp_path, monkeypatch)


@pytest.mark.parametrize("columns", [768, 8192])
def test_nothing_is_written_beyond_the_scratch(dtype, columns):
    """Of the sizes that multiply.py takes from multiply.c, for columns in one part, and in several."""
    packed, x, rows = rows_of("Q8_0", multiply.TILE_ROWS, columns), random(24, columns, dtype), multiply.TILE_ROWS
    used = multiply.scratch_words(dtype, len(x))
    scratch = torch.full((used + 4096,), 7, dtype=torch.int32)
    out = torch.empty(len(x), rows, dtype=dtype)
    in_c, _ = dequantizer_in_c(QUANT_TYPES["Q8_0"], dtype)
    multiply._in_c(dtype)(
        *(x.data_ptr(), columns * dtype.itemsize, len(x), packed.data_ptr(), packed.shape[1]),
        *(ctypes.cast(in_c, ctypes.c_void_p).value, None, 34, 32),
        *(rows, columns, out.data_ptr(), rows * dtype.itemsize, scratch.data_ptr()),
    )
    assert (scratch[used:] == 7).all()
    assert columns == 768 or (scratch[used - 64 : used] != 7).any()  # and it is no larger than it must be
    assert torch.equal(out, product(x, packed, "Q8_0"))


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("name", ["Q4_K", "F16", "F32", "BF16"])
@pytest.mark.parametrize("shape", [(COLUMNS,), (0, COLUMNS), (2, 9, COLUMNS), (2, 40, COLUMNS)])
def test_linear(threads, dtype, name, shape):
    quant_type, packed, bias = QUANT_TYPES[name], random_rows(name), random(1, 43, dtype)[0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    dense = quant_type.dequantize(packed, dtype)
    near = {"rtol": 1e-2, "atol": dense.abs().max().item() * (1e-3 if dtype == torch.float32 else 0.5)}
    out = packed_linear(x, packed, quant_type, bias)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, dense, bias), **near)
    arguments = (x, packed, name, bias)
    torch.library.opcheck(torch.ops.auraflow_gguf.linear.default, arguments, test_utils="test_faketensor")


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, int]]:
    """The tokens and rows of each product that is made in C."""
    sizes, make = [], multiply.multiply
    monkeypatch.setattr(
        multiply, "multiply", lambda x, rows, *to: sizes.append((len(x), len(rows))) or make(x, rows, *to)
    )
    return sizes


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("bias", [False, True])
def test_dense_linear(threads, dtype, taken, bias):
    x, weight, bias = random(80, 96, dtype), random(100, 96, dtype, seed=1), random(1, 100, dtype)[0] if bias else None
    with torch.no_grad():
        out = dense_linear(x.view(2, 40, 96), weight, bias)
    assert taken == [(80, 100)]
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (out.view(80, 100).double() - expected).norm() < (1e-6 if dtype == torch.float32 else 4e-3) * expected.norm()


@pytest.mark.usefixtures("ours")
def test_which_dense_linears_are_left_to_torch(dtype, taken):
    x, weight = random(80, 96, dtype), random(100, 96, dtype, seed=1)
    few_columns = slice(0, 48)
    with torch.no_grad():
        for input, rows in (
            *((x[:63], weight), (x, weight[:63]), (x[:, few_columns], weight[:, few_columns].contiguous())),
            *((x, weight.t().contiguous().t()), (x.half(), weight.half())),
        ):
            assert torch.equal(dense_linear(input, rows), torch.nn.functional.linear(input, rows))
    dense_linear(x, weight.clone().requires_grad_()).sum().backward()
    dense_linear(x.clone().requires_grad_(), weight).sum().backward()
    assert taken == []


def test_only_on_amds_processors(monkeypatch):
    x = random(4, COLUMNS, torch.float32)
    for is_amds in (False, True):
        monkeypatch.setattr(processor, "made_by_amd", lambda is_amds=is_amds: is_amds)
        assert multiply.multiplies(x) == is_amds


@pytest.mark.usefixtures("ours")
def test_what_it_does_not_take_is_left_to_torch():
    x = random(4, COLUMNS, torch.float32)
    others = (x.half(), x.double(), x[:0], random(COLUMNS, 4, torch.float32).t(), x.bfloat16()[:, 1:])
    assert [multiply.multiplies(other) for other in others] == [False] * 5
    packed = random_rows("Q8_0")
    for other in others[:4]:
        out = cpu.linear(other, packed, QUANT_TYPES["Q8_0"], None)
        assert out.shape == (len(other), 43)
    assert multiply.multiplies(x)


@pytest.mark.usefixtures("ours")
def test_it_takes_no_tile_of_dense_rows(threads, dtype, monkeypatch):
    """All types are dequantized where they are laid out."""
    taken = []
    monkeypatch.setattr(
        multiply, "tile", lambda n, dtype, purpose: taken.append(purpose) or tiles.tile(n, dtype, purpose)
    )
    for name in QUANTIZED:
        cpu.linear(random(2, COLUMNS, dtype), random_rows(name), QUANT_TYPES[name], None)
    assert set(taken) == {"scratch"}
