"""A GGUF file as diffusers' transformer: the same reader and weights, without ComfyUI."""

from __future__ import annotations

import os

import torch

try:
    from diffusers import AuraFlowTransformer2DModel
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("AuraFlow of diffusers is needed: pip install diffusers", name="diffusers") from error

from ..files.auraflow import AURAFLOW
from ..weights.state_dict import open_checked, state_dict, swap_row_halves


def load_diffusers_transformer(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, *, heads: int = 12
) -> AuraFlowTransformer2DModel:
    """Load an AuraFlow transformer with packed linears.

    Args:
        path: a GGUF file in either spelling; diffusers' class takes any width.
        dtype: what the model computes in.
        heads: number of attention heads, which no tensor's shape tells.

    Raises:
        ModelFileError: the file is broken, or no AuraFlow transformer.
    """
    file, matched = open_checked(path, AURAFLOW, fixed={})
    sizes = matched.dimensions
    hidden = sizes["embedding_length"]
    with torch.device("meta"):
        model = AuraFlowTransformer2DModel(
            num_mmdit_layers=sizes["double_layers"],
            num_single_dit_layers=sizes["single_layers"],
            attention_head_dim=hidden // heads,
            num_attention_heads=heads,
            joint_attention_dim=sizes["text_embedding_length"],
            caption_projection_dim=hidden,
            pos_embed_max_size=sizes["positional_encoding_length"],
        )
    for native, weight in state_dict(file, matched, dtype).items():
        row, _ = AURAFLOW.find(native, "native")
        if row.swap_halves:
            weight = swap_row_halves(weight)
        module, _, name = AURAFLOW.spell(native, "diffusers").rpartition(".")
        weight = weight.to(dtype) if row.bare or name == "bias" else weight
        model.get_submodule(module).register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
    return model.eval()
