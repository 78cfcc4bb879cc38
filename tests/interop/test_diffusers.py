"""Our weights in diffusers' transformer, beside diffusers' own GGUF loader and beside dense weights."""

import json

import pytest
import torch
from auraflow_gguf.loader.diffusers.modules import dense_state_dict
from auraflow_gguf.loader.diffusers.transformer import load_diffusers_transformer
from auraflow_gguf.loader.weights.layout import is_packed
from auraflow_gguf.quantizer.convert import convert
from diffusers import AuraFlowTransformer2DModel, GGUFQuantizationConfig
from safetensors.torch import save_file

from ..quantizer.small_model import FIXED, HIDDEN, MLP, POSITIONS, TEXT, diffusers_weights, native_weights

HEADS = 4
TYPES = [
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "Q4_K_M",
]
CONFIG = {
    "_class_name": "AuraFlowTransformer2DModel",
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 2,
    "attention_head_dim": HIDDEN // HEADS,
    "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": HIDDEN,
    "pos_embed_max_size": POSITIONS,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("interop") / "auraflow.safetensors"
    save_file(native_weights(), path)
    (path.parent / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(params=TYPES)
def gguf_path(checkpoint, request):
    path = checkpoint.with_name(f"auraflow-{request.param}.gguf")
    if not path.exists():
        convert(checkpoint, path, request.param, fixed=FIXED)
    return path


@torch.inference_mode()
def forward(model: AuraFlowTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 10, 12, generator=generator)
    text = torch.randn(2, 7, TEXT, generator=generator)
    return model(latents, encoder_hidden_states=text, timestep=torch.tensor([0.3, 0.8]), return_dict=False)[0]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_output_is_that_of_diffusers_own_gguf_loader(gguf_path):
    ours = load_diffusers_transformer(gguf_path, heads=HEADS)
    theirs = AuraFlowTransformer2DModel.from_single_file(
        str(gguf_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(gguf_path.parent),
        torch_dtype=torch.float32,
    )
    assert type(theirs.single_transformer_blocks[0].attn.to_q).__name__ == "GGUFLinear"
    assert is_packed(ours.single_transformer_blocks[0].attn.to_q.weight)
    # diffusers dequantizes block scales in float16
    assert relative_error(forward(ours), forward(theirs)) < 2e-3


def test_output_is_that_of_the_dense_weights(gguf_path):
    packed = load_diffusers_transformer(gguf_path, heads=HEADS)
    dense = AuraFlowTransformer2DModel(**{key: value for key, value in CONFIG.items() if key != "_class_name"})
    dense.load_state_dict(dense_state_dict(packed))
    assert relative_error(forward(packed), forward(dense)) < 1e-6


def test_a_file_in_diffusers_spelling_gives_the_same(checkpoint, tmp_path):
    respelled = tmp_path / "diffusers.safetensors"
    save_file(diffusers_weights(native_weights()), respelled)
    outputs = []
    for number, source in enumerate((checkpoint, respelled)):
        target = tmp_path / f"{number}.gguf"
        convert(source, target, "Q8_0", fixed=FIXED)
        outputs.append(forward(load_diffusers_transformer(target, heads=HEADS)))
    assert torch.equal(*outputs)


def test_a_bias_in_the_file_is_used_and_none_is_made(checkpoint, tmp_path):
    weights = native_weights()
    without = tmp_path / "without.gguf"
    convert(checkpoint, without, "Q8_0", fixed=FIXED)
    weights["single_layers.1.attn.w1q.bias"] = torch.full((HIDDEN,), 0.5, dtype=torch.bfloat16)
    weights["single_layers.0.mlp.c_fc1.bias"] = torch.full((MLP,), 0.5, dtype=torch.bfloat16)
    save_file(weights, tmp_path / "with.safetensors")
    convert(tmp_path / "with.safetensors", tmp_path / "with.gguf", "Q8_0", fixed=FIXED)

    plain, biased = (load_diffusers_transformer(path, heads=HEADS) for path in (without, tmp_path / "with.gguf"))
    attention = [model.single_transformer_blocks[1].attn for model in (plain, biased)]
    assert attention[0].to_q.bias is None
    assert attention[1].to_q.bias.tolist() == [0.5] * HIDDEN
    assert attention[1].to_k.bias is None
    assert relative_error(forward(plain), forward(biased)) > 1e-3
