"""The demo where no ComfyUI can be had: a GGUF file sampled by diffusers' transformer, down to a picture of latents."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from PIL import Image

from ..loader.diffusers.transformer import load_diffusers_transformer

SHIFT = 1.73
"""AuraFlow's shift of the noise schedule towards high noise."""


def sigmas(steps: int, shift: float = SHIFT) -> torch.Tensor:
    """``(steps + 1,) float32``: noise levels from 1 down to 0, shifted: σ = s·t / (1 + (s - 1)·t)."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def paint_latents(model: Path, output: Path, steps: int, size: int = 64, seed: int = 0) -> Path:
    """Samples from a GGUF file by Euler steps and random text features, and pictures the latents.

    Args:
        model: the AuraFlow GGUF file.
        output: folder for the picture.
        steps: Euler steps.
        size: height and width of the latents, an eighth of the image's.
        seed: of noise and text features.

    Returns:
        the PNG: the latents' first three channels as red, green and blue, eight pixels a latent.
    """
    transformer = load_diffusers_transformer(model, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, size, size, generator=generator)
    text = torch.randn(1, 256, transformer.config.joint_attention_dim, generator=generator)
    levels = sigmas(steps)
    with torch.inference_mode():
        for step, (sigma, following) in enumerate(itertools.pairwise(levels), start=1):
            velocity = transformer(latents, encoder_hidden_states=text, timestep=sigma[None]).sample
            latents += (following - sigma) * velocity
            print(f"  Euler {step}/{steps}", flush=True)
    picture = _picture(latents[0, :3])
    path = output / f"{model.stem}-latents.png"
    picture.resize((size * 8, size * 8), Image.Resampling.NEAREST).save(path)
    return path


def _picture(channels: torch.Tensor) -> Image.Image:
    """``(3, height, width) float32`` as an image, each channel stretched from its least to its greatest value."""
    low, high = (bound.view(3, 1, 1) for bound in channels.flatten(1).aminmax(dim=1))
    pixels = (channels - low) / (high - low) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
