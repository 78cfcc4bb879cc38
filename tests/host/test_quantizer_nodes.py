"""The nodes that make files, executed as the server does."""

import asyncio
import os
import shutil
from dataclasses import replace

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from auraflow_gguf.devtools import random_models
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.loader.files.parts import PARTS
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.nodes import AuraFlowGGUFExtension
from auraflow_gguf.nodes.calibration import AuraFlowGGUFCalibration
from auraflow_gguf.nodes.convert import AuraFlowGGUFConvert
from auraflow_gguf.nodes.importance import AuraFlowGGUFImportance
from auraflow_gguf.nodes.sampling import IMATRICES
from auraflow_gguf.nodes.save import AuraFlowGGUFSave, ModelCheckpoint
from auraflow_gguf.quantizer.imatrix import ImportanceMatrix, read_imatrix
from auraflow_gguf.quantizer.quality.calibration import read_calibration
from auraflow_gguf.quantizer.quantize import quantize
from comfy.text_encoders.aura_t5 import AuraT5Tokenizer
from safetensors.torch import load_file

from .aura_files import (
    TEXT_SIZES,
    dense_state_dict,
    make_gguf,
    make_text_encoder_checkpoint,
    make_text_encoder_gguf,
)
from .patches import LINEARS, lora, patched
from .sampling import QUICK, relative_error, sample
from .small_auraflow import TEXT, load_small, small_dense_twin, small_gguf

CHECKPOINT = "auraflow.safetensors"


@pytest.fixture(scope="module")
def path():
    return small_gguf("Q4_0")


@pytest.fixture(scope="module")
def packed(path):
    return load_small(path)


@pytest.fixture
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


