"""AuraFlow's transformer as a table, in its own names and in diffusers'.

Native names and shapes are those of ComfyUI's ``comfy/ldm/aura/mmdit.py``, the others those of diffusers'
``AuraFlowTransformer2DModel``. Pony V7 is the same architecture. ComfyUI's class has the hidden size, the heads and the
MLP's width as constants, so ``fixed`` holds them; diffusers' class takes any. ComfyUI builds the last of all layers
without the context's MLP, so at least one single layer has to follow the double ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .architecture import Architecture, Row, Size, linear

HIDDEN = Size("embedding_length")
MLP = Size("feed_forward_length")
TEXT = Size("text_embedding_length")
POSITIONS = Size("positional_encoding_length")

TIME_FREQUENCIES = 256
PATCH = 16  # 2 × 2 pixels of a latent of 4 channels
REGISTERS = 8

_DOUBLE_LAYER = (
    # the text
    ("attn.w1q", "attn.add_q_proj", (HIDDEN, HIDDEN)),
    ("attn.w1k", "attn.add_k_proj", (HIDDEN, HIDDEN)),
    ("attn.w1v", "attn.add_v_proj", (HIDDEN, HIDDEN)),
    ("attn.w1o", "attn.to_add_out", (HIDDEN, HIDDEN)),
    ("mlpC.c_fc1", "ff_context.linear_1", (MLP, HIDDEN)),
    ("mlpC.c_fc2", "ff_context.linear_2", (MLP, HIDDEN)),
    ("mlpC.c_proj", "ff_context.out_projection", (HIDDEN, MLP)),
    ("modC.1", "norm1_context.linear", (6 * HIDDEN, HIDDEN)),
    # the image
    ("attn.w2q", "attn.to_q", (HIDDEN, HIDDEN)),
    ("attn.w2k", "attn.to_k", (HIDDEN, HIDDEN)),
    ("attn.w2v", "attn.to_v", (HIDDEN, HIDDEN)),
    ("attn.w2o", "attn.to_out.0", (HIDDEN, HIDDEN)),
    ("mlpX.c_fc1", "ff.linear_1", (MLP, HIDDEN)),
    ("mlpX.c_fc2", "ff.linear_2", (MLP, HIDDEN)),
    ("mlpX.c_proj", "ff.out_projection", (HIDDEN, MLP)),
    ("modX.1", "norm1.linear", (6 * HIDDEN, HIDDEN)),
)

_SINGLE_LAYER = (
    ("attn.w1q", "attn.to_q", (HIDDEN, HIDDEN)),
    ("attn.w1k", "attn.to_k", (HIDDEN, HIDDEN)),
    ("attn.w1v", "attn.to_v", (HIDDEN, HIDDEN)),
    ("attn.w1o", "attn.to_out.0", (HIDDEN, HIDDEN)),
    ("mlp.c_fc1", "ff.linear_1", (MLP, HIDDEN)),
    ("mlp.c_fc2", "ff.linear_2", (MLP, HIDDEN)),
    ("mlp.c_proj", "ff.out_projection", (HIDDEN, MLP)),
    ("modCX.1", "norm1.linear", (6 * HIDDEN, HIDDEN)),
)


def _layers(native: str, diffusers: str, linears: Iterable[tuple[str, str, tuple[Size, Size]]]) -> Iterator[Row]:
    for native_name, diffusers_name, shape in linears:
        yield from linear(f"{native}.{{}}.{native_name}", f"{diffusers}.{{}}.{diffusers_name}", shape)


AURAFLOW = Architecture(
    name="aura",
    title="an AuraFlow transformer",
    advice="Pick a file of AuraFlow's transformer, or of a fine-tune such as Pony V7.",
    rows=(
        Row("positional_encoding", "pos_embed.pos_embed", (1, POSITIONS, HIDDEN), bare=True),
        Row("register_tokens", "register_tokens", (1, REGISTERS, HIDDEN), bare=True),
        *linear("t_embedder.mlp.0", "time_step_proj.linear_1", (HIDDEN, TIME_FREQUENCIES), bias=True),
        *linear("t_embedder.mlp.2", "time_step_proj.linear_2", (HIDDEN, HIDDEN), bias=True),
        *linear("init_x_linear", "pos_embed.proj", (HIDDEN, PATCH), bias=True),
        *linear("cond_seq_linear", "context_embedder", (HIDDEN, TEXT)),
        *_layers("double_layers", "joint_transformer_blocks", _DOUBLE_LAYER),
        *_layers("single_layers", "single_transformer_blocks", _SINGLE_LAYER),
        *linear("modF.1", "norm_out.linear", (2 * HIDDEN, HIDDEN), swap_halves=True),
        *linear("final_linear", "proj_out", (PATCH, HIDDEN)),
    ),
    layers={"double_layers": 1, "single_layers": 1},
    fixed={
        "embedding_length": 3072,
        "head_count": 12,
        "feed_forward_length": 8192,
        "text_embedding_length": 2048,
    },
    square=("positional_encoding_length",),
    annotations={
        "block_count": ("double_layers", "single_layers"),
        "double_block_count": ("double_layers",),
        "embedding_length": ("embedding_length",),
        "feed_forward_length": ("feed_forward_length",),
        "attention.head_count": ("head_count",),
        "text_embedding_length": ("text_embedding_length",),
        "positional_encoding_length": ("positional_encoding_length",),
    },
)

HEAD_COUNT_KEY = f"{AURAFLOW.name}.attention.head_count"
"""The annotation that says what no tensor's shape tells."""
