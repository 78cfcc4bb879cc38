"""Attention in C: right for all shapes, and its bits those of one query of one head."""

import pytest
import torch
from auraflow_gguf.loader.kernels import attention as module
from auraflow_gguf.loader.kernels import native, processor
from auraflow_gguf.loader.kernels.attention import attends, attention
from auraflow_gguf.loader.kernels.tiles import tile

from ...compiled import built_with, function_or_skip
from .test_cpu import BITS

EPSILONS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def compiled():
    function_or_skip("attention.c", "attention")


@pytest.fixture(params=module.NAMES, ids=str)
def dtype(request):
    function_or_skip("attention.c", module.NAMES[request.param])
    return request.param


def random(dtype, queries=70, keys=None, columns=64, batch=2, heads=3, seed=0) -> tuple[torch.Tensor, ...]:
    """As ComfyUI's AuraFlow has them: the heads of a token lie together."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, heads, columns) for tokens in (queries, keys or queries, keys or queries)]
    return tuple(torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)


def exact(query, key, value, scale) -> torch.Tensor:
    weights = torch.softmax(scale * query.double() @ key.double().transpose(-1, -2), -1)
    return (weights @ value.double()).transpose(1, 2).flatten(2)


def assert_right(*inputs, scale=0.125) -> None:
    out, expected = attention(*inputs, scale), exact(*inputs, scale)
    assert (out.dtype, out.shape) == (inputs[0].dtype, expected.shape)
    assert ((out.double() - expected).abs() <= EPSILONS[out.dtype] * inputs[2].abs().max()).all()


@pytest.mark.parametrize("keys", [1, 2, 7, 23, 24, 25, 47, 48, 49, 96, 97, 300, 1100])
def test_keys(threads, dtype, keys):
    assert_right(*random(dtype, 9, keys))


@pytest.mark.parametrize("queries", [*range(1, 10), 31, 32, 33, 64, 65, 300])
def test_queries(threads, dtype, queries):
    assert_right(*random(dtype, queries, 50))


@pytest.mark.parametrize("columns", [2, 4, 16, 32, 34, 48, 64, 80, 96, 128, 160, 256])
def test_columns(dtype, columns):
    assert_right(*random(dtype, columns=columns))


@pytest.mark.parametrize("scale", [1e-3, 0.0625, 1.0, 30.0])
def test_scales(dtype, scale):
    assert_right(
        *random(torch.float32, columns=16) if dtype == torch.float32 else random(dtype, columns=2), scale=scale
    )


def test_a_query_that_sees_one_key_gets_its_value(dtype):
    query, key, value = random(dtype, batch=1, heads=1, columns=32)
    key = torch.zeros_like(key)
    key[..., 40, :] = query[..., 5, :] = 30
    assert torch.equal(attention(query, key, value, 1.0)[0, 5], value[0, 0, 40])


def test_equal_scores_give_the_mean(dtype):
    query, key, value = random(dtype, batch=1, heads=1, keys=64)
    value = value.mul(4).round().clamp(-8, 8)  # their sums are exact
    out = attention(torch.zeros_like(query), key, value, 1.0)
    assert torch.equal(out[0], value[0, 0].double().mean(0).to(dtype).expand(70, -1))


def test_bits_do_not_depend_on_other_queries_and_heads(threads, dtype):
    query, key, value = random(dtype, 100)
    whole = attention(query, key, value, 0.125).view(2, 100, 3, 64)
    for queries in (slice(0, 1), slice(3, 14), slice(50, 100)):
        for heads in (slice(0, 1), slice(1, 3)):
            part = attention(query[:, heads, queries], key[:, heads], value[:, heads], 0.125)
            assert torch.equal(part.view(BITS[dtype]), whole[:, queries, heads].flatten(2).view(BITS[dtype]))


def test_heads_are_taken_in_parts(threads, dtype, monkeypatch):
    inputs, taken = random(dtype), []
    whole = attention(*inputs, 0.125)
    monkeypatch.setattr(module, "tile", lambda n, *rest: taken.append((n, *rest)) or tile(n, *rest))
    of_two = 2 * 2 * 96 * 96 * dtype.itemsize
    for most, bound in ((of_two, of_two), (1, of_two // 2)):  # bytes
        monkeypatch.setattr(module, "HEADS_BYTES", most)
        assert torch.equal(attention(*inputs, 0.125), whole)
        assert bound // 2 < max(4 * n for n, _, purpose in taken if purpose == "heads") <= bound
        taken.clear()


@pytest.mark.parametrize("keys", [100, 1280])
def test_error(dtype, keys):
    """In float32 1.5 times that of torch's attention, in bfloat16 the same."""
    inputs = random(dtype, 64, keys, columns=256)
    out, expected = attention(*inputs, 0.0625).double(), exact(*inputs, 0.0625)
    assert (out - expected).norm() / expected.norm() < {torch.float32: 7e-7, torch.bfloat16: 2.5e-3}[dtype]


