"""ComfyUI's Train LoRA node on a packed model: the gradients and losses of the same training on its dense twin, and a
LoRA that works in every loader."""

from __future__ import annotations

import folder_paths
import pytest
import torch
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.nodes.lora_loader import AuraFlowLoraLoader
from auraflow_gguf.quantizer.recipe import NEEDS_IMATRIX, RECIPES
from comfy_extras.nodes_train import SaveLoRA
from safetensors.torch import save_file

import nodes

from .patches import noise
from .sampling import QUICK, relative_error, sample
from .small_auraflow import load_small, load_small_dense, make_small, small_gguf
from .training import SETTINGS, train

RANK = SETTINGS["rank"]
START = "start_0_steps_.safetensors"
RATE = 1e6  # so large that what a step adds, the gradients, is all that counts
LAYERS = ("double_layers.0", "single_layers.0", "single_layers.1")
LINEARS = ("attn.w1q", "attn.w1k", "attn.w1v", "attn.w1o", "mlp*.c_fc1", "mlp*.c_fc2", "mlp*.c_proj", "mod*")
SLOW = {"IQ1_M", "IQ2_S"}  # whose quantizers take 5 to 12 s to begin; tests/loader/kernels has gradients of every type
EVERY_TYPE = sorted(RECIPES.keys() & QUANT_TYPES.keys() - {*NEEDS_IMATRIX} - SLOW)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small model with weights of every type."""
    places = [f"{layer}.{linear}" for linear in LINEARS for layer in LAYERS]
    types = dict(zip(places, EVERY_TYPE, strict=False))
    assert {*types.values()} == {*EVERY_TYPE}
    return make_small(tmp_path_factory.mktemp("small") / "small.gguf", types | {"*_layers.*": "Q8_0"})


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A folder in which ComfyUI finds LoRAs."""
    folder = tmp_path_factory.mktemp("loras")
    folder_paths.add_model_folder_path("loras", str(folder))
    yield folder
    folder_paths.folder_names_and_paths["loras"][0].remove(str(folder))


@pytest.fixture(scope="module")
def start(file, loras):
    """Factors for every linear, from which training goes on: none is zero, and so all have gradients."""
    factors = {}
    for name, module in load_small(file).model.named_modules():
        if isinstance(module, torch.nn.Linear):
            factors[f"{name}.lora_up.weight"] = noise(module.out_features, RANK)
            factors[f"{name}.lora_down.weight"] = noise(RANK, module.in_features)
    save_file(factors, loras / START)
    return factors


@pytest.mark.parametrize(
    ("training_dtype", "bypass_mode"),
    [("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False)],
    ids=["fp32 beside", "fp32 merged", "bf16 beside", "bf16 merged"],
)
@pytest.mark.parametrize("gradient_checkpointing", [True, False], ids=["again", "kept"])
def test_gradients_are_those_of_the_dense_twin(file, start, gradient_checkpointing, training_dtype, bypass_mode):
    settings = {"existing_lora": START, "learning_rate": RATE, "training_dtype": training_dtype}
    settings |= {"gradient_checkpointing": gradient_checkpointing, "bypass_mode": bypass_mode}
    with torch.inference_mode(False):  # older nodes train the weights that they are given
        packed, losses = train(load_small(file), **settings)
        dense, expected = train(load_small_dense(file), **settings)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert packed.keys() == dense.keys()
    assert start.keys() < packed.keys()
    for name, tensor in dense.items():
        assert relative_error(packed[name], tensor) < 1e-4, name
    for name, tensor in start.items():
        assert (packed[name] - tensor).norm() > 10 * tensor.norm(), name


def test_a_trained_lora_is_that_of_the_dense_twin_and_works_in_every_loader(loras, tmp_path, monkeypatch):
    path, settings = small_gguf("Q4_0"), {"optimizer": "AdamW", "learning_rate": 0.03}
    with torch.inference_mode(False):  # as above
        trained, losses = train(load_small(path), **settings)
        dense, expected = train(load_small_dense(path), **settings)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert trained.keys() == dense.keys()
    for name, tensor in dense.items():
        assert relative_error(trained[name], tensor) < 1e-4, name

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    SaveLoRA.execute(trained, "trained", 1)
    (saved,) = tmp_path.iterdir()
    saved.rename(loras / saved.name)
    model = load_small(path)
    (ours,) = AuraFlowLoraLoader.execute(model, saved.name, 1.0).args
    (stock,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, saved.name, 1.0)
    latents = sample(stock, **QUICK)
    assert relative_error(sample(ours, **QUICK), latents) < 1e-5
    assert relative_error(sample(model, **QUICK), latents) > 1e-3
