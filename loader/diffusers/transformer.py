"""A GGUF file as diffusers' transformer: the same reader and weights, without ComfyUI."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Mapping

import torch

try:
    from diffusers import AuraFlowTransformer2DModel
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("AuraFlow of diffusers is needed: pip install diffusers", name="diffusers") from error

from ..files.auraflow import AURAFLOW, HEAD_COUNT_KEY
from ..files.errors import ModelFileError
from ..weights.state_dict import open_checked, state_dict, swap_row_halves
from .modules import fill
from .saving import save_dense


def load_diffusers_transformer(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, *, heads: int | None = None
) -> AuraFlowTransformer2DModel:
    """Load an AuraFlow transformer with packed linears, for diffusers' ``AuraFlowPipeline``.

    Args:
        path: a GGUF file in either spelling; diffusers' class takes any width.
        dtype: what the model computes in; ``.to(dtype)`` changes it.
        heads: number of attention heads, which no tensor's shape tells; by default what the file says, or AuraFlow's 12
            for a model of AuraFlow's width.

    Returns:
        diffusers' own class. Its linears are `modules.PackedLinear`, views on the memory-mapped file; it moves,
        offloads and compiles as any model, takes PEFT's adapters beside the packed weights, and saves dense weights.

    Raises:
        ModelFileError: the file is broken, no AuraFlow transformer, or does not say how many heads it has.
    """
    file, matched = open_checked(path, AURAFLOW, fixed={})
    sizes = matched.dimensions
    hidden = sizes["embedding_length"]
    heads = heads or _heads(path, hidden, file.metadata)
    config = {
        "num_mmdit_layers": sizes["double_layers"],
        "num_single_dit_layers": sizes["single_layers"],
        "attention_head_dim": hidden // heads,
        "num_attention_heads": heads,
        "joint_attention_dim": sizes["text_embedding_length"],
        "caption_projection_dim": hidden,
        "pos_embed_max_size": sizes["positional_encoding_length"],
    }
    model, weights = _empty(config), {}
    for native, weight in state_dict(file, matched, dtype).items():
        row, _ = AURAFLOW.find(native, "native")
        weight = swap_row_halves(weight) if row.swap_halves else weight
        name = AURAFLOW.spell(native, "diffusers")
        weights[name] = weight.to(dtype) if row.bare or name.endswith(".bias") else weight
    fill(model, weights)
    save_dense(model, functools.partial(_empty, config))
    model.fuse_lora = types.MethodType(_fuse_lora, model)
    return model.eval()


def _fuse_lora(self: AuraFlowTransformer2DModel, *args, **options) -> None:
    """In the place of diffusers' own: PEFT would add to a dense copy of each weight, which is then thrown away, and
    count the LoRA as fused.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "The weights are packed, and a LoRA cannot be fused into them: it works beside them as it is. To have it in a "
        "file, merge it before the model is converted, or with ComfyUI's node Save AuraFlow as GGUF."
    )


def _empty(config: Mapping[str, int]) -> AuraFlowTransformer2DModel:
    with torch.device("meta"):
        return AuraFlowTransformer2DModel(**config)


def _heads(path: str | os.PathLike, hidden: int, metadata: Mapping[str, object]) -> int:
    said = metadata.get(HEAD_COUNT_KEY)
    if isinstance(said, int) and said > 0 and hidden % said == 0:
        return said
    if said is None and hidden == AURAFLOW.fixed["embedding_length"]:
        return AURAFLOW.fixed["head_count"]
    what = "nothing that says the number of heads" if said is None else f"{HEAD_COUNT_KEY} = {said!r}"
    raise ModelFileError(
        path,
        found=f"a hidden size of {hidden}, and {what}",
        expected="a number of attention heads that divides the hidden size",
        advice="No tensor tells it: give the number (heads=…).",
    )
