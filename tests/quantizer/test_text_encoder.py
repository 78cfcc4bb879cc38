"""Conversions of a small text encoder: hidden 256, MLP 512, 4 heads of 64, two layers, a vocabulary of 320."""

import json

import gguf
import pytest
import torch
from auraflow_gguf.devtools.random_models import native_shapes, random_weight
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.loader.files.pile_t5 import PILE_T5_XL, STACK
from auraflow_gguf.quantizer.convert import convert, part_in
from auraflow_gguf.quantizer.inspection import describe, verify
from auraflow_gguf.quantizer.quality.comparison import compare
from auraflow_gguf.quantizer.recipe import RECIPES, recipe_for
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

from .. import ggml
from .small_model import native_weights

SIZES = {"embedding_length": 256, "feed_forward_length": 512, "head_count": 4, "vocabulary_size": 320, STACK: 2}
WEIGHTS = {
    name: random_weight(name, shape, seed=0).to(torch.float16)
    for name, shape in native_shapes(PILE_T5_XL, SIZES).items()
}
IN_FLOAT32 = ("layer_norm.weight", "relative_attention_bias.weight")


@pytest.fixture
def source(tmp_path):
    save_file(WEIGHTS, tmp_path / "t5.safetensors")
    return tmp_path / "t5.safetensors"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A SentencePiece model with the special tokens of Pile-T5's."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    words = [f"{a}{b}" for a in ("light", "moon", "dawn", "sea") for b in ("house", "lit", "light", "side")]
    SentencePieceTrainer.train(
        sentence_iterator=iter(words * 4), model_prefix=str(prefix), model_type="bpe", vocab_size=300,
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def converted(source, type_name="Q8_0", **options):
    target = source.parent / f"{type_name}.gguf"
    convert(source, target, type_name, fixed=SIZES, **options)
    return open_gguf(target)


def contents(file):
    return {
        name: (info.shape, info.type.name, file.packed(name).numpy().tobytes()) for name, info in file.tensors.items()
    }


def types(file):
    names = {PILE_T5_XL.spell(name, "native"): info.type.name for name, info in file.tensors.items()}
    assert names.keys() == WEIGHTS.keys()
    return names


@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "Q4_K", "Q4_K_M"])
def test_every_weight_has_its_type_and_norms_and_relative_biases_are_float32(source, type_name):
    chosen = types(converted(source, type_name))
    for name in WEIGHTS:
        if name.endswith(IN_FLOAT32):
            assert chosen[name] == "F32", name
        elif type_name == "Q4_K_M" and name.endswith((".wo.weight", ".v.weight", ".o.weight", "shared.weight")):
            assert chosen[name] == "Q5_K", name
        else:
            assert chosen[name] == {"Q4_K_M": "Q4_K"}.get(type_name, type_name), name
    verify_and_compare(source, source.parent / f"{type_name}.gguf")


def verify_and_compare(source, target):
    assert verify(target, fixed=SIZES) == []
    everything, _ = compare(source, target, fixed=SIZES)
    assert everything.relative_error < 0.1
    described = describe(target, fixed=SIZES)
    assert (described.model, described.spelling) == ("the Pile-T5-XL text encoder", "llama.cpp")
    assert described.memory["with_cache"] == described.memory["without_cache"] == described.total.nbytes
    assert described.annotated
    names = {group.name: sum(group.types.values()) for group in described.groups}
    assert names == {"attention": 10, "MLP": 6, "embedding": 1, "norms": 5, "all": 22}


def test_every_recipe_names_a_type_for_the_embedding_that_needs_no_importance_matrix():
    chosen = {name: recipe.type_of("shared.weight", (320, 256), torch.float16).name for name, recipe in RECIPES.items()}
    assert chosen["IQ2_XXS"] == chosen["IQ1_S"] == "Q2_K"
    assert chosen["Q2_K"] == "Q3_K"
    assert chosen["IQ4_XS"] == "IQ4_XS"


def test_every_source_gives_the_same_tensors(source, tmp_path):
    expected = contents(converted(source))
    renamed = {("encoder.embed_tokens.weight" if name == "shared.weight" else name): w for name, w in WEIGHTS.items()}
    prefix = "text_encoders.pile_t5xl.transformer."
    transformer = {f"model.diffusion_model.{name}": weight for name, weight in native_weights().items()}
    all_in_one = {f"{prefix}{name}": weight for name, weight in WEIGHTS.items()} | transformer
    all_in_one |= {"text_encoders.pile_t5xl.logit_scale": torch.tensor(4.6)}
    for number, (weights, part) in enumerate(((renamed, None), (all_in_one, "text_encoder"))):
        path = tmp_path / f"{number}" / "model.safetensors"
        path.parent.mkdir()
        save_file(weights, path)
        assert contents(converted(path, part=part)) == expected
    assert part_in(source) == "text_encoder"
    assert part_in(path) == "transformer"

    folder = tmp_path / "diffusers"
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model", "text_encoder/model.fp16"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(native_weights() if "transformer" in name else WEIGHTS, f"{folder / name}.safetensors")
    assert contents(converted(folder, part="text_encoder", overwrite=True)) == expected
    assert contents(converted(folder / "text_encoder")) == expected
    # from one GGUF file to another, the bytes are copied
    again = tmp_path / "again.gguf"
    convert(source.parent / "Q8_0.gguf", again, "Q8_0", fixed=SIZES)
    assert contents(open_gguf(again)) == expected


