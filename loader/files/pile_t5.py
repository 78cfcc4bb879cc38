"""AuraFlow's text encoder, Pile-T5-XL, as a table: in Hugging Face's names, which ComfyUI has too, and in llama.cpp's.

Names and shapes are those of ComfyUI's ``comfy/text_encoders/t5.py`` with ``t5_pile_config_xl.json`` (transformers'
``UMT5EncoderModel``), the others those of llama.cpp's ``t5encoder`` (gguf-py's ``MODEL_ARCH.T5ENCODER``). As in UMT5,
each layer has a relative position bias of its own. ComfyUI's class has every size as a constant, the number of layers
too, so ``fixed`` holds them all.
"""

from __future__ import annotations

from .architecture import NATIVE, Architecture, Row, Size, linear

HIDDEN = Size("embedding_length")
MLP = Size("feed_forward_length")
HEADS = Size("head_count")
VOCABULARY = Size("vocabulary_size")

STACK = "encoder.block"
HEAD_SIZE = 64
BUCKETS = 32  # of relative positions
NORM_EPSILON = 1e-6

_ATTENTION = f"{STACK}.{{}}.layer.0"
_MLP = f"{STACK}.{{}}.layer.1"

PILE_T5_XL = Architecture(
    name="t5encoder",
    title="the Pile-T5-XL text encoder",
    advice="Pick a file of Pile-T5-XL, AuraFlow's text encoder.",
    rows=(
        Row("shared.weight", "token_embd.weight", (VOCABULARY, HIDDEN), also=("encoder.embed_tokens.weight",)),
        Row(f"{_ATTENTION}.layer_norm.weight", "enc.blk.{}.attn_norm.weight", (HIDDEN,), dense=True),
        *linear(f"{_ATTENTION}.SelfAttention.q", "enc.blk.{}.attn_q", (HEAD_SIZE * HEADS, HIDDEN)),
        *linear(f"{_ATTENTION}.SelfAttention.k", "enc.blk.{}.attn_k", (HEAD_SIZE * HEADS, HIDDEN)),
        *linear(f"{_ATTENTION}.SelfAttention.v", "enc.blk.{}.attn_v", (HEAD_SIZE * HEADS, HIDDEN)),
        *linear(f"{_ATTENTION}.SelfAttention.o", "enc.blk.{}.attn_o", (HIDDEN, HEAD_SIZE * HEADS)),
        Row(
            f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight",
            "enc.blk.{}.attn_rel_b.weight",
            (BUCKETS, HEADS),
            dense=True,
        ),
        Row(f"{_MLP}.layer_norm.weight", "enc.blk.{}.ffn_norm.weight", (HIDDEN,), dense=True),
        *linear(f"{_MLP}.DenseReluDense.wi_0", "enc.blk.{}.ffn_gate", (MLP, HIDDEN)),
        *linear(f"{_MLP}.DenseReluDense.wi_1", "enc.blk.{}.ffn_up", (MLP, HIDDEN)),
        *linear(f"{_MLP}.DenseReluDense.wo", "enc.blk.{}.ffn_down", (HIDDEN, MLP)),
        Row("encoder.final_layer_norm.weight", "enc.output_norm.weight", (HIDDEN,), dense=True),
    ),
    layers={STACK: 1},
    fixed={
        STACK: 24,
        "embedding_length": 2048,
        "feed_forward_length": 5120,
        "head_count": 32,
        "vocabulary_size": 32128,
    },
    square=(),
    annotations={
        "embedding_length": ("embedding_length",),
        "feed_forward_length": ("feed_forward_length",),
        "block_count": (STACK,),
        "attention.head_count": ("head_count",),
    },
    constants={
        "attention.key_length": HEAD_SIZE,
        "attention.value_length": HEAD_SIZE,
        "attention.layer_norm_epsilon": NORM_EPSILON,
        "attention.relative_buckets_count": BUCKETS,
        "attention.layer_norm_rms_epsilon": NORM_EPSILON,
    },
    conventions={"context_length": 512},  # llama.cpp's default: positions are relative, and have no limit
    array_lengths={"tokenizer.ggml.tokens": "vocabulary_size"},
    names_annotated=False,
    aliases=("t5",),
    spellings=(NATIVE, "llama.cpp"),
    written="llama.cpp",
    prefixes=(
        "text_encoders.pile_t5xl.transformer.",
        "pile_t5xl.transformer.",
        "text_encoders.",
        "text_encoder.",
        "transformer.",
        "model.",
        "",
    ),
    other_parts=(
        *("decoder.", "lm_head.", "dec.", "output.weight"),
        *("text_encoders.pile_t5xl.logit_scale", "pile_t5xl.logit_scale", "logit_scale", "spiece_model"),
        *("model.diffusion_model.", "diffusion_model.", "vae.", "first_stage_model."),
    ),
)
