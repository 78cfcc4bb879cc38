"""A GGUF file as a MODEL of ComfyUI."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping

import comfy.model_management
import comfy.sd
import torch
from comfy.cli_args import args

from ..files.auraflow import AURAFLOW
from ..files.gguf_file import GGUFFile
from ..files.matching import Match
from ..kernels.processor import multiplies_bfloat16
from ..weights.state_dict import log_skipped, open_checked, sizes_by_type, state_dict
from . import attention, int8, mlp, modulation
from .file_reader import readable
from .ops import GGUFOps
from .patcher import GGUFModelPatcher, GGUFModelPatcherDynamic, for_packed_weights

logger = logging.getLogger(__name__)

# Types that AuraFlow computes in, in the order of ComfyUI's preference.
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MATRIX_MULT = ("exact", "int8")


def load_model(
    path: str | os.PathLike,
    compute_dtype: torch.dtype | None = None,
    modulation_cache: bool = True,
    matrix_mult: str = "exact",
    disable_dynamic: bool = False,
    *,
    int8_even_if_slower: bool = False,
) -> GGUFModelPatcher | GGUFModelPatcherDynamic:
    """Load an AuraFlow transformer.

    Args:
        path: a GGUF file, in any spelling and of any quantization types.
        compute_dtype: what the model computes in; None leaves the choice to ComfyUI, but on a CPU that multiplies
            bfloat16, where ComfyUI takes float32.
        modulation_cache: keep modulation, a third of the weights, off the device (modulation.py).
        matrix_mult: one of `MATRIX_MULT`: exact products of the compute type, or products of int8 in the layers
            (int8.py), which stay exact where the device has none; the log says so.
        disable_dynamic: use ComfyUI's static patcher, also where dynamic VRAM is on.
        int8_even_if_slower: on a CPU that has no int8 products too, for tests.

    Returns:
        A model patcher; the packed weights are views on the memory-mapped file.

    Raises:
        ModelFileError: the file is broken, or no AuraFlow transformer.
        ValueError: ``matrix_mult`` is neither.
    """
    if matrix_mult not in MATRIX_MULT:
        raise ValueError(f"found matrix_mult {matrix_mult!r}, expected one of {', '.join(MATRIX_MULT)}")
    file, matched = open_checked(path, AURAFLOW)
    log_skipped(matched, file.path)
    dtype = compute_dtype or _chosen_dtype(matched)
    weights = readable(state_dict(file, matched, dtype), file, matched, disable_dynamic)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(weights),  # which ComfyUI empties
        model_options={"dtype": dtype, "custom_operations": GGUFOps},
        disable_dynamic=disable_dynamic,
    )
    # The weights show `dtype` as theirs, and so that is what the model computes in.
    patcher.model.manual_cast_dtype = None
    _take_bare_parameters(patcher.model.diffusion_model, weights)
    patcher = for_packed_weights(patcher)
    attention.install(patcher)
    mlp.install(patcher)
    arguments = (os.fspath(path), compute_dtype, modulation_cache, matrix_mult)
    patcher.cached_patcher_init = (functools.partial(load_model, int8_even_if_slower=int8_even_if_slower), arguments)
    name = os.path.basename(file.path)
    logger.info("%s: %s", name, _summary(file, matched, dtype))
    if matrix_mult == "int8" and (reason := int8.install(patcher, dtype, int8_even_if_slower)):
        logger.warning("%s: its matrix products are exact, not int8: %s", name, reason)
    if modulation_cache:
        modulation.install(patcher)
        saved = modulation.mapped_bytes(patcher.model)
        logger.info(
            "Modulation cache: %.0f MB of weights stay off the device, %.0f MB are loaded",
            saved / 2**20,
            patcher.model_size() / 2**20,
        )
    return patcher


def _take_bare_parameters(transformer: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put the file's tensors in place of ComfyUI's copies of them, where these differ in nothing but the memory."""
    for name, copy in list(transformer.named_parameters(recurse=False)):
        weight = weights[name]
        if (copy.device, copy.dtype, copy.shape) == (weight.device, weight.dtype, weight.shape):
            setattr(transformer, name, torch.nn.Parameter(weight, requires_grad=False))


def _chosen_dtype(matched: Match) -> torch.dtype:
    """ComfyUI's own choice for a model of this size on its device; on CPUs that multiply bfloat16, that."""
    management = comfy.model_management
    device = management.get_torch_device()
    parameters = sum(torch.Size(source.shape).numel() for source in matched.weights.values())
    dtype = management.unet_dtype(device, model_params=parameters, supported_dtypes=list(COMPUTE_DTYPES))
    dtype = management.unet_manual_cast(dtype, device, list(COMPUTE_DTYPES)) or dtype
    asked_for = args.fp32_unet or args.force_fp32
    if device.type == "cpu" and dtype == torch.float32 and not asked_for and multiplies_bfloat16():
        logger.info("This CPU multiplies bfloat16 in hardware, which is faster; compute_dtype float32 is more exact.")
        return torch.bfloat16
    return dtype


def _summary(file: GGUFFile, matched: Match, dtype: torch.dtype) -> str:
    return (
        f"AuraFlow of {matched.dimensions['double_layers']} double and {matched.dimensions['single_layers']} single "
        f"layers, {sizes_by_type(file, matched)}; computes in {str(dtype).removeprefix('torch.')}"
    )
