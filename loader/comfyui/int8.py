"""Products in int8 of a MODEL's packed weights: which of its linears have them, and who needs exact ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..weights.int8_linear import can_be_int8, refused, with_row_scales
from ..weights.layout import is_packed
from .ops import GGUFOps, Int8Products

logger = logging.getLogger(__name__)

# The attention and MLP of the layers, where nearly all of the time goes. What is computed for a timestep alone
# (modulation, t_embedder) has one row of input; it stays exact, and so do the embedders and the final linear, which
# save next to no time and would add to the error (benchmarks/int8.py).
LINEARS = re.compile(r"(double|single)_layers\.\d+\.(attn\.w[12][qkvo]|mlp[CX]?\.c_(fc1|fc2|proj))")

WRAPPER_KEY = "auraflow_gguf.exact"


def install(patcher: ModelPatcher, dtype: torch.dtype, even_if_slower: bool = False) -> str | None:
    """Has a freshly loaded AuraFlow, and all later clones of its patcher, multiply in int8, and counts the scales.

    Args:
        patcher: of a model of `GGUFOps`.
        dtype: what it computes in.
        even_if_slower: also on a CPU without int8 products, where whole numbers are multiplied as float32: for tests.

    Returns:
        Why it does not, and stays as it was; or None.
    """
    device = comfy.model_management.get_torch_device()
    reason = None if even_if_slower and device.type == "cpu" else refused(device, dtype)
    if reason:
        return reason
    model = patcher.model.diffusion_model
    linears = {name: module for name, module in _linears(model) if can_be_int8(module.weight)}
    if not linears:
        return "no linear of the layers has a quantized weight"
    try:
        weights = [
            with_row_scales(module.weight, device, _activations_from(model, name)) for name, module in linears.items()
        ]
    except RuntimeError as error:
        if "out of memory" in str(error).lower():
            raise
        return str(error)
    products = patcher.model.int8_products = Int8Products()
    for module, weight in zip(linears.values(), weights, strict=True):
        module.weight, module.int8 = torch.nn.Parameter(weight, requires_grad=False), products
    patcher.size = 0  # to be counted anew
    logger.info("Matrix products in int8: %d linears of the layers; all others are exact", len(linears))
    return None


def exact(patcher: ModelPatcher) -> ModelPatcher:
    """A clone whose products are exact; the same patcher where they are anyway."""
    if products_of(patcher.model) is None:
        return patcher
    clone = patcher.clone()
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, _with_exact_products)
    return clone


def products_of(model: torch.nn.Module) -> Int8Products | None:
    """What a model's int8 products are switched by, if it has any."""
    return getattr(model, "int8_products", None)


def scale_bytes(model: torch.nn.Module) -> int:
    """Bytes of the scales that packed weights keep for their int8 rows."""
    if products_of(model) is None:
        return 0
    weights = (module.weight for _, module in _linears(model.diffusion_model) if is_packed(module.weight))
    scales = (scale for weight in weights for scale in (weight._params.scale, weight._params.smoothing))
    return sum(scale.nbytes for scale in scales if scale is not None)


def _linears(model: torch.nn.Module) -> Iterator[tuple[str, GGUFOps.Linear]]:
    return ((name, module) for name, module in model.named_modules() if LINEARS.fullmatch(name))


def _activations_from(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The weight whose output the input of a linear is, but for a factor that is alike for all channels."""
    mlp, _, linear = name.rpartition(".")
    return model.get_submodule(f"{mlp}.c_fc2").weight if linear == "c_proj" else None


def _with_exact_products(executor, *args, **kwargs):
    """Wraps ComfyUI's ``BaseModel.apply_model``."""
    products = products_of(executor.class_obj)
    before, products.on = products.on, False
    try:
        return executor(*args, **kwargs)
    finally:
        products.on = before