@pytest.fixture
def of_any_width(monkeypatch):
    """Files of a small model are written too."""
    monkeypatch.setitem(PARTS, "transformer", replace(PARTS["transformer"], fixed={}))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The only folder of models/diffusion_models, with a checkpoint in it."""
    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    (folder / CHECKPOINT).symlink_to(random_models.cached_checkpoint())
    for key, extensions in (("diffusion_models", {".safetensors"}), ("unet_gguf", {".gguf"})):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(folder)], extensions))
    folder_paths.filename_list_cache.clear()
    return folder


def save(model, type_name, **options) -> str:
    return AuraFlowGGUFSave.execute(model, type_name, "diffusion_models/test", **options).args[0]


def packed_bytes(path):
    file = open_gguf(path)
    return {name: (info.type.name, file.packed(name)) for name, info in file.tensors.items()}


def test_a_model_with_a_lora_gives_its_picture_from_the_file(packed, path, output, of_any_width):
    model = patched(packed, lora)
    expected = sample(model, **QUICK)
    assert relative_error(sample(packed, **QUICK), expected) > 1e-2
    target = save(model, "Q4_0", tensor_types="\n".join(f"{name}=F32" for name in LINEARS))
    assert os.path.relpath(target, output) == os.path.join("diffusion_models", "test_00001_.gguf")

    before, after = packed_bytes(path), packed_bytes(target)
    for name, (type_name, blocks) in before.items():
        if name.removesuffix(".weight") in LINEARS:
            assert after[name][0] == "F32"
        elif type_name == "Q4_0":
            assert after[name][0] == "Q4_0"
            assert torch.equal(after[name][1], blocks), name
    assert relative_error(sample(load_small(target), **QUICK), expected) < 1e-4
    assert relative_error(sample(packed, **QUICK), expected) > 1e-2  # nothing was baked into the model itself


def test_a_dense_model_with_a_lora_is_quantized(path, output, of_any_width):
    dense = small_dense_twin(path)
    model = patched(dense, lora)
    expected = sample(model, **QUICK)
    saved = load_small(save(model, "Q8_0"))
    assert relative_error(sample(dense, **QUICK), expected) > 2e-2
    assert relative_error(sample(saved, **QUICK), expected) < 5e-3


def test_patches_are_those_of_the_model_whatever_is_loaded(packed):
    """Of a clone with a LoRA that is loaded, of the model without it, and of a merge of both."""
    name, key = "final_linear", "diffusion_model.final_linear.weight"
    model = patched(packed, lora)
    plain = ModelCheckpoint(packed).read(key)
    difference = ModelCheckpoint(model).read(key) - plain
    assert difference.norm() > 0.01 * plain.norm()
    merged = packed.clone()
    for merged_key, value in model.get_key_patches("diffusion_model.").items():
        merged.add_patches({merged_key: value}, 0.25, 0.75)
    sample(model, **QUICK)
    assert torch.equal(ModelCheckpoint(packed).read(key), plain)
    torch.testing.assert_close(ModelCheckpoint(merged).read(key), plain + 0.25 * difference)
    assert ModelCheckpoint(packed).packed("diffusion_model.single_layers.0.attn.w1q.weight")[0].name == "Q4_0"
    assert ModelCheckpoint(merged).packed("diffusion_model.single_layers.0.attn.w1q.weight") is None
    assert name in LINEARS


@pytest.fixture(scope="module")
def quantized_by_comfyui():
    """The same weights in ComfyUI's own fp8, as its MODEL; the fp8 numbers by name, dense; and their shapes."""
    state = {}
    weights = dense_state_dict(make_gguf("Q4_0"))
    for name, weight in weights.items():
        if "_layers." in name:
            layer = name.removesuffix(".weight")
            scale = weight.abs().max() / 448
            state[name] = (weight / scale).to(torch.float8_e4m3fn)
            state[f"{layer}.weight_scale"] = scale.reshape(())
            state[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        state.setdefault(name, weight)

    def dense(name: str) -> torch.Tensor:
        weight, scale = state[name], state.get(f"{name}_scale")
        return weight if scale is None else weight.float() * scale

    shapes = {name: weight.shape for name, weight in weights.items()}
    return comfy.sd.load_diffusion_model_state_dict(state.copy()), dense, shapes


@pytest.mark.host_independent
def test_a_model_that_comfyui_has_quantized_is_saved(quantized_by_comfyui, output):
    model, dense, shapes = quantized_by_comfyui
    with_lora = patched(model, lora, names=["double_layers.0.attn.w2k"])
    for saved, changed in ((model, False), (with_lora, True)):
        checkpoint = ModelCheckpoint(saved)
        assert checkpoint.shapes.keys() == {f"diffusion_model.{name}" for name in shapes}
        for name in ("double_layers.0.attn.w2k.weight", "single_layers.0.mlp.c_fc1.weight", "init_x_linear.weight"):
            error = relative_error(checkpoint.read(f"diffusion_model.{name}").float(), dense(name))
            assert (error > 1e-2) == (changed and "w2k" in name)
    target = save(model, "Q8_0")
    weight = load_model(target, torch.float32).model.diffusion_model.single_layers[0].attn.w1q.weight
    assert relative_error(weight.dequantize().float(), dense("single_layers.0.attn.w1q.weight")) < 1e-2


@pytest.mark.host_independent
def test_importance_of_a_model_that_comfyui_has_quantized(quantized_by_comfyui):
    model, _, shapes = quantized_by_comfyui
    matrix = ImportanceMatrix()
    with matrix.collecting(model.model.diffusion_model):
        sample(model, **QUICK | {"steps": 1})
    linears = {name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2}
    assert matrix.sums.keys() == linears


@pytest.mark.host_independent
def test_importance_files_in_subfolders_are_listed(output):
    (output / "imatrix" / "pony").mkdir(parents=True)
    path = output / "imatrix" / "pony" / "v7_00001_.gguf"
    path.touch()
    name = os.path.join("pony", "v7_00001_.gguf")
    (continue_from,) = (i for i in AuraFlowGGUFImportance.define_schema().inputs if i.id == "continue_from")
    assert continue_from.options == ["none", name]
    assert IMATRICES.path(name) == str(path)


def test_a_checkpoint_is_converted(models):
    source = f"diffusion_models/{CHECKPOINT}"
    target = AuraFlowGGUFConvert.execute(source, "Q4_0").args[0]
    assert target == str(models / "auraflow-Q4_0.gguf")
    made, weights = packed_bytes(target), load_file(models / CHECKPOINT)
    assert made.keys() == weights.keys()
    for name, type_name in (("single_layers.0.attn.w1q.weight", "Q4_0"), ("modF.1.weight", "BF16")):
        expected = quantize(weights[name].float(), QUANT_TYPES[type_name])
        assert made[name][0] == type_name
        assert torch.equal(made[name][1], torch.from_numpy(expected.reshape(-1)))
    with pytest.raises(ModelFileError, match="found a file of that name"):
        AuraFlowGGUFConvert.execute(source, "Q8_0", output_name="auraflow-Q4_0.gguf")


@pytest.mark.host_independent
def test_a_gguf_file_is_a_source_by_the_folder_it_is_in(models, tmp_path, monkeypatch):
    elsewhere = tmp_path / "of another pack"
    elsewhere.mkdir()
    shutil.copy(make_gguf("Q8_0"), elsewhere / "packed.gguf")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "unet_gguf", ([str(models), str(elsewhere)], {".gguf"}))
    folder_paths.filename_list_cache.clear()
    options = AuraFlowGGUFConvert.define_schema().inputs[0].options
    source = "diffusion_models/packed.gguf"
    assert [name for name in options if name.startswith("diffusion_models/")] == [
        f"diffusion_models/{CHECKPOINT}",
        source,
    ]
    before = AuraFlowGGUFConvert.fingerprint_inputs(source, type="Q4_0")
    target = AuraFlowGGUFConvert.execute(source, "Q4_0").args[0]
    assert target == str(models / "packed-Q4_0.gguf")
    assert packed_bytes(target)["single_layers.0.attn.w1q.weight"][0] == "Q4_0"
    os.utime(elsewhere / "packed.gguf", (0, 0))
    assert AuraFlowGGUFConvert.fingerprint_inputs(source, type="Q4_0") != before
    with pytest.raises(FileNotFoundError, match="absent"):
        AuraFlowGGUFConvert.execute("diffusion_models/absent.gguf", "Q4_0")


