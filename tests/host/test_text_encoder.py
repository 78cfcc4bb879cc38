"""The text encoder from a GGUF file gives the conditioning of its dense twin, in every mode and with every patch."""

import comfy.hooks
import comfy.lora
import comfy.sd
import folder_paths
import gguf
import numpy as np
import pytest
import torch
from auraflow_gguf.devtools import random_models
from auraflow_gguf.loader.comfyui.patcher import GGUFModelPatcher
from auraflow_gguf.loader.comfyui.text_encoder import load_text_encoder
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.loader.files.pile_t5 import PILE_T5_XL, STACK
from auraflow_gguf.loader.weights.layout import is_packed
from comfy_extras.nodes_hooks import SetClipHooks
from comfy_extras.nodes_model_merging import CLIPSave
from safetensors.torch import load_file

from .aura_files import TEXT_SIZES, clip_of, dense_state_dict, dense_text_encoder, make_text_encoder_gguf
from .forward import CPU, loaded
from .sampling import relative_error

LENGTHS = (77, 1, 768)  # the first in every mode
PREFIX = "pile_t5xl.transformer."


def load(path):
    return load_text_encoder(path, fixed=TEXT_SIZES)


def tokens_of(clip, length):
    """The tokens of a prompt of a length, the one that ends it included."""
    tokens = clip.tokenize(" ".join(["cat"] * (length - 1)), tokenizer_options={"pile_t5xl_min_length": 0})
    assert [len(batch) for batch in tokens["pile_t5xl"]] == [length]
    return tokens


def encode(clip, length) -> torch.Tensor:
    """The conditioning ``(1, length, 2048)`` of a prompt; the weights must be loaded."""
    model = clip.cond_stage_model
    model.reset_clip_options()
    model.set_clip_options({"execution_device": CPU})
    return model.encode_token_weights(tokens_of(clip, length))[0]


@pytest.mark.parametrize(
    ("type_name", "lengths", "modes"),
    [
        ("Q8_0", LENGTHS, ("full", "lowvram")),
        pytest.param("Q4_K", (256,), ("full", "lowvram"), marks=pytest.mark.host_independent),
        ("F16", (77,), ("full", "lowvram", "partial unload", "reload")),
    ],
)
def test_the_conditioning_is_that_of_the_dense_twin(type_name, lengths, modes):
    path = make_text_encoder_gguf(type_name)
    clip, twin = load(path), dense_text_encoder(path)
    transformer = clip.cond_stage_model.pile_t5xl.transformer
    assert is_packed(transformer.shared.weight)
    assert is_packed(transformer.encoder.block[1].layer[1].DenseReluDense.wo.weight)
    assert transformer.encoder.final_layer_norm.weight.dtype == torch.float32
    for length in lengths:
        expected = twin.encode_from_tokens(tokens_of(twin, length))
        assert expected.shape == (1, length, 2048)
        assert relative_error(clip.encode_from_tokens(tokens_of(clip, length)), expected) < 1e-5, length
        for mode in modes if length == lengths[0] else ():
            with loaded(clip.patcher, mode):
                assert relative_error(encode(clip, length), expected) < 1e-5, (length, mode)


@pytest.mark.host_independent
def test_a_full_size_encoder():
    """Of 24 layers, as users have it, beside ComfyUI's own loading of the same weights."""
    path = random_models.cached_text_encoder()
    clip = load_text_encoder(path)
    (batch,) = clip.tokenize("a lighthouse on a cliff at dawn, oil painting")["pile_t5xl"]
    assert len(batch) == 256
    tokens = tokens_of(clip, 20)
    actual = clip.encode_from_tokens(tokens)
    weights = {PILE_T5_XL.spell(name, "native"): weight for name, weight in dense_state_dict(path).items()}
    twin = comfy.sd.load_text_encoder_state_dicts([weights], model_options={"dtype": torch.float32})
    del weights
    assert relative_error(actual, twin.encode_from_tokens(tokens)) < 1e-5


