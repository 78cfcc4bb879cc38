"""One evaluation of a loaded model, and the ways in which ComfyUI loads one."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from .sampling import text_width

CPU = torch.device("cpu")


def forward(patcher, *, size=8, tokens=6, batch=1, seed=3, options=None) -> torch.Tensor:
    """The denoised latents ``(batch, 4, size, size)`` of fixed inputs; the patcher's weights must be loaded.

    ``options`` are the transformer options, such as `sampler_options`.
    """
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, 4, size, size, generator=generator)
    context = torch.randn(batch, tokens, text_width(patcher), generator=generator)
    sigma = torch.full((batch,), 0.7)
    return patcher.model.apply_model(latent, sigma, c_crossattn=context, transformer_options=options or {})


def sampler_options(patcher, sigmas=(0.7,)) -> dict:
    """What a sampler passes to the transformer: the patcher's own options and wrappers, and the schedule. Has the
    patcher in charge."""
    patcher.pre_run()
    own = patcher.model_options["transformer_options"]
    return {**own, "wrappers": patcher.wrappers, "sample_sigmas": torch.tensor(sigmas)}


@contextmanager
def loaded(patcher, how: str):
    """The patcher with its weights loaded as ComfyUI does: fully, partly, or not at all ("lowvram")."""
    patcher.unpatch_model(CPU)  # a sampler before may have left the model loaded, with other patches
    size = patcher.model_size()
    if how == "partial unload":
        patcher.patch_model(CPU)
        patcher.partially_unload(CPU, size // 2)
    elif how == "reload":
        patcher.patch_model(CPU)
        patcher.unpatch_model(CPU)
        patcher.patch_model(CPU)
    elif how == "rest later":
        patcher.patch_model(CPU, lowvram_model_memory=size * 9 // 10)
        patcher.load(CPU, full_load=True)
    else:
        patcher.patch_model(CPU, lowvram_model_memory={"full": 0, "half": size // 2, "lowvram": 1}[how])
    try:
        yield patcher
    finally:
        patcher.unpatch_model(CPU)


MODES = ["full", "half", "lowvram", "rest later", "partial unload", "reload"]
