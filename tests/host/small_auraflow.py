"""AuraFlow of a small width in ComfyUI's own classes, packed and dense, for tests that would take long at full width.

ComfyUI's loader knows AuraFlow's one width; its classes take any.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.supported_models
import torch
from auraflow_gguf.devtools.random_models import make_packed_auraflow
from auraflow_gguf.loader.comfyui.ops import GGUFOps
from auraflow_gguf.loader.comfyui.patcher import for_packed_weights
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.weights.state_dict import open_checked, state_dict
from auraflow_gguf.quantizer.recipe import Recipe
from comfy.model_patcher import CoreModelPatcher

from .aura_files import dense_state_dict

HIDDEN = 512  # a whole number of blocks in every type, and too large to be loaded dense
WIDTHS = {"embedding_length": HIDDEN, "head_count": 4, "feed_forward_length": 1536, "text_embedding_length": 128}
TEXT = WIDTHS["text_embedding_length"]


def make_small(path: Path, types: dict[str, str]) -> Path:
    """A file of one double and two single layers; ``types`` are those of the weights by pattern (recipe.py)."""
    make_packed_auraflow(path, Recipe("small", 0, tuple(types.items())), 1, 2, positional=64, widths=WIDTHS, count=64)
    return path


def load_small(path: Path, disable_dynamic: bool = False):
    """The file's MODEL, its weights packed, in float32; what ``load_model`` does but for the detection of the model."""
    file, matched = open_checked(path, AURAFLOW, fixed={})
    patcher = for_packed_weights(_patcher(state_dict(file, matched, torch.float32), GGUFOps))
    patcher.model.manual_cast_dtype = None
    patcher.cached_patcher_init = (load_small, (path,))
    return patcher


def load_small_dense(path: Path, disable_dynamic: bool = False):
    """Its dense twin: the same numbers in float32, by ComfyUI alone."""
    patcher = _patcher(dense_state_dict(path))
    patcher.cached_patcher_init = (load_small_dense, (path,))
    return patcher


def _patcher(weights: dict[str, torch.Tensor], operations: type | None = None) -> CoreModelPatcher:
    sizes = {"cond_seq_dim": TEXT, "dim": HIDDEN, "global_conddim": HIDDEN, "n_heads": WIDTHS["head_count"]}
    sizes |= {"max_seq": weights["positional_encoding"].shape[1], "n_double_layers": 1, "n_layers": 3}
    config = comfy.supported_models.AuraFlow(sizes)
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = operations
    device = comfy.model_management.get_torch_device()
    model = config.get_model(weights)
    model.load_model_weights(weights)
    return CoreModelPatcher(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
