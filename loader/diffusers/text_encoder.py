"""A GGUF file as transformers' text encoder, for diffusers' pipeline."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import replace

import torch

try:
    from transformers import UMT5Config, UMT5EncoderModel
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("UMT5 is needed: pip install transformers", name="transformers") from error

from ..files.pile_t5 import BUCKETS, HEAD_SIZE, NORM_EPSILON, PILE_T5_XL, STACK
from ..weights.state_dict import open_checked, state_dict
from .modules import fill
from .saving import save_dense

# What transformers too computes in float32 in a float16 model: float16 does not reach as far as its outputs.
IN_FLOAT32 = ".DenseReluDense.wo.weight"


def load_diffusers_text_encoder(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, *, fixed: Mapping[str, int] | None = None
) -> UMT5EncoderModel:
    """Load AuraFlow's text encoder, Pile-T5-XL, with packed linears and a packed embedding.

    Args:
        path: a GGUF file, in any spelling and of any quantization types.
        dtype: what the model computes in.
        fixed: passed to `match`, for an encoder of other sizes.

    Returns:
        transformers' own class, to be used as `load_diffusers_transformer`'s.

    Raises:
        ModelFileError: the file is broken, or no Pile-T5-XL.
    """
    file, matched = open_checked(path, PILE_T5_XL, fixed)
    sizes = matched.dimensions
    config = UMT5Config(
        vocab_size=sizes["vocabulary_size"],
        d_model=sizes["embedding_length"],
        d_kv=HEAD_SIZE,
        d_ff=sizes["feed_forward_length"],
        num_layers=sizes[STACK],
        num_heads=sizes["head_count"],
        relative_attention_num_buckets=BUCKETS,
        layer_norm_epsilon=NORM_EPSILON,
        feed_forward_proj="gated-gelu",
        pad_token_id=1,
        eos_token_id=2,
        architectures=["UMT5EncoderModel"],
        dtype=dtype,
    )
    weights = {name: weight.to(dtype) for name, weight in state_dict(file, matched, dtype).items()}
    if dtype == torch.float16:
        large = {name: source for name, source in matched.weights.items() if name.endswith(IN_FLOAT32)}
        weights |= state_dict(file, replace(matched, weights=large), torch.float32)
    model = _empty(config)
    fill(model, weights)
    model.set_input_embeddings(model.shared)
    save_dense(model, functools.partial(_empty, config))
    return model.eval()


def _empty(config: UMT5Config) -> UMT5EncoderModel:
    with torch.device("meta"):
        return UMT5EncoderModel(config)
