"""The table of Pile-T5-XL: against transformers' and gguf-py's own names, and on files that users have."""

import pytest
import torch
from auraflow_gguf.devtools.random_models import native_shapes
from auraflow_gguf.loader.files.architecture import NATIVE
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.matching import annotations, match
from auraflow_gguf.loader.files.parts import part_of
from auraflow_gguf.loader.files.pile_t5 import PILE_T5_XL, STACK
from gguf import MODEL_ARCH, get_tensor_name_map
from transformers import UMT5Config, UMT5EncoderModel

from .test_auraflow import auraflow
from .test_recognise import CLIP_G, CLIP_L, FLUX, VAE

LLAMA_CPP = "llama.cpp"


def hugging_face(layers=24):
    with torch.device("meta"):
        config = UMT5Config(
            vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=layers, num_heads=32,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        state = UMT5EncoderModel(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def shapes():
    return hugging_face()


@pytest.fixture(scope="module")
def llama_cpp(shapes):
    names = get_tensor_name_map(MODEL_ARCH.T5ENCODER, 24)
    return {names.get_name(name, (".weight",)): shape for name, shape in shapes.items() if "embed_tokens" not in name}


def t5(spelling, layers=24, width=4096, mlp=10240, heads=64, vocabulary=32128, bias_in_every_layer=True):
    """All tensors of an encoder of T5's kind: in UMT5 each layer has a relative position bias, in T5 only the first."""
    sizes = {"embedding_length": width, "feed_forward_length": mlp, "head_count": heads, "vocabulary_size": vocabulary}
    shapes = native_shapes(PILE_T5_XL, sizes | {STACK: layers})
    if not bias_in_every_layer:
        shapes = {n: s for n, s in shapes.items() if "relative_attention_bias" not in n or n.startswith(f"{STACK}.0.")}
    return {name if spelling == NATIVE else PILE_T5_XL.written_name(name): shape for name, shape in shapes.items()}


def read(shapes, metadata=None, fixed=None):
    return match(PILE_T5_XL, shapes, metadata=metadata or {}, path="models/text_encoders/t5.gguf", fixed=fixed)


def refused(shapes, metadata=None):
    with pytest.raises(ModelFileError) as caught:
        read(shapes, metadata)
    return str(caught.value)


def test_the_names_and_shapes_of_transformers(shapes):
    result = read(shapes)
    assert (result.spelling, result.prefix) == (NATIVE, "")
    assert len(result.weights) == 24 * 10 + 2
    assert sum(torch.Size(source.shape).numel() for source in result.weights.values()) == 1_223_550_976
    # transformers ties the two, and files hold one or both
    assert set(shapes) - set(result.weights) == {"encoder.embed_tokens.weight"}
    assert result.skipped == ("encoder.embed_tokens.weight",)
    alone = {name: shape for name, shape in shapes.items() if name != "shared.weight"}
    assert read(alone).weights["shared.weight"].name == "encoder.embed_tokens.weight"


def test_the_names_of_llama_cpp(shapes, llama_cpp):
    result = read(llama_cpp, {"general.architecture": "t5encoder"})
    assert result.spelling == "llama.cpp"
    assert result.weights.keys() == read(shapes).weights.keys()
    assert {PILE_T5_XL.written_name(name) for name in result.weights} == set(llama_cpp)
    assert result.weights["encoder.block.3.layer.1.DenseReluDense.wi_0.weight"].name == "enc.blk.3.ffn_gate.weight"


@pytest.mark.parametrize("prefix", PILE_T5_XL.prefixes)
def test_prefixes_and_other_parts(shapes, prefix):
    others = {"vae.decoder.conv_in.weight": (1,), "text_encoders.pile_t5xl.logit_scale": ()}
    others |= {f"model.diffusion_model.{name}": shape for name, shape in auraflow().items()}
    result = read({f"{prefix}{name}": shape for name, shape in shapes.items()} | others)
    assert result.prefix == prefix
    assert set(result.skipped) == {*others, f"{prefix}encoder.embed_tokens.weight"}


def test_a_decoder_is_left_out(llama_cpp):
    decoder = {
        "dec.blk.0.cross_attn_q.weight": (2048, 2048),
        "dec.output_norm.weight": (2048,),
        "output.weight": (8, 8),
    }
    result = read(llama_cpp | decoder, {"general.architecture": "t5", "t5.block_count": 24})
    assert set(result.skipped) == set(decoder)
    assert "without enc.blk.0.attn_q.weight" in refused(decoder | {
        name: shape for name, shape in llama_cpp.items() if name != "enc.blk.0.attn_q.weight"
    })  # fmt: skip


def test_annotations_are_llama_cpps(llama_cpp):
    written = annotations(read(llama_cpp))
    assert written == {
        "general.architecture": "t5encoder",
        "t5encoder.embedding_length": 2048,
        "t5encoder.feed_forward_length": 5120,
        "t5encoder.block_count": 24,
        "t5encoder.attention.head_count": 32,
        "t5encoder.attention.key_length": 64,
        "t5encoder.attention.value_length": 64,
        "t5encoder.attention.layer_norm_epsilon": 1e-6,
        "t5encoder.attention.relative_buckets_count": 32,
        "t5encoder.attention.layer_norm_rms_epsilon": 1e-6,
    }
    in_float32 = torch.tensor(1e-6).item()
    assert read(llama_cpp, written | {"t5encoder.attention.layer_norm_rms_epsilon": in_float32})


@pytest.mark.parametrize(
    ("metadata", "contradiction"),
    [
        ({"general.architecture": "flux"}, "general.architecture = 'flux' in its metadata, but 't5encoder'"),
        ({"general.architecture": "t5", "t5.block_count": 12}, "t5.block_count = 12 in its metadata, but 24"),
        ({"t5encoder.attention.layer_norm_rms_epsilon": 1e-5}, "= 1e-05 in its metadata, but 1e-06"),
        ({"tokenizer.ggml.tokens": ["a"] * 32100}, "32100 tokenizer.ggml.tokens in its metadata, but 32128"),
    ],
)
def test_a_contradiction_is_refused(llama_cpp, metadata, contradiction):
    assert contradiction in refused(llama_cpp, metadata)


FOR_OTHERS = (
    "AuraFlow's text encoder is Pile-T5-XL; this one belongs in models/text_encoders, for 'CLIPLoader (GGUF)' of "
    "ComfyUI-GGUF or ComfyUI's 'Load CLIP'."
)


@pytest.mark.parametrize(
    ("shapes", "found", "advice"),
    [
        (t5(LLAMA_CPP, bias_in_every_layer=False), "a T5-XXL text encoder", FOR_OTHERS),
        (t5(NATIVE, bias_in_every_layer=False), "a T5-XXL text encoder", FOR_OTHERS),
        (t5(LLAMA_CPP, vocabulary=256384), "a UMT5-XXL text encoder", FOR_OTHERS),
        (t5(NATIVE, vocabulary=256384), "a UMT5-XXL text encoder", FOR_OTHERS),
        (t5(LLAMA_CPP, 24, 2048, 5120, 32, bias_in_every_layer=False), "a T5 text encoder", FOR_OTHERS),
        (t5(NATIVE, 24, 1024, 2816, 16), "a T5 text encoder", FOR_OTHERS),
        (t5(LLAMA_CPP, 12, 768, 2048, 12, 256384), "a T5 text encoder", FOR_OTHERS),
        (t5(NATIVE, 26, 1024, 2816, 16), "a T5 text encoder", FOR_OTHERS),
        (CLIP_L, "a CLIP-L text encoder", FOR_OTHERS),
        (CLIP_G, "a CLIP-G text encoder", FOR_OTHERS),
        (
            auraflow(),
            "an AuraFlow transformer",
            "Move it to models/diffusion_models and load it with 'Load AuraFlow (GGUF)'.",
        ),
        (VAE, "a VAE", "Move it to models/vae and load it with 'Load VAE'. AuraFlow takes SDXL's."),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_name(shapes, found, advice):
    assert refused(shapes) == f"t5.gguf: found {found}, expected the Pile-T5-XL text encoder. {advice}"


def test_damage_is_not_taken_for_another_model(llama_cpp):
    without = dict(llama_cpp)
    del without["enc.blk.1.attn_rel_b.weight"]
    assert "241 of the 242 tensors of the Pile-T5-XL text encoder, without enc.blk.1.attn_rel_b" in refused(without)
    resized = llama_cpp | {"enc.blk.0.ffn_up.weight": (5120, 2047)}
    assert "enc.blk.0.ffn_up.weight of shape (5120, 2047), expected (5120, 2048)" in refused(resized)
    vocabulary = llama_cpp | {"token_embd.weight": (32000, 2048)}
    assert "token_embd.weight of shape (32000, 2048), expected (32128, 2048)" in refused(vocabulary)


def test_the_number_of_layers_is_fixed_unless_it_is_given():
    assert "25 layers of encoder.block, expected 24" in refused(hugging_face(25))
    assert "without encoder.block.23.layer.0.layer_norm.weight" in refused(hugging_face(23))
    assert read(hugging_face(2), fixed=PILE_T5_XL.fixed | {STACK: 2}).dimensions[STACK] == 2


def test_the_tensors_tell_the_parts_apart(shapes, llama_cpp):
    assert part_of(shapes) is part_of(llama_cpp) is PILE_T5_XL
    assert part_of(auraflow()) is AURAFLOW
    both = {f"text_encoders.pile_t5xl.transformer.{name}": shape for name, shape in shapes.items()}
    both |= {f"model.diffusion_model.{name}": shape for name, shape in auraflow().items()}
    assert part_of(both) is AURAFLOW
    assert part_of(both, "text_encoder") is PILE_T5_XL
    assert part_of(FLUX) is AURAFLOW
