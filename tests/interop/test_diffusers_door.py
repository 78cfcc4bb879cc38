"""The public door to diffusers: what pipelines, PEFT, accelerate and torch.compile do with packed models."""

from __future__ import annotations

import copy

import accelerate
import diffusers
import pytest
import torch
import transformers
from auraflow_gguf import load_diffusers_text_encoder, load_diffusers_transformer
from auraflow_gguf.loader.diffusers.modules import PackedEmbedding, PackedLinear, dense_state_dict
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.quantizer.convert import convert
from auraflow_gguf.quantizer.recipe import NEEDS_IMATRIX, RECIPES
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import UMT5EncoderModel

from ..quantizer.small_model import HIDDEN, native_weights
from ..quantizer.test_text_encoder import SIZES, WEIGHTS
from .test_diffusers import HEADS, relative_error

TEXT = SIZES["embedding_length"]
TYPES = [name for name in RECIPES if name in QUANT_TYPES and name not in NEEDS_IMATRIX]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    widened = {"cond_seq_linear.weight": torch.randn(HIDDEN, TEXT, generator=torch.Generator().manual_seed(1)) * 0.05}
    save_file(native_weights() | widened, folder / "auraflow.safetensors")
    save_file(WEIGHTS, folder / "t5.safetensors")
    convert(folder / "auraflow.safetensors", folder / "auraflow.gguf", "Q4_K", fixed={"head_count": HEADS})
    convert(folder / "t5.safetensors", folder / "t5.gguf", "Q4_K", fixed=SIZES)
    return folder


def transformer(folder, dtype=torch.float32):
    return load_diffusers_transformer(folder / "auraflow.gguf", dtype)


def text_encoder(folder, dtype=torch.float32):
    return load_diffusers_text_encoder(folder / "t5.gguf", dtype, fixed=SIZES)


@torch.inference_mode()
def run(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 10, 12, generator=generator).to(model.dtype)
    text = torch.randn(2, 7, TEXT, generator=generator).to(model.dtype)
    timestep = torch.tensor([0.3, 0.8], dtype=model.dtype)
    return model(latents, encoder_hidden_states=text, timestep=timestep, return_dict=False)[0].float()


