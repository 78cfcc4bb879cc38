"""The table of AuraFlow: against diffusers' own model, and on the files that users have and should not have."""

import pytest
import torch
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.matching import annotations, match
from diffusers import AuraFlowTransformer2DModel

HIDDEN, MLP, TEXT = 3072, 8192, 2048


def auraflow(double=1, single=1, positions=4096, hidden=HIDDEN):
    """Native names and shapes, as ComfyUI's comfy/ldm/aura/mmdit.py has them."""
    shapes = {
        "positional_encoding": (1, positions, hidden),
        "register_tokens": (1, 8, hidden),
        "t_embedder.mlp.0.weight": (hidden, 256),
        "t_embedder.mlp.0.bias": (hidden,),
        "t_embedder.mlp.2.weight": (hidden, hidden),
        "t_embedder.mlp.2.bias": (hidden,),
        "init_x_linear.weight": (hidden, 16),
        "init_x_linear.bias": (hidden,),
        "cond_seq_linear.weight": (hidden, TEXT),
        "modF.1.weight": (2 * hidden, hidden),
        "final_linear.weight": (16, hidden),
    }
    layers = [(f"double_layers.{i}", ("w1", "w2"), ("mlpC", "mlpX"), ("modC", "modX")) for i in range(double)]
    layers += [(f"single_layers.{i}", ("w1",), ("mlp",), ("modCX",)) for i in range(single)]
    for layer, attentions, mlps, modulations in layers:
        for attention in attentions:
            shapes |= {f"{layer}.attn.{attention}{letter}.weight": (hidden, hidden) for letter in "qkvo"}
        for mlp in mlps:
            shapes |= {f"{layer}.{mlp}.{name}.weight": (MLP, hidden) for name in ("c_fc1", "c_fc2")}
            shapes[f"{layer}.{mlp}.c_proj.weight"] = (hidden, MLP)
        shapes |= {f"{layer}.{modulation}.1.weight": (6 * hidden, hidden) for modulation in modulations}
    return shapes


def in_diffusers(shapes):
    return {AURAFLOW.spell(name, "diffusers"): shape for name, shape in shapes.items()}


def read(shapes, metadata=None, fixed=None):
    return match(AURAFLOW, shapes, metadata=metadata or {}, path="models/unet/model.gguf", fixed=fixed)


