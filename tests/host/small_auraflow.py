"""AuraFlow of a small width in ComfyUI's own classes, packed and dense, for tests that would take long at full width.

ComfyUI's loader knows AuraFlow's one width; its classes take any.
"""

from __future__ import annotations

import functools
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from auraflow_gguf.devtools.random_models import make_packed_auraflow
from auraflow_gguf.loader.comfyui import int8, mlp, modulation
from auraflow_gguf.loader.comfyui.file_reader import readable
from auraflow_gguf.loader.comfyui.ops import GGUFOps
from auraflow_gguf.loader.comfyui.patcher import for_packed_weights
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.weights.state_dict import open_checked, state_dict
from auraflow_gguf.quantizer.recipe import Recipe, recipe_for
from comfy.model_patcher import ModelPatcher

from .aura_files import code_hash, dense_state_dict, made, recipe_name

HIDDEN = 512  # a whole number of blocks in every type, and too large to be loaded dense
WIDTHS = {"embedding_length": HIDDEN, "head_count": 4, "feed_forward_length": 1536, "text_embedding_length": 128}
TEXT = WIDTHS["text_embedding_length"]


def small_gguf(type_name: str, *tensor_types: str) -> Path:
    """A file of one recipe, as `make_gguf` makes one at full width, of one double and two single layers."""

    def make(target: Path) -> None:
        _make(target, recipe_for(type_name, tensor_types))

    return made(f"{recipe_name('small-auraflow', type_name, *tensor_types)}.{code_hash()}.gguf", make)


def make_small(path: Path, types: dict[str, str]) -> Path:
    """The same with the types of the weights by pattern (recipe.py)."""
    _make(path, Recipe("small", 0, tuple(types.items())))
    return path


def _make(path: Path, recipe: Recipe) -> None:
    make_packed_auraflow(path, recipe, 1, 2, positional=64, widths=WIDTHS, count=64)


def load_small(
    path: Path,
    dtype: torch.dtype = torch.float32,
    modulation_cache: bool = True,
    matrix_mult: str = "exact",
    disable_dynamic: bool = False,
):
    """The file's MODEL, its weights packed: what ``load_model`` does but for the detection of the model. Products in
    int8 are made on any CPU."""
    file, matched = open_checked(path, AURAFLOW, fixed={})
    weights = readable(state_dict(file, matched, dtype), file, matched, disable_dynamic)
    patcher = for_packed_weights(small_patcher(weights, GGUFOps, dtype, disable_dynamic))
    patcher.model.manual_cast_dtype = None
    mlp.install(patcher)
    patcher.cached_patcher_init = (load_small, (path, dtype, modulation_cache, matrix_mult))
    if matrix_mult == "int8":
        assert int8.install(patcher, dtype, even_if_slower=True) is None
    if modulation_cache:
        modulation.install(patcher)
    return patcher


@functools.lru_cache(maxsize=4)
def small_dense_twin(path: Path):
    """`load_small_dense`, once for all tests, which patch clones of it."""
    return load_small_dense(path)


def load_small_dense(path: Path, disable_dynamic: bool = False):
    """Its dense twin: the same numbers in float32, by ComfyUI alone."""
    patcher = small_patcher(dense_state_dict(path), disable_dynamic=disable_dynamic)
    patcher.cached_patcher_init = (load_small_dense, (path,))
    return patcher


def small_patcher(
    weights: dict[str, torch.Tensor],
    operations: type | None = None,
    dtype: torch.dtype = torch.float32,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """ComfyUI's MODEL of a state dict of these widths, which its loader does not know."""
    sizes = {"cond_seq_dim": TEXT, "dim": HIDDEN, "global_conddim": HIDDEN, "n_heads": WIDTHS["head_count"]}
    sizes |= {"max_seq": weights["positional_encoding"].shape[1], "n_double_layers": 1, "n_layers": 3}
    config = comfy.supported_models.AuraFlow(sizes)
    config.set_inference_dtype(dtype, None)
    config.custom_operations = operations
    device = comfy.model_management.get_torch_device()
    model = config.get_model(weights)
    model.load_model_weights(weights)
    patcher = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