@pytest.mark.host_independent
def test_comfyui_takes_a_published_file_for_what_it_is():
    """By its names and shapes, as *Load CLIP* does in the templates."""
    shapes = random_models.native_shapes(PILE_T5_XL, PILE_T5_XL.fixed | {STACK: 24})
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert comfy.sd.detect_te_model(weights) == comfy.sd.TEModel.T5_XL


def test_the_embedding_dequantizes_the_rows_that_it_looks_up():
    clip = load(make_text_encoder_gguf("Q4_K"))
    embedding = clip.cond_stage_model.pile_t5xl.transformer.shared
    dense = embedding.weight.dequantize()
    indices = torch.tensor([[0, 31999, 2], [7, 7, 32127]])
    with torch.profiler.profile(profile_memory=True) as profile:
        rows = embedding(indices, out_dtype=torch.float32)
    assert torch.equal(rows, dense[indices])
    most = max(event.cpu_memory_usage for event in profile.key_averages())
    assert most < dense.nbytes / 100
    assert embedding(indices, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert embedding.weight.nbytes == dense.numel() * 144 // 256


@pytest.mark.host_independent
def test_a_file_of_another_tool(tmp_path):
    """``general.architecture`` t5, a decoder, a quantized relative position bias, norms in 16 bit."""
    source = make_text_encoder_gguf("Q4_K")
    file, path = open_gguf(source), tmp_path / "t5.gguf"
    types, writer = gguf.GGMLQuantizationType, gguf.GGUFWriter(path, "t5")
    for name, info in file.tensors.items():
        rows, kind = file.packed(name).view(info.shape[0], -1).numpy(), types(info.type.id)
        if name.endswith("attn_rel_b.weight"):
            rows, kind = gguf.quantize(rows.view(np.float32), types.Q8_0), types.Q8_0
        elif "norm" in name:
            rows, kind = rows.view(np.float32).astype(np.float16).reshape(-1), types.F16
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.add_tensor("dec.blk.0.attn_q.weight", np.ones((32, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    clip = load(path)
    attention = clip.cond_stage_model.pile_t5xl.transformer.encoder.block[1].layer[0].SelfAttention
    bias = attention.relative_attention_bias.weight
    assert not is_packed(bias)
    exact = dense_state_dict(source)["enc.blk.1.attn_rel_b.weight"]
    assert 1e-4 < relative_error(bias, exact) < 1e-2
    expected = dense_text_encoder(source).encode_from_tokens(tokens_of(clip, 77))
    assert relative_error(clip.encode_from_tokens(tokens_of(clip, 77)), expected) < 1e-2


def noise(*shape):
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


PATCHED = {
    "lora": {
        "encoder.block.0.layer.0.SelfAttention.q": (2048, 2048),
        "encoder.block.1.layer.1.DenseReluDense.wo": (2048, 5120),
        "shared": (32128, 2048),
    },
    "loha": {"encoder.block.0.layer.0.SelfAttention.k": (2048, 2048), "shared": (32128, 2048)},
    "diff": {
        "encoder.block.1.layer.0.SelfAttention.o": (2048, 2048),
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias": (32, 32),
        "encoder.final_layer_norm": (2048,),
    },
}


def patched(clip, kind, strength, modules):
    """A clone with a LoRA file's patches, added as ComfyUI's Load LoRA does."""
    state = {}
    for module, shape in modules.items():
        name = f"text_encoders.{PREFIX}{module}"
        if kind == "lora":
            state[f"{name}.lora_up.weight"] = noise(shape[0], 4)
            state[f"{name}.lora_down.weight"] = noise(4, shape[1])
        elif kind == "loha":
            sizes = {"w1_a": (shape[0], 4), "w1_b": (4, shape[1]), "w2_a": (shape[0], 3), "w2_b": (3, shape[1])}
            state |= {f"{name}.hada_{key}": 4 * noise(*size) for key, size in sizes.items()}
        else:
            state[f"{name}.diff"] = noise(*shape)
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    clone = clip.clone()
    applied = clone.add_patches(comfy.lora.load_lora(state, keys), strength)
    assert {f"{PREFIX}{module}.weight" for module in modules} == set(applied)
    return clone


@pytest.mark.parametrize("kind", PATCHED)
def test_every_patch_has_the_effect_that_it_has_on_the_dense_twin(kind):
    path = make_text_encoder_gguf("Q4_K")
    clip, twin = load(path), dense_text_encoder(path)
    tokens = tokens_of(clip, 20)
    base = clip.encode_from_tokens(tokens)
    for module, shape in PATCHED[kind].items():
        expected = patched(twin, kind, 0.8, {module: shape}).encode_from_tokens(tokens)
        assert relative_error(base, expected) > 1e-4, module
        clone = patched(clip, kind, 0.8, {module: shape})
        assert isinstance(clone.patcher, GGUFModelPatcher)
        assert relative_error(clone.encode_from_tokens(tokens), expected) < 1e-5, module
        # a norm is patched as ComfyUI patches all of them: when it is loaded, which 1 byte of memory does not allow
        for mode in ("full",) if module.endswith("norm") else ("full", "lowvram"):
            with loaded(clone.patcher, mode):
                assert relative_error(encode(clone, 20), expected) < 1e-5, (module, mode)
    assert torch.equal(clip.encode_from_tokens(tokens), base)


def test_hooks_over_a_lora_of_the_same_weights():
    clip = load(make_text_encoder_gguf("Q4_K"))
    tokens = tokens_of(clip, 20)
    modules = {name: PATCHED["lora"][name] for name in ("encoder.block.0.layer.0.SelfAttention.q", "shared")}
    patches = {key: adapter for key, ((_, adapter, *_),) in patched(clip, "lora", 1, modules).patcher.patches.items()}
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.7)
    hook.weights = hook.weights_clip = patches
    hook.need_weight_init = False
    hooks = comfy.hooks.HookGroup()
    hooks.add(hook)
    for strength in (0.0, 0.5):
        with_lora = patched(clip, "lora", strength, modules) if strength else clip
        (hooked,) = SetClipHooks().apply_hooks(with_lora, False, True, hooks)
        assert hooked.patcher.model is hooked.cond_stage_model
        expected = patched(clip, "lora", strength + 0.7, modules).encode_from_tokens(tokens)
        assert relative_error(hooked.encode_from_tokens(tokens), expected) < 1e-5
        assert relative_error(clip.encode_from_tokens(tokens), expected) > 1e-4


def test_a_saved_encoder_is_dense_and_has_its_patches(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    clip = load(make_text_encoder_gguf("Q4_K"))
    for kind, modules in PATCHED.items():
        clip = patched(clip, kind, 0.8, modules)
    tokens = tokens_of(clip, 20)
    expected = clip.encode_from_tokens(tokens)
    CLIPSave().save(clip, "encoder")
    (saved,) = tmp_path.glob("*_pile_t5xl_*.safetensors")
    assert relative_error(clip_of(load_file(saved)).encode_from_tokens(tokens), expected) < 1e-5
    assert torch.equal(clip.encode_from_tokens(tokens), expected)


def test_the_patcher_can_be_made_anew():
    path = random_models.cached_text_encoder()
    factory, arguments = load_text_encoder(path, "embeddings").patcher.cached_patcher_init
    assert isinstance(factory(*arguments, disable_dynamic=True), GGUFModelPatcher)


@pytest.mark.host_independent
def test_a_smaller_vocabulary_than_the_tokenizers_is_refused(tmp_path):
    path = tmp_path / "t5.gguf"
    file, writer = open_gguf(make_text_encoder_gguf("Q8_0")), gguf.GGUFWriter(path, "t5encoder")
    for name, info in file.tensors.items():
        rows = file.packed(name).view(info.shape[0], -1).numpy()
        rows = rows[:31744] if name == "token_embd.weight" else rows
        rows = rows.view(np.float32).reshape(info.shape) if info.type.name == "F32" else rows
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType(info.type.id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"embeddings of 31744 tokens, expected one for each of .* 32000"):
        load_text_encoder(path, fixed=TEXT_SIZES | {"vocabulary_size": 31744})
