"""A GGUF file gives the picture that its dequantized weights give."""

import pytest
import torch
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.kernels import multiply, processor
from auraflow_gguf.loader.weights.layout import is_packed

from ..compiled import function_or_skip
from .aura_files import load_dense, make_gguf, respell
from .sampling import QUICK, relative_error, sample
from .small_auraflow import load_small, small_dense_twin, small_gguf


# All other types: tests/interop/test_diffusers_door.py.
def test_latents_equal_those_of_the_dense_weights(tmp_path):
    path = make_gguf("Q8_0")
    settings = {"steps": 3, "size": 8, "tokens": 6}
    expected = sample(load_dense(path), **settings)
    assert expected.isfinite().all()
    assert expected.std() > 0.1

    native = load_model(path, torch.float32)
    assert is_packed(native.model.diffusion_model.single_layers[0].attn.w1q.weight)
    latents = sample(native, **settings)
    assert relative_error(latents, expected) < 1e-5

    respelled = respell(path, tmp_path / "diffusers.gguf", prefix="transformer.", spelling="diffusers")
    diffusers = load_model(respelled, torch.float32)
    ours, others = (contents(model) for model in (native, diffusers))
    assert ours.keys() == others.keys()
    assert all(torch.equal(others[name], value) for name, value in ours.items())
    assert torch.equal(sample(diffusers, **settings), latents)


def test_16_bit_weights_may_stay_packed():
    """Nothing is gained by it, and nothing lost."""
    path = small_gguf("BF16")
    packed = load_small(path)
    assert is_packed(packed.model.diffusion_model.single_layers[0].attn.w1q.weight)
    assert relative_error(sample(packed, **QUICK), sample(small_dense_twin(path), **QUICK)) < 1e-5


def test_16_bit_weights_are_multiplied_in_our_own_c_too(monkeypatch):
    function_or_skip("multiply.c", multiply.NAMES[torch.bfloat16])
    model, settings = load_small(small_gguf("BF16"), torch.bfloat16), {"steps": 2, "size": 16, "tokens": 9}
    assert not is_packed(model.model.diffusion_model.single_layers[0].attn.w1q.weight)
    products, multiply_in_c = [], multiply.multiply
    monkeypatch.setattr(multiply, "multiply", lambda *to: products.append(to[0].shape) or multiply_in_c(*to))
    monkeypatch.setattr(processor, "made_by_amd", lambda: False)
    expected = sample(model, **settings)
    assert products == []
    monkeypatch.setattr(processor, "made_by_amd", lambda: True)
    assert relative_error(sample(model, **settings), expected) < 1e-2
    assert len(products) >= 2 * 20


def contents(model) -> dict[str, torch.Tensor]:
    """The bytes of every weight as it is kept."""
    parameters = model.model.diffusion_model.named_parameters()
    return {name: value._qdata if is_packed(value) else value for name, value in parameters}


@pytest.mark.parametrize("spelling", ["native", "diffusers"])
def test_a_bias_exists_exactly_when_the_file_holds_it(tmp_path, spelling):
    name = "single_layers.0.attn.w1q"
    bias = torch.linspace(-1, 1, 3072)
    source = make_gguf("Q4_0")
    file = respell(source, tmp_path / "biased.gguf", spelling=spelling, biases={f"{name}.bias": bias})
    plain, biased = (load_model(path, torch.float32).model.diffusion_model for path in (source, file))
    with_bias = [
        {n for n, m in model.named_modules() if getattr(m, "bias", None) is not None} for model in (plain, biased)
    ]
    assert with_bias == [{"t_embedder.mlp.0", "t_embedder.mlp.2", "init_x_linear"}, {*with_bias[0], name}]
    input = torch.randn(3, 3072, generator=torch.Generator().manual_seed(0))
    expected = plain.get_submodule(name)(input) + bias
    torch.testing.assert_close(biased.get_submodule(name)(input), expected)