def test_the_metadata_are_llama_cpps(source, tokenizer):
    metadata = converted(source, "Q4_K_M", tokenizer=tokenizer).metadata
    assert metadata["general.architecture"] == "t5encoder"
    assert metadata["t5encoder.context_length"] == 512
    assert metadata["t5encoder.block_count"] == 2
    assert metadata["t5encoder.attention.relative_buckets_count"] == 32
    assert metadata["general.file_type"] == 15
    assert not any(key.endswith(("tensor_names", ".bias")) for key in metadata)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    assert len(tokens) == len(metadata["tokenizer.ggml.scores"]) == 320
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[-1] == "[PAD319]"
    kinds = list(metadata["tokenizer.ggml.token_type"])
    assert (len(kinds), kinds[:4], kinds[-1]) == (320, [2, 3, 3, 6], 5)
    assert metadata["tokenizer.ggml.padding_token_id"] == 1
    fields = gguf.GGUFReader(source.parent / "Q4_K_M.gguf").fields
    types = gguf.GGUFValueType
    assert fields["tokenizer.ggml.token_type"].types == [types.ARRAY, types.INT32]
    assert fields["tokenizer.ggml.scores"].types == [types.ARRAY, types.FLOAT32]
    assert fields["t5encoder.attention.layer_norm_rms_epsilon"].types == [types.FLOAT32]
    again = source.parent / "again.gguf"
    convert(source.parent / "Q4_K_M.gguf", again, "Q4_K_M", fixed=SIZES)
    carried = open_gguf(again).metadata
    assert list(carried["tokenizer.ggml.tokens"]) == tokens
    assert carried["tokenizer.ggml.add_eos_token"] is True


def test_a_tokenizer_for_a_transformer_has_no_effect_and_that_is_said(tmp_path, tokenizer, caplog):
    save_file(native_weights(), tmp_path / "aura.safetensors")
    message = "The tokenizer tokenizer.model has no effect: only a text encoder's file has one."
    for given, said in ((tokenizer, [message]), (None, [])):
        caplog.clear()
        convert(tmp_path / "aura.safetensors", tmp_path / "a.gguf", "Q8_0", tokenizer=given, overwrite=True, fixed={})
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == said


def test_a_tokenizer_beside_the_source_is_found_and_a_wrong_one_refused(source, tokenizer):
    assert "tokenizer.ggml.tokens" not in converted(source).metadata
    folder = source.parent / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    assert len(converted(source, overwrite=True).metadata["tokenizer.ggml.tokens"]) == 320
    before = (source.parent / "Q8_0.gguf").read_bytes()
    (folder / "tokenizer.model").write_text(json.dumps({}))
    with pytest.raises(ModelFileError, match=r"tokenizer\.model: found what SentencePiece cannot read, expected"):
        converted(source, overwrite=True)
    assert (source.parent / "Q8_0.gguf").read_bytes() == before


def test_two_parts_are_not_compared(source, tmp_path):
    save_file(native_weights(), tmp_path / "aura.safetensors")
    with pytest.raises(ModelFileError, match=r"found an AuraFlow transformer, expected the Pile-T5-XL text encoder"):
        compare(source, tmp_path / "aura.safetensors", fixed={})


def test_rules_are_in_native_names(source):
    chosen = types(converted(source, "Q4_0", tensor_types=["encoder.block.1.*.wi_0=Q8_0"]))
    assert {name for name, type_name in chosen.items() if type_name == "Q8_0"} == {
        "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    }
    with pytest.raises(ModelFileError, match=r"'enc\.blk\..*', expected native names, such as encoder\.block\.0\."):
        converted(source, "Q4_1", tensor_types=["enc.blk.*.ffn_gate=Q8_0"])
    assert recipe_for("Q8_0", ["shared=F16"]).type_of("shared.weight", (320, 256), torch.float16).name == "F16"


def test_llama_cpp_reads_the_file(source, tokenizer):
    reader = ggml.load_or_skip()
    file = converted(source, "Q4_K_M", tokenizer=tokenizer)
    contents = reader.read(source.parent / "Q4_K_M.gguf")
    assert contents.tensors == {name: (info.shape, info.type.id) for name, info in file.tensors.items()}
    assert contents.metadata["general.architecture"] == "t5encoder"
    assert contents.metadata["t5encoder.attention.key_length"] == 64
    assert contents.metadata["tokenizer.ggml.tokens"] == 320
    assert contents.metadata.keys() == file.metadata.keys()
    damaged = source.parent / "damaged.gguf"
    damaged.write_bytes(b"GGUX" + (source.parent / "Q4_K_M.gguf").read_bytes()[4:])
    with pytest.raises(ValueError, match="cannot read"):
        reader.read(damaged)
