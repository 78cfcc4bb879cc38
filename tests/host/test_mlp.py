"""AuraFlow's MLPs apply their gate in place, with the bits of ComfyUI's."""

import pytest
import torch
from auraflow_gguf.loader.comfyui.mlp import InPlaceMLP
from comfy.ldm.aura.mmdit import MLP

from .patches import lora, patched
from .sampling import QUICK, relative_error, sample
from .small_auraflow import HIDDEN, load_small, small_gguf

MLPS = ["double_layers.0.mlpC", "double_layers.0.mlpX", "single_layers.0.mlp", "single_layers.1.mlp"]


@pytest.fixture(scope="module")
def model():
    return load_small(small_gguf("Q4_0"))


@pytest.fixture
def as_comfyuis(monkeypatch):
    return lambda: monkeypatch.setattr(InPlaceMLP, "forward", MLP.forward)


def mlps(model) -> dict[str, MLP]:
    return {name: module for name, module in model.model.diffusion_model.named_modules() if isinstance(module, MLP)}


@pytest.mark.parametrize("change", [lambda model: model, lambda model: patched(model, lora)], ids=["plain", "lora"])
def test_latents_are_those_of_comfyuis(model, as_comfyuis, change):
    ours = sample(change(model), **QUICK)
    as_comfyuis()
    assert torch.equal(ours, sample(change(model), **QUICK))


def test_every_mlp_works_in_place(model):
    assert {name: type(mlp) for name, mlp in mlps(model.clone()).items()} == dict.fromkeys(MLPS, InPlaceMLP)
    results, hidden, handles = [], [], []
    for mlp in mlps(model).values():
        handles.append(mlp.c_fc1.register_forward_hook(lambda *args: results.append(args[-1].data_ptr())))
        handles.append(mlp.c_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0].data_ptr())))
    sample(model, **QUICK)
    for handle in handles:
        handle.remove()
    assert hidden == results
    assert len(hidden) >= 2 * len(MLPS)


def test_the_input_stays_as_it_was_and_gradients_are_comfyuis(model, as_comfyuis):
    model.patch_model(model.load_device)
    mlp = mlps(model)[MLPS[-1]]
    x = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(3)).to(model.load_device)
    before, out = x.clone(), mlp(x)
    assert torch.equal(x, before)
    gradients = []
    for _ in range(2):
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.clone().requires_grad_()
            result = mlp(leaf)
            gradients.append(torch.autograd.grad(result.square().sum(), leaf)[0])
        assert relative_error(result.detach(), out) < 1e-6
        as_comfyuis()
    assert torch.equal(*gradients)
    assert gradients[0].any()
