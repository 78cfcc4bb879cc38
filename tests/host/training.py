"""A LoRA by ComfyUI's Train LoRA node, small and seeded."""

from __future__ import annotations

import inspect

import torch
from comfy_extras.nodes_train import TrainLoraNode

from .sampling import text_width

SETTINGS = {
    "batch_size": 1,
    "steps": 1,
    "grad_accumulation_steps": 1,
    "learning_rate": 1.0,
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


def train(model, *, size: int = 8, tokens: int = 6, **changed) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The tensors of a LoRA beside the weights, and the loss of each step.

    Args:
        model: a MODEL of AuraFlow.
        size: of the latent that is learned, ``(1, 4, size, size)``.
        tokens: of its text.
        changed: other inputs of the node than `SETTINGS`.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "latents": {"samples": torch.randn(1, 4, size, size, generator=generator)},
        "positive": [[torch.randn(1, tokens, text_width(model), generator=generator), {}]],
    }
    known = inspect.signature(TrainLoraNode.execute).parameters  # older ones have fewer
    settings = {"model": model, **inputs, **SETTINGS, **changed}
    torch.manual_seed(0)  # of the timestep, and of the factors that are not zero at first
    lora, losses, _ = TrainLoraNode.execute(**{name: [value] for name, value in settings.items() if name in known}).args
    return lora, losses["loss"]
