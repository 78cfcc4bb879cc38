"""ComfyUI's Train LoRA node on a packed model: the tensors and losses of the same training on its dense twin."""

from __future__ import annotations

import inspect

import pytest
import torch
from auraflow_gguf.loader.comfyui.model import load_model
from comfy_extras.nodes_train import TrainLoraNode

from .aura_files import load_dense, make_gguf
from .sampling import relative_error


def train(model) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A LoRA of rank 2 beside the weights, and the loss of each step."""
    generator = torch.Generator().manual_seed(1)
    settings = {
        "model": model,
        "latents": {"samples": torch.randn(1, 4, 8, 8, generator=generator)},
        "positive": [[torch.randn(1, 6, 2048, generator=generator), {}]],
        "batch_size": 1,
        "steps": 2,
        "grad_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "rank": 2,
        "optimizer": "SGD",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": True,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": True,
    }
    known = inspect.signature(TrainLoraNode.execute).parameters  # older ones have fewer
    settings = {name: value if name == "positive" else [value] for name, value in settings.items() if name in known}
    settings["positive"] = [settings["positive"]]
    torch.manual_seed(0)  # of the factors that are not zero at first
    lora, losses, _ = TrainLoraNode.execute(**settings).args
    return lora, losses["loss"]


def dense_twin(disable_dynamic=False):
    """The dense twin as the node clones it: loaded once more."""
    with torch.inference_mode(False):  # older nodes train the weights that they are given
        model = load_dense(make_gguf("Q4_0"))
    model.cached_patcher_init = (dense_twin, ())
    return model


def test_a_lora_trained_on_packed_weights_is_that_of_the_dense_twin():
    packed, losses = train(load_model(make_gguf("Q4_0"), torch.float32, modulation_cache=False))
    dense, expected = train(dense_twin())
    assert losses == pytest.approx(expected, rel=1e-4)
    assert packed.keys() == dense.keys()
    assert len(packed) > 50
    for name, tensor in dense.items():
        assert relative_error(packed[name], tensor) < 1e-4, name
