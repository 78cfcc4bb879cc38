"""Sampling as KSampler does it, small and seeded."""

from __future__ import annotations

import comfy.hooks
import comfy.sample
import torch

QUICK = {"steps": 2, "size": 4, "tokens": 2}
"""Arguments of ``sample`` for tests in which the path counts, not the picture."""


def sample(
    model,
    *,
    sampler="euler",
    scheduler="simple",
    steps=4,
    cfg=3.5,
    size=16,
    tokens=24,
    seed=1,
    hooks=None,
    regions=({},),
    **options,
) -> torch.Tensor:
    """Latents ``(1, 4, size, size)`` float32 of fixed noise and random conditionings.

    Args:
        hooks: act on the positive conditioning.
        regions: the options of each part of the positive conditioning, such as ``{"area": …}``.
        options: as ``comfy.sample.sample`` takes them.
    """
    generator = torch.Generator().manual_seed(seed)
    width = text_width(model)
    noise = torch.randn(1, 4, size, size, generator=generator)
    positive = [[torch.randn(1, tokens, width, generator=generator), region] for region in regions]
    negative = [[torch.randn(1, tokens, width, generator=generator), {}]]
    positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive,
        negative,
        latent,
        seed=seed,
        disable_pbar=True,
        **options,
    )


def text_width(model) -> int:
    """How wide an AuraFlow's conditioning is."""
    return model.model.model_config.unet_config["cond_seq_dim"]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()
