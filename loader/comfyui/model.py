"""A GGUF file as a MODEL of ComfyUI."""

from __future__ import annotations

import logging
import os

import comfy.model_management
import comfy.sd
import torch

from ..files.auraflow import AURAFLOW
from ..files.gguf_file import GGUFFile
from ..files.matching import Match
from ..weights.state_dict import log_skipped, open_checked, sizes_by_type, state_dict
from . import modulation
from .ops import GGUFOps
from .patcher import GGUFModelPatcher, GGUFModelPatcherDynamic, for_packed_weights

logger = logging.getLogger(__name__)

# Types that AuraFlow computes in, in the order of ComfyUI's preference.
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load_model(
    path: str | os.PathLike,
    compute_dtype: torch.dtype | None = None,
    modulation_cache: bool = True,
    disable_dynamic: bool = False,
) -> GGUFModelPatcher | GGUFModelPatcherDynamic:
    """Load an AuraFlow transformer.

    Args:
        path: a GGUF file, in any spelling and of any quantization types.
        compute_dtype: what the model computes in; None leaves the choice to ComfyUI.
        modulation_cache: keep modulation, a third of the weights, off the device (modulation.py).
        disable_dynamic: use ComfyUI's static patcher, also where dynamic VRAM is on.

    Returns:
        A model patcher; the packed weights are views on the memory-mapped file.

    Raises:
        ModelFileError: the file is broken, or no AuraFlow transformer.
    """
    file, matched = open_checked(path, AURAFLOW)
    log_skipped(matched, file.path)
    dtype = compute_dtype or _compute_dtype(matched)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state_dict(file, matched, dtype),
        model_options={"dtype": dtype, "custom_operations": GGUFOps},
        disable_dynamic=disable_dynamic,
    )
    # The weights show `dtype` as theirs, and so that is what the model computes in.
    patcher.model.manual_cast_dtype = None
    patcher = for_packed_weights(patcher)
    patcher.cached_patcher_init = (load_model, (os.fspath(path), compute_dtype, modulation_cache))
    logger.info("%s: %s", os.path.basename(file.path), _summary(file, matched, dtype))
    if modulation_cache:
        modulation.install(patcher)
        saved = modulation.mapped_bytes(patcher.model)
        logger.info(
            "Modulation cache: %.0f MB of weights stay off the device, %.0f MB are loaded",
            saved / 2**20,
            patcher.model_size() / 2**20,
        )
    return patcher


def _compute_dtype(matched: Match) -> torch.dtype:
    """ComfyUI's own choice for a model of this size on its device."""
    management = comfy.model_management
    device = management.get_torch_device()
    parameters = sum(torch.Size(source.shape).numel() for source in matched.weights.values())
    dtype = management.unet_dtype(device, model_params=parameters, supported_dtypes=list(COMPUTE_DTYPES))
    return management.unet_manual_cast(dtype, device, list(COMPUTE_DTYPES)) or dtype


def _summary(file: GGUFFile, matched: Match, dtype: torch.dtype) -> str:
    return (
        f"AuraFlow of {matched.dimensions['double_layers']} double and {matched.dimensions['single_layers']} single "
        f"layers, {sizes_by_type(file, matched)}; computes in {str(dtype).removeprefix('torch.')}"
    )