@torch.inference_mode()
def encode(model) -> torch.Tensor:
    ids = torch.randint(0, SIZES["vocabulary_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    return model(ids, attention_mask=torch.ones_like(ids))[0].float()


def packed_bytes(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(".packed")}


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_gives_the_output_of_its_dense_twin(folder, tmp_path, type_name):
    one = {"tensor_types": [f"single_layers.1.mlp.c_fc1.weight={type_name}"], "fixed": {"head_count": HEADS}}
    convert(folder / "auraflow.safetensors", tmp_path / "a.gguf", "Q4_0", **one)
    model = load_diffusers_transformer(tmp_path / "a.gguf")
    assert type_name == "F32" or model.single_transformer_blocks[1].ff.linear_1.quant_type.name == type_name
    twin = AuraFlowTransformer2DModel.from_config(model.config)
    twin.load_state_dict(dense_state_dict(model))
    assert relative_error(run(model), run(twin)) < 1e-5


def test_the_number_of_heads_is_read_from_the_file_or_asked_for(folder, tmp_path):
    assert transformer(folder).config.num_attention_heads == HEADS
    convert(folder / "auraflow.safetensors", tmp_path / "unsaid.gguf", "Q8_0", fixed={})
    with pytest.raises(ModelFileError, match=r"unsaid.gguf: found a hidden size of 256, and nothing .*heads=…"):
        load_diffusers_transformer(tmp_path / "unsaid.gguf")
    assert load_diffusers_transformer(tmp_path / "unsaid.gguf", heads=2).config.attention_head_dim == HIDDEN // 2


@pytest.mark.parametrize(("load", "use"), [(transformer, run), (text_encoder, encode)])
def test_a_change_of_dtype_leaves_the_blocks_alone(folder, tmp_path, load, use):
    model = load(folder)
    before = packed_bytes(model)
    assert len(before) > 10
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for name, blocks in packed_bytes(model).items():
        assert blocks.data_ptr() == before[name].data_ptr()
        assert model.get_submodule(name.removesuffix(".packed")).weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert relative_error(use(model), use(twin)) < 0.05
    assert relative_error(use(model), use(load(folder, torch.bfloat16))) < 0.05
    assert torch.equal(use(model.to(torch.float32).float()), use(copy.deepcopy(model)))


def test_a_model_moves_with_its_blocks(folder):
    model = transformer(folder).to("meta")
    linear = model.single_transformer_blocks[0].attn.to_q
    assert linear.packed.device.type == linear.weight.device.type == "meta"
    assert linear.weight.shape == (HIDDEN, HIDDEN)


@pytest.mark.parametrize(("load", "use"), [(transformer, run), (text_encoder, encode)])
def test_offloading(folder, load, use):
    """What ``enable_sequential_cpu_offload`` and ``enable_model_cpu_offload`` do, with a CPU as the device."""
    expected = use(load(folder))
    sequential = load(folder)
    accelerate.cpu_offload(sequential, torch.device("cpu"), offload_buffers=True)
    assert all(parameter.is_meta for parameter in sequential.parameters())
    assert torch.equal(use(sequential), expected)
    with pytest.raises(ValueError, match="The weights are offloaded"):
        sequential.save_pretrained(folder / "offloaded")
    whole, hook = accelerate.cpu_offload_with_hook(load(folder), torch.device("cpu"))
    assert torch.equal(use(whole), expected)
    hook.offload()
    assert torch.equal(use(whole), expected)


@pytest.mark.parametrize(("load", "use"), [(transformer, run), (text_encoder, encode)])
def test_torch_compile_makes_one_graph(folder, load, use):
    model = load(folder)
    expected = use(model)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    assert relative_error(use(model), expected) < 1e-5
    explained = torch._dynamo.utils.counters["stats"]
    assert explained["unique_graphs"] >= 1


def test_the_text_encoder_is_that_of_transformers(folder, tmp_path):
    model = text_encoder(folder)
    assert isinstance(model.shared, PackedEmbedding)
    assert model.encoder.embed_tokens is model.shared
    model.save_pretrained(tmp_path)
    twin = UMT5EncoderModel.from_pretrained(tmp_path)
    assert type(twin.shared) is torch.nn.Embedding
    assert relative_error(encode(model), encode(twin)) < 1e-5
    original = UMT5EncoderModel(model.config)
    original.load_state_dict({name: weight.float() for name, weight in WEIGHTS.items()}, strict=False)
    original.tie_weights()
    convert(folder / "t5.safetensors", tmp_path / "f16.gguf", "F16", fixed=SIZES)
    exact = load_diffusers_text_encoder(tmp_path / "f16.gguf", fixed=SIZES)
    assert relative_error(encode(exact), encode(original.eval())) < 1e-5


def test_the_text_encoder_s_largest_numbers_are_computed_in_float32(folder):
    model = text_encoder(folder, torch.float16)
    block = model.encoder.block[1].layer[-1].DenseReluDense
    assert block.wo.weight.dtype == torch.float32
    assert block.wi_0.weight.dtype == torch.float16
    assert model.dtype == torch.float16
    assert relative_error(encode(model), encode(text_encoder(folder))) < 0.01


def lora(path) -> str:
    generator = torch.Generator().manual_seed(2)
    factors = {}
    for module in ("single_transformer_blocks.0.attn.to_q", "joint_transformer_blocks.0.attn.add_k_proj"):
        factors[f"transformer.{module}.lora_A.weight"] = torch.randn(4, HIDDEN, generator=generator) * 0.3
        factors[f"transformer.{module}.lora_B.weight"] = torch.randn(HIDDEN, 4, generator=generator) * 0.3
    save_file(factors, path)
    return str(path)


def pipeline(model, encoder) -> AuraFlowPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipe = AuraFlowPipeline(tokenizer=None, text_encoder=encoder, vae=None, transformer=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe) -> torch.Tensor:
    """The latents of two steps, by text features of the pipeline's own encoder."""
    features = encode(pipe.text_encoder)
    masks = torch.ones(features.shape[:2], dtype=torch.long)
    return pipe(
        prompt_embeds=features[:1],
        prompt_attention_mask=masks[:1],
        negative_prompt_embeds=features[1:],
        negative_prompt_attention_mask=masks[1:],
        height=64,
        width=96,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).images


def test_a_pipeline_gives_its_dense_twin_s_picture_with_and_without_a_lora(folder, tmp_path):
    pipe = pipeline(transformer(folder), text_encoder(folder))
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")
    twin = pipeline(
        AuraFlowTransformer2DModel.from_pretrained(tmp_path / "transformer"),
        UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder"),
    )
    assert not packed_bytes(twin.transformer)
    plain = picture(pipe)
    assert relative_error(plain, picture(twin)) < 1e-4

    for each in (pipe, twin):
        each.load_lora_weights(lora(tmp_path / "lora.safetensors"))
    adapted = pipe.transformer.single_transformer_blocks[0].attn.to_q
    assert isinstance(adapted.base_layer, PackedLinear)
    changed = picture(pipe)
    assert relative_error(changed, plain) > 1e-2
    assert relative_error(changed, picture(twin)) < 1e-4
    with pytest.raises(ValueError, match=r"The model has adapters .*unload_lora_weights"):
        pipe.transformer.save_pretrained(tmp_path / "with adapters")
    with pytest.raises(NotImplementedError, match="a LoRA cannot be fused"):
        pipe.fuse_lora()
    for safe_merge in (False, True):
        with pytest.raises(TypeError, match="nothing can be merged into it"):
            adapted.merge(safe_merge)
    assert torch.equal(picture(pipe), changed)
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    assert relative_error(picture(pipe), changed) < 1e-5
    accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)
    pipe.unload_lora_weights()
    assert relative_error(picture(pipe), plain) < 1e-5


def test_a_dora_gives_the_output_of_the_dense_twin(folder, tmp_path):
    model = transformer(folder)
    plain = run(model)
    model.save_pretrained(tmp_path)
    twin = AuraFlowTransformer2DModel.from_pretrained(tmp_path)
    for each in (model, twin):
        torch.manual_seed(3)
        each.add_adapter(LoraConfig(r=4, use_dora=True, target_modules=["attn.to_q"], init_lora_weights=False))
    assert relative_error(run(model), run(twin)) < 1e-4
    assert relative_error(run(model), plain) > 1e-3
    with pytest.raises(NotImplementedError, match="a LoRA cannot be fused"):
        model.fuse_lora()


def test_a_whole_pipeline_is_saved_as_diffusers_own(folder, tmp_path):
    pipe = pipeline(transformer(folder), text_encoder(folder))
    pipe.save_pretrained(tmp_path)
    index = diffusers.DiffusionPipeline.load_config(tmp_path)
    assert index["transformer"] == ["diffusers", "AuraFlowTransformer2DModel"]
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "text_encoder").model_type == "umt5"


def test_biases_that_diffusers_would_leave_out_are_not_saved(folder, tmp_path):
    bias = {"single_layers.0.attn.w1q.bias": torch.ones(HIDDEN)}
    save_file(native_weights() | bias, tmp_path / "biased.safetensors")
    convert(tmp_path / "biased.safetensors", tmp_path / "biased.gguf", "Q8_0", fixed={"head_count": HEADS})
    model = load_diffusers_transformer(tmp_path / "biased.gguf")
    with pytest.raises(ValueError, match=r"does not know \(single_transformer_blocks.0.attn.to_q.bias\)"):
        model.save_pretrained(tmp_path / "saved")


def test_a_packed_module_takes_no_dense_weight(folder):
    linear = transformer(folder).single_transformer_blocks[0].attn.to_q
    with pytest.raises(TypeError, match="PackedLinear holds a packed weight, not a Parameter"):
        linear.weight = torch.nn.Parameter(torch.ones(HIDDEN, HIDDEN))