def diffusers_shapes(**config):
    with torch.device("meta"):
        model = AuraFlowTransformer2DModel(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_a_full_size_model():
    result = read(auraflow(double=4, single=32, positions=9216))
    assert len(result.weights) == 331
    assert sum(torch.Size(source.shape).numel() for source in result.weights.values()) == 6_858_605_568
    assert result.dimensions == {
        "embedding_length": 3072,
        "head_count": 12,
        "feed_forward_length": 8192,
        "text_embedding_length": 2048,
        "positional_encoding_length": 9216,
        "double_layers": 4,
        "single_layers": 32,
    }
    assert annotations(result) == {
        "general.architecture": "aura",
        "aura.block_count": 36,
        "aura.double_block_count": 4,
        "aura.embedding_length": 3072,
        "aura.feed_forward_length": 8192,
        "aura.attention.head_count": 12,
        "aura.text_embedding_length": 2048,
        "aura.positional_encoding_length": 9216,
        "aura.bias": ["init_x_linear", "t_embedder.mlp.0", "t_embedder.mlp.2"],
        "aura.tensor_names": "native",
    }


def test_diffusers_own_model_at_full_width():
    theirs = diffusers_shapes(num_mmdit_layers=2, num_single_dit_layers=3, pos_embed_max_size=4096)
    result = read(theirs)
    assert result.spelling == "diffusers"
    assert {name: source.shape for name, source in result.weights.items()} == auraflow(double=2, single=3)
    assert {AURAFLOW.spell(name, "native"): shape for name, shape in theirs.items()} == auraflow(double=2, single=3)
    assert in_diffusers(auraflow(double=2, single=3)) == theirs
    assert [name for name, source in result.weights.items() if source.swap_halves] == ["modF.1.weight"]


def test_diffusers_own_model_of_small_width():
    theirs = diffusers_shapes(
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=256,
        pos_embed_max_size=64,
    )
    assert read(theirs, fixed={}).dimensions == {
        "embedding_length": 256,
        "feed_forward_length": 768,
        "text_embedding_length": 96,
        "positional_encoding_length": 64,
        "double_layers": 1,
        "single_layers": 2,
    }


def test_attention_of_text_and_image_are_told_apart():
    """ComfyUI's own conversion, comfy/utils.py auraflow_to_diffusers, has these."""
    assert AURAFLOW.spell("double_layers.3.attn.w1q.weight", "diffusers") == (
        "joint_transformer_blocks.3.attn.add_q_proj.weight"
    )
    assert AURAFLOW.spell("double_layers.3.attn.w2o.weight", "diffusers") == (
        "joint_transformer_blocks.3.attn.to_out.0.weight"
    )
    assert AURAFLOW.spell("joint_transformer_blocks.3.ff.linear_1.weight", "native") == (
        "double_layers.3.mlpX.c_fc1.weight"
    )


def test_biases_that_a_converter_added():
    shapes = auraflow() | {"modF.1.bias": (2 * HIDDEN,), "single_layers.0.attn.w1q.bias": (HIDDEN,)}
    for spelled in (shapes, in_diffusers(shapes)):
        result = read(spelled)
        assert annotations(result)["aura.bias"] == [
            "init_x_linear",
            "modF.1",
            "single_layers.0.attn.w1q",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
        ]
        assert result.weights["modF.1.bias"].swap_halves == (result.spelling == "diffusers")


def test_bare_parameters_without_the_leading_one():
    flat = {"positional_encoding": (4096, HIDDEN), "register_tokens": (8, HIDDEN)}
    for shapes in (auraflow() | flat, in_diffusers(auraflow() | flat)):
        weights = read(shapes).weights
        assert weights["positional_encoding"].shape == (1, 4096, HIDDEN)
        assert weights["register_tokens"].shape == (1, 8, HIDDEN)


def test_an_all_in_one_checkpoint():
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in auraflow().items()}
    others = {
        "text_encoders.pile_t5xl.transformer.shared.weight": (32128, 2048),
        "vae.decoder.conv_in.weight": (512, 4, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    }
    result = read(shapes | others)
    assert result.skipped == tuple(others)
    assert len(result.weights) == len(auraflow())


INCOMPLETE = (
    "expected all of them. "
    "The file is incomplete or its tensors were renamed: download it again, or convert the model again."
)
CONVERTED = (
    "The file is not an AuraFlow transformer of the known size, or was converted wrongly: "
    "use another file, or convert the model again."
)
ALTERED = (
    "expected metadata that agree with the tensors. "
    "The file was altered or wrongly converted: download it again, or convert the model again."
)
VARIANT = (
    "expected no other tensors than the model's. "
    "To leave them out would give wrong pictures. Use a file of the unmodified architecture."
)


def without(*beginnings):
    return {name: shape for name, shape in auraflow(4, 32).items() if not name.startswith(beginnings)}


BAD_FILES = {
    "without positional encoding": (
        without("positional_encoding"),
        {},
        f"330 of the 331 tensors of an AuraFlow transformer, without positional_encoding, {INCOMPLETE}",
    ),
    "biases dropped": (
        without("t_embedder.mlp.0.bias", "t_embedder.mlp.2.bias", "init_x_linear.bias"),
        {},
        "328 of the 331 tensors of an AuraFlow transformer, without t_embedder.mlp.0.bias, t_embedder.mlp.2.bias, "
        f"init_x_linear.bias, {INCOMPLETE}",
    ),
    "no single layers": (
        without("single_layers."),
        {},
        "75 of the 83 tensors of an AuraFlow transformer, without single_layers.0.attn.w1q.weight, "
        "single_layers.0.attn.w1k.weight, single_layers.0.attn.w1v.weight, single_layers.0.attn.w1o.weight, "
        f"single_layers.0.mlp.c_fc1.weight and 3 more, {INCOMPLETE}",
    ),
    "a piece of the model": (
        {name: shape for name, shape in auraflow().items() if name.startswith("double_layers.0.attn.")},
        {},
        "8 of the 35 tensors of an AuraFlow transformer, without positional_encoding, register_tokens, "
        f"t_embedder.mlp.0.weight, t_embedder.mlp.0.bias, t_embedder.mlp.2.weight and 22 more, {INCOMPLETE}",
    ),
    "a layer removed": (
        without("single_layers.7."),
        {},
        "single_layers up to number 31 without 7, expected layers numbered without holes. "
        "Layers were lost or removed: download the file again, or convert the model again.",
    ),
    "one tensor in the other spelling": (
        without("final_linear.weight") | {"proj_out.weight": (16, HIDDEN)},
        {},
        "330 of the 331 tensors of an AuraFlow transformer, without final_linear.weight, "
        f"but with the unknown proj_out.weight, {INCOMPLETE}",
    ),
    "one tensor without the prefix": (
        {f"model.{name}": shape for name, shape in without("register_tokens").items()}
        | {"register_tokens": (1, 8, HIDDEN)},
        {},
        "330 of the 331 tensors of an AuraFlow transformer, without model.register_tokens, "
        f"but with the unknown register_tokens, {INCOMPLETE}",
    ),
    "normalization with parameters": (
        auraflow() | {"double_layers.0.attn.q_norm1.weight": (12, 256)},
        {},
        f"an AuraFlow transformer with unknown tensors in it: double_layers.0.attn.q_norm1.weight, {VARIANT}",
    ),
    "a LoRA merged into the file": (
        auraflow() | {"single_layers.0.attn.w1q.lora_A.weight": (16, HIDDEN)},
        {},
        f"an AuraFlow transformer with unknown tensors in it: single_layers.0.attn.w1q.lora_A.weight, {VARIANT}",
    ),
    "another hidden size": (
        auraflow(hidden=2048),
        {},
        "positional_encoding of shape (1, 4096, 2048), one of 35 wrong shapes, expected (1, 4096, 3072). " + CONVERTED,
    ),
    "another text width": (
        auraflow() | {"cond_seq_linear.weight": (HIDDEN, 4096)},
        {},
        f"cond_seq_linear.weight of shape (3072, 4096), expected (3072, 2048). {CONVERTED}",
    ),
    "another MLP": (
        auraflow() | {"single_layers.0.mlp.c_proj.weight": (HIDDEN, 12288)},
        {},
        f"single_layers.0.mlp.c_proj.weight of shape (3072, 12288), expected (3072, 8192). {CONVERTED}",
    ),
    "a 16-channel latent": (
        auraflow() | {"init_x_linear.weight": (HIDDEN, 64), "final_linear.weight": (64, HIDDEN)},
        {},
        f"init_x_linear.weight of shape (3072, 64), one of 2 wrong shapes, expected (3072, 16). {CONVERTED}",
    ),
    "transposed weights": (
        auraflow() | {"single_layers.0.modCX.1.weight": (HIDDEN, 6 * HIDDEN)},
        {},
        f"single_layers.0.modCX.1.weight of shape (3072, 18432), expected (18432, 3072). {CONVERTED}",
    ),
    "a bias of another length": (
        auraflow() | {"modF.1.bias": (HIDDEN,)},
        {},
        f"modF.1.bias of shape (3072), expected (6144). {CONVERTED}",
    ),
    "a positional encoding that is no square": (
        auraflow(positions=4000),
        {},
        "positional_encoding_length 4000, expected a square number. "
        "The tensor was cut or rearranged: download the file again, or convert the model again.",
    ),
    "a rearranged linear": (
        auraflow() | {"init_x_linear.weight": (192, 256)},
        {"comfy.gguf.orig_shape.init_x_linear.weight": [3072, 16]},
        "comfy.gguf.orig_shape.init_x_linear.weight = [3072, 16] for a tensor of shape (192, 256), "
        "expected a shape of 49152 elements in rows of 256. "
        "The tensor was rearranged in a way that cannot be undone: convert the model again.",
    ),
    "an original shape of another size": (
        auraflow() | {"positional_encoding": (4096, HIDDEN)},
        {"comfy.gguf.orig_shape.positional_encoding": [1, 9216, 3072]},
        "comfy.gguf.orig_shape.positional_encoding = [1, 9216, 3072] for a tensor of shape (4096, 3072), "
        "expected a shape of 12582912 elements. "
        "The tensor was rearranged in a way that cannot be undone: convert the model again.",
    ),
    "a number of layers that is not true": (
        auraflow(),
        {"general.architecture": "aura", "aura.block_count": 36},
        f"aura.block_count = 36 in its metadata, but 2 by its tensors, {ALTERED}",
    ),
    "another number of double layers": (
        auraflow(),
        {"aura.double_block_count": 2},
        f"aura.double_block_count = 2 in its metadata, but 1 by its tensors, {ALTERED}",
    ),
    "another number of heads": (
        auraflow(),
        {"aura.attention.head_count": 24},
        f"aura.attention.head_count = 24 in its metadata, but 12 by its tensors, {ALTERED}",
    ),
    "another positional encoding": (
        auraflow(),
        {"aura.positional_encoding_length": 9216},
        f"aura.positional_encoding_length = 9216 in its metadata, but 4096 by its tensors, {ALTERED}",
    ),
    "a bias that is not there": (
        auraflow(),
        {"aura.bias": ["init_x_linear", "modF.1", "t_embedder.mlp.0", "t_embedder.mlp.2"]},
        "aura.bias = [init_x_linear, modF.1, t_embedder.mlp.0, t_embedder.mlp.2] in its metadata, "
        f"but [init_x_linear, t_embedder.mlp.0, t_embedder.mlp.2] by its tensors, {ALTERED}",
    ),
    "the other spelling": (
        in_diffusers(auraflow()),
        {"aura.tensor_names": "native"},
        f"aura.tensor_names = 'native' in its metadata, but 'diffusers' by its tensors, {ALTERED}",
    ),
    "another model's metadata": (
        auraflow(),
        {"general.architecture": "sd3"},
        f"general.architecture = 'sd3' in its metadata, but 'aura' by its tensors, {ALTERED}",
    ),
}


@pytest.mark.parametrize(("shapes", "metadata", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(shapes, metadata, message):
    with pytest.raises(ModelFileError) as caught:
        read(shapes, metadata)
    assert str(caught.value) == f"model.gguf: found {message}"


@pytest.mark.parametrize("name", ["aura", "pig", "cow", None])
def test_good_and_odd_architecture_names(name):
    metadata = {} if name is None else {"general.architecture": name}
    assert read(auraflow(), metadata).dimensions["double_layers"] == 1