@pytest.mark.host_independent
def test_a_text_encoder_is_converted_into_its_folder_with_comfyuis_tokenizer(tmp_path, monkeypatch):
    expected = packed_bytes(make_text_encoder_gguf("Q8_0"))
    (tmp_path / "t5.safetensors").symlink_to(make_text_encoder_checkpoint())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setitem(PARTS, "text_encoder", replace(PARTS["text_encoder"], fixed=TEXT_SIZES))
    folder_paths.filename_list_cache.clear()
    assert "text_encoders/t5.safetensors" in AuraFlowGGUFConvert.define_schema().inputs[0].options
    target = AuraFlowGGUFConvert.execute("text_encoders/t5.safetensors", "Q8_0").args[0]
    assert target == str(tmp_path / "t5-Q8_0.gguf")
    made = packed_bytes(target)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name][1], expected[name][1]) for name in expected)
    tokens = open_gguf(target).metadata["tokenizer.ggml.tokens"]
    pieces = AuraT5Tokenizer().clip_pile_t5xl.tokenizer.get_vocab()
    assert len(tokens) == 32128
    assert {token: index for index, token in enumerate(tokens) if index < len(pieces)} == pieces


@pytest.mark.host_independent
@pytest.mark.parametrize("name", ["../x", "a/b", ".."])
def test_a_target_outside_the_folder_is_refused(models, name):
    with pytest.raises(ValueError, match="not a file's name"):
        AuraFlowGGUFConvert.execute(f"diffusion_models/{CHECKPOINT}", "Q8_0", output_name=name)


@pytest.mark.host_independent
@pytest.mark.parametrize("source", ["loras/x.safetensors", "diffusion_models/../../x", "x"])
def test_a_source_outside_the_folders_is_refused(models, source):
    with pytest.raises((ValueError, FileNotFoundError)):
        AuraFlowGGUFConvert.execute(source, "Q8_0")


@pytest.mark.host_independent
def test_an_interrupt_leaves_no_file(models):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        AuraFlowGGUFConvert.execute(f"diffusion_models/{CHECKPOINT}", "Q8_0")
    assert os.listdir(models) == [CHECKPOINT]