def test_exponentials():
    """Of two keys, one has a score of 0 and a value of 0: what is left of the other is the logistic function."""
    scores = torch.linspace(-86, 0, 50001)
    query = torch.stack([scores, torch.zeros_like(scores)], 1)[None, None]
    key = torch.tensor([[0.0, 0.0], [1.0, 0.0]])[None, None]
    out = attention(query, key, key, 1.0)[0, :, 0].double()
    expected = torch.sigmoid(scores.double())
    assert ((out - expected).abs() / expected).max() < 2.2e-7
    assert attention(query * 2, key, key, 1.0)[0, scores < -44].eq(0).all()


def test_rows_that_lie_elsewhere(dtype):
    inputs = random(dtype)
    far = [torch.nn.functional.pad(x, (0, 2))[..., :64] for x in inputs]
    together = [x.contiguous() for x in inputs]
    for others in (far, together, [x[:1, :1].expand(2, 3, -1, -1) for x in inputs]):
        expected = attention(*[x.clone(memory_format=torch.contiguous_format) for x in others], 0.125)
        assert torch.equal(attention(*others, 0.125), expected)


def test_nan_and_infinity_stay_with_their_query(dtype):
    query, key, value = random(dtype, batch=1, heads=1)
    clean = attention(query, key, value, 0.125)
    query[..., 3, 5], query[..., 40, 6] = torch.nan, torch.inf
    out = attention(query, key, value, 0.125)
    assert out[0, 3].isnan().all()
    assert out[0, 40].isnan().all()  # as torch's softmax
    others = [i for i in range(70) if i not in (3, 40)]
    assert torch.equal(out[:, others], clean[:, others])


def test_a_key_that_is_not_a_number_reaches_all_queries(dtype):
    query, key, value = random(dtype, batch=1, heads=1)
    key[..., 69, 0] = torch.nan
    assert attention(query, key, value, 0.125).isnan().all()


def assert_same_bits(compiler: str, options: list[str], dtype: torch.dtype, tmp_path, monkeypatch) -> None:
    inputs = random(dtype, 50, 600, columns=80)
    expected = attention(*inputs, 0.3)
    monkeypatch.setattr(native, "function", built_with(compiler, options, tmp_path))
    assert torch.equal(attention(*inputs, 0.3).view(BITS[dtype]), expected.view(BITS[dtype]))


def test_bits_do_not_depend_on_the_compiler(compiler, dtype, tmp_path, monkeypatch):
    assert_same_bits(compiler, ["-march=native"], dtype, tmp_path, monkeypatch)


def test_bits_do_not_depend_on_the_vectors(compiler, tmp_path, monkeypatch):
    """AVX2's are of 8 numbers, AVX-512's of 16; of bfloat16 there are AVX-512's alone."""
    assert_same_bits(compiler, ["-march=native", "-mno-avx512f"], torch.float32, tmp_path, monkeypatch)


@pytest.mark.parametrize("keys", [5, 100])
def test_nothing_is_written_beyond_what_is_taken(dtype, keys, monkeypatch):
    taken = []

    def guarded(elements: int, dtype: torch.dtype, purpose: str) -> torch.Tensor:
        taken.append((elements, torch.full((elements + 4096,), 7, dtype=dtype)))
        return taken[-1][1][:elements]

    monkeypatch.setattr(module, "tile", guarded)
    assert_right(*random(dtype, 40, keys))
    assert len(taken) >= 2
    for elements, memory in taken:
        assert (memory[elements:] == 7).all()
        assert (memory[:elements] != 7).any()


def test_only_on_amds_processors(monkeypatch):
    for is_amds in (False, True):
        monkeypatch.setattr(processor, "made_by_amd", lambda is_amds=is_amds: is_amds)
        assert attends(*random(torch.float32)) == is_amds


@pytest.mark.usefixtures("ours")
def test_what_it_does_not_take():
    query, key, value = random(torch.float32)
    assert attends(query, key[:, :, :9], value[:, :, :9])
    others = [
        (query.half(), key.half(), value.half()),
        (query, key.double(), value),
        (query, key[:, :1], value[:, :1]),  # heads that share keys
        (query, key, value[..., :32]),
        (query, key[:, :, :0], value[:, :, :0]),
        (query.transpose(2, 3), key.transpose(2, 3), value.transpose(2, 3)),
        (query.bfloat16()[..., :3], key.bfloat16()[..., :3], value.bfloat16()[..., :3]),
        (query.to("meta"), key.to("meta"), value.to("meta")),
    ]
    assert [attends(*other) for other in others] == [False] * len(others)