def test_importance_is_collected_while_sampling(packed, path, output, of_any_width):
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    generator = torch.Generator().manual_seed(0)
    positive, negative = ([[torch.randn(1, 6, TEXT, generator=generator), {}]] for _ in range(2))

    def collect(model, **options):
        arguments = {"seed": 5, "steps": 2, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple"}
        return AuraFlowGGUFImportance.execute(
            model,
            **arguments,
            positive=positive,
            negative=negative,
            latent_image=latent,
            filename_prefix="x",
            **options,
        ).args[0]["samples"]

    first = collect(packed)
    assert first.shape == (1, 4, 8, 8)
    assert os.listdir(output / "imatrix") == ["x_00001_.gguf"]
    matrix = read_imatrix(output / "imatrix" / "x_00001_.gguf")
    weights = {name for name in open_gguf(path).tensors if name.endswith(".weight")}
    assert matrix.sums.keys() == weights
    # two steps of the positive and the negative, of 16 patches, 6 tokens and 8 registers
    assert matrix.counts["init_x_linear.weight"] == 2 * 2 * 16
    assert matrix.counts["single_layers.0.attn.w1q.weight"] == 2 * 2 * (16 + 6 + 8)
    assert matrix.counts["single_layers.0.modCX.1.weight"] in (2, 2 * 2)
    text = torch.cat([positive[0][0], negative[0][0]]).square().mean(dim=(0, 1))
    torch.testing.assert_close(torch.from_numpy(matrix.moments("cond_seq_linear.weight")), text)
    assert not any(module._forward_pre_hooks for module in packed.model.modules())

    assert torch.equal(collect(packed, continue_from="x_00001_.gguf"), first)
    added = read_imatrix(output / "imatrix" / "x_00002_.gguf")
    assert (added.chunks, len(added.datasets)) == (2 * matrix.chunks, 2)
    for name, sums in matrix.sums.items():
        assert added.counts[name] == 2 * matrix.counts[name]
        torch.testing.assert_close(added.sums[name], 2 * sums)

    collect(small_dense_twin(path))
    twin = read_imatrix(output / "imatrix" / "x_00003_.gguf")
    for name in weights:
        torch.testing.assert_close(twin.sums[name], matrix.sums[name], rtol=1e-3, atol=1e-3)

    target = save(packed, "Q4_0", tensor_types="single_layers.0.attn.w1k=IQ2_XS", imatrix="x_00002_.gguf")
    assert open_gguf(target).tensors["single_layers.0.attn.w1k.weight"].type.name == "IQ2_XS"
    with pytest.raises(ModelFileError, match="no file of that name in output/imatrix"):
        save(packed, "IQ2_XS", imatrix="../x_00002_.gguf")


def test_what_the_transformer_gets_is_collected_while_sampling(packed, output):
    latent = {"samples": torch.zeros(1, 4, 8, 6)}
    generator = torch.Generator().manual_seed(0)
    positive, negative = ([[torch.randn(1, 6, TEXT, generator=generator), {}]] for _ in range(2))

    def collect(seed, **options):
        return AuraFlowGGUFCalibration.execute(
            packed,
            seed=seed,
            steps=6,
            cfg=3.5,
            sampler_name="euler",
            scheduler="simple",
            positive=positive,
            negative=negative,
            latent_image=latent,
            filename_prefix="x",
            **options,
        ).args[0]["samples"]

    seen = []
    handle = packed.model.diffusion_model.register_forward_pre_hook(
        lambda _, args, options: seen.append((args[0], args[1], options["context"])), with_kwargs=True
    )
    first = collect(5)
    handle.remove()
    assert first.shape == (1, 4, 8, 6)
    assert os.listdir(output / "calibration") == ["x_00001_.safetensors"]
    assert not any(module._forward_pre_hooks for module in packed.model.modules())
    calibration = read_calibration(output / "calibration" / "x_00001_.safetensors")
    (picture,) = calibration.pictures
    assert picture.made == "6 steps of euler, simple, CFG 3.5, seed 5"
    timesteps = [float(timestep[0]) for _, timestep, _ in seen]
    assert len(picture.timesteps) == 4
    for timestep, kept in zip(picture.timesteps, picture.latents, strict=True):
        latents = seen[timesteps.index(timestep)][0]
        assert torch.equal(kept, latents[0].to(kept.dtype))
    for side, conditioning in (("positive", positive), ("negative", negative)):
        assert torch.equal(picture.texts[side], conditioning[0][0][0].to(torch.bfloat16))
    assert len(calibration.held_back().evaluations(TEXT)) == len(calibration.choosing().evaluations(TEXT)) == 4

    assert torch.equal(collect(5, continue_from="x_00001_.safetensors"), first)
    added = read_calibration(output / "calibration" / "x_00002_.safetensors")
    assert [held_back for picture in added.pictures for held_back in picture.held_back] == [False] * 4 + [True] * 4
    with pytest.raises(ModelFileError, match="no file of that name in output/calibration"):
        collect(5, continue_from="../x_00001_.safetensors")


def test_all_nodes_have_a_schema(models, output):
    nodes = asyncio.run(AuraFlowGGUFExtension().get_node_list())
    assert {node.define_schema().node_id for node in nodes} >= {
        "AuraFlowGGUFConvert",
        "AuraFlowGGUFSave",
        "AuraFlowGGUFImportance",
        "AuraFlowGGUFCalibration",
        "AuraFlowGGUFFit",
    }
    for node in nodes:
        node.GET_SCHEMA()
