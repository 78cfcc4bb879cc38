"""Whole conversions of a small AuraFlow."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.quantizer import convert as module
from auraflow_gguf.quantizer.convert import convert
from auraflow_gguf.quantizer.imatrix import ImportanceMatrix, write_imatrix
from auraflow_gguf.quantizer.recipe import NEEDS_IMATRIX, RECIPES
from safetensors.torch import save_file

from .small_model import FIXED, diffusers_weights, loads, native_weights, save_sharded

WEIGHTS = native_weights()
# Those two take ggml's quantizers 6 to 12 s to begin; test_oracle.py has their bytes.
WRITABLE = sorted({*RECIPES} & {*QUANT_TYPES} - {*NEEDS_IMATRIX} - {"IQ1_M", "IQ2_S"})


@pytest.fixture
def source(tmp_path):
    save_file(WEIGHTS, tmp_path / "aura.safetensors")
    return tmp_path / "aura.safetensors"


def converted(source, type_name="Q8_0", **options):
    target = source.parent / f"{type_name}.gguf"
    convert(source, target, type_name, fixed=FIXED, **options)
    return open_gguf(target)


def contents(file):
    """Name → shape, type and bytes of each tensor, in the file's order."""
    return {
        name: (info.shape, info.type.name, file.packed(name).numpy().tobytes()) for name, info in file.tensors.items()
    }


def ggmls_bytes(weight, quant_type):
    rows = np.ascontiguousarray(weight.float().numpy().reshape(-1, weight.shape[-1]))
    return libgguf.quantize_rows_raw(quant_type.id, rows, *rows.shape)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K_M"])
def test_a_recipe_has_ggmls_bytes(source, type_name):
    file = converted(source, type_name)
    loads(file)
    assert set(file.tensors) == set(WEIGHTS)
    for name, weight in WEIGHTS.items():
        info = file.tensors[name]
        assert info.shape == tuple(weight.shape)
        assert info.type == RECIPES[type_name].type_of(name, info.shape, torch.bfloat16)
        assert file.packed(name).numpy().tobytes() == ggmls_bytes(weight, info.type), name


@pytest.mark.parametrize("type_name", WRITABLE)
def test_every_type_has_ggmls_bytes(source, type_name, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1_000)  # a few rows at a time, the last piece smaller
    name = "final_linear.weight"  # a small one: some types take their time
    file = converted(source, "BF16", tensor_types=[f"{name}={type_name}"])
    info = file.tensors[name]
    assert info.type.name == type_name
    assert file.packed(name).numpy().tobytes() == ggmls_bytes(WEIGHTS[name], info.type)


def test_both_spellings_and_all_prefixes_give_the_same_tensors(source, tmp_path):
    expected = contents(converted(source))
    diffusers = diffusers_weights(WEIGHTS)
    for prefix, weights in (
        ("model.diffusion_model.", WEIGHTS),
        ("", diffusers),
        ("transformer.", diffusers),
        ("transformer._orig_mod.", diffusers),
    ):
        save_file({prefix + name: tensor for name, tensor in weights.items()}, source)
        file = converted(source, overwrite=True)
        loads(file)
        assert list(contents(file).items()) == list(expected.items())


def test_the_order_is_by_name_and_number(source):
    names = list(converted(source).tensors)
    assert names[0] == "cond_seq_linear.weight"
    assert sorted(names) == sorted(WEIGHTS)
    layers = [name.split(".")[1] for name in names if name.startswith("single_layers.")]
    assert layers == sorted(layers, key=int)
    assert module._natural_order("single_layers.2.a") < module._natural_order("single_layers.10.a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_sources_of_other_dtypes(tmp_path, dtype):
    weights = native_weights(dtype)
    save_file(weights, tmp_path / "a.safetensors")
    file = converted(tmp_path / "a.safetensors", "Q8_0")
    for name, weight in weights.items():
        info = file.tensors[name]
        assert file.packed(name).numpy().tobytes() == ggmls_bytes(weight, info.type)
    kept = "F16" if dtype == torch.float16 else "BF16"
    bare = "F16" if dtype == torch.float16 else "F32"
    assert file.tensors["modF.1.weight"].type.name == kept
    assert file.tensors["positional_encoding"].type.name == bare


def test_every_kind_of_source_gives_the_same_tensors(source, tmp_path):
    expected = contents(converted(source))
    torch.save({"state_dict": WEIGHTS}, tmp_path / "a.ckpt")
    all_in_one = {f"model.diffusion_model.{name}": tensor for name, tensor in WEIGHTS.items()}
    others = {"vae.decoder.conv_in.weight": torch.ones(4), "text_encoders.x.ids": torch.ones(3, dtype=torch.int64)}
    save_file(all_in_one | others, tmp_path / "all.safetensors")
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    save_sharded(folder, diffusers_weights(WEIGHTS))
    converted(source, "BF16")
    for kind in ("a.ckpt", "all.safetensors", "model", "BF16.gguf"):
        convert(tmp_path / kind, tmp_path / "result.gguf", "Q8_0", fixed=FIXED, overwrite=True)
        assert contents(open_gguf(tmp_path / "result.gguf")) == expected, kind


def test_bare_parameters_without_their_leading_one_get_it_back(source, tmp_path):
    expected = contents(converted(source))
    flat = WEIGHTS | {name: WEIGHTS[name][0] for name in ("positional_encoding", "register_tokens")}
    save_file(flat, tmp_path / "flat.safetensors")
    convert(tmp_path / "flat.safetensors", tmp_path / "flat.gguf", "Q8_0", fixed=FIXED)
    assert contents(open_gguf(tmp_path / "flat.gguf")) == expected


def test_biases_are_swapped_with_their_weights(source, tmp_path):
    weights = WEIGHTS | {"modF.1.bias": torch.arange(512, dtype=torch.bfloat16)}
    other = diffusers_weights(weights)
    other["norm_out.linear.bias"] = torch.cat(weights["modF.1.bias"].chunk(2)[::-1])
    save_file(other, tmp_path / "b.safetensors")
    file = converted(tmp_path / "b.safetensors")
    bias = file.packed("modF.1.bias").view(torch.float32)
    assert torch.equal(bias, weights["modF.1.bias"].float())
    assert list(file.metadata["aura.bias"]) == ["init_x_linear", "modF.1", "t_embedder.mlp.0", "t_embedder.mlp.2"]


def test_requantizing_copies_what_has_the_type_already_and_warns_of_the_rest(source, tmp_path, caplog):
    first = contents(converted(source, "Q3_K_M"))
    assert "quantized already" not in caplog.text
    convert(tmp_path / "Q3_K_M.gguf", tmp_path / "s.gguf", "Q3_K_S", fixed=FIXED)
    assert "Q3_K_M.gguf is quantized already (Q4_K, Q8_0)" in caplog.text
    second = contents(open_gguf(tmp_path / "s.gguf"))
    name = "single_layers.0.attn.w1q.weight"  # Q3_K of Q3_K would be other bytes
    assert second[name] == first[name]
    name = "single_layers.0.mlp.c_proj.weight"
    dequantized = QUANT_TYPES["Q4_K"].dequantize(
        torch.frombuffer(bytearray(first[name][2]), dtype=torch.uint8).view(256, -1)
    )
    assert second[name][2] == ggmls_bytes(dequantized, QUANT_TYPES["Q3_K"])
    caplog.clear()
    convert(tmp_path / "s.gguf", tmp_path / "t.gguf", "Q3_K_S", fixed=FIXED)
    assert contents(open_gguf(tmp_path / "t.gguf")) == second
    assert "quantized already" not in caplog.text


def test_a_packed_diffusers_file_has_its_halves_swapped_as_rows(source, tmp_path):
    expected = contents(converted(source, "Q8_0", tensor_types=["modF.*=Q8_0"]))
    file = gguf.GGUFWriter(tmp_path / "d.gguf", "aura")
    for name, weight in diffusers_weights(WEIGHTS).items():
        quant_type = gguf.GGMLQuantizationType.BF16
        if name == "norm_out.linear.weight" or "_blocks." in name:
            quant_type = gguf.GGMLQuantizationType.Q8_0
        file.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), quant_type), raw_dtype=quant_type)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    convert(tmp_path / "d.gguf", tmp_path / "n.gguf", "Q8_0", tensor_types=["modF.*=Q8_0"], fixed=FIXED)
    assert contents(open_gguf(tmp_path / "n.gguf"))["modF.1.weight"] == expected["modF.1.weight"]
    assert contents(open_gguf(tmp_path / "n.gguf")) == expected


def test_metadata(tmp_path):
    described = {"modelspec.title": "Pony", "modelspec.author": "A. Author", "modelspec.license": "Apache-2.0"}
    save_file(WEIGHTS, tmp_path / "a.safetensors", metadata=described)
    metadata = converted(tmp_path / "a.safetensors", "Q3_K_M").metadata
    assert metadata["general.architecture"] == "aura"
    assert metadata["aura.block_count"] == 3
    assert metadata["aura.embedding_length"] == 256
    assert list(metadata["aura.bias"]) == ["init_x_linear", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    assert metadata["general.name"] == "Pony"
    assert metadata["general.author"] == "A. Author"
    assert metadata["general.license"] == "Apache-2.0"
    assert metadata["general.file_type"] == 12
    assert metadata["general.quantization_version"] == 2
    assert len(metadata["general.source.header_sha256"]) == 64

    convert(tmp_path / "Q3_K_M.gguf", tmp_path / "again.gguf", "Q8_0", fixed=FIXED)
    again = open_gguf(tmp_path / "again.gguf").metadata
    assert {key: again[key] for key in ("general.name", "general.author", "general.license")} == {
        "general.name": "Pony",
        "general.author": "A. Author",
        "general.license": "Apache-2.0",
    }


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("models/aura.v0.3.safetensors", "aura.v0.3"),
        ("models/aura.safetensors.index.json", "aura"),
        ("models/aura.ckpt", "aura"),
        ("models/pony/transformer", "pony"),
        ("models/pony/transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "pony"),
        ("models/pony/transformer/diffusion_pytorch_model.fp16.safetensors", "pony"),
        ("models/aura-00001-of-00003.safetensors", "aura"),
        ("models/pony.v7", "pony.v7"),
    ],
)
def test_the_name_comes_from_the_path(tmp_path, source, name):
    (tmp_path / "models/pony/transformer").mkdir(parents=True)
    (tmp_path / "models/pony.v7").mkdir()
    assert module.model_name(tmp_path / source) == name


@pytest.mark.parametrize("target", ["folder/", "aura.safetensors", "aura"])
def test_a_target_that_comfyui_would_not_list_is_refused(source, tmp_path, target):
    with pytest.raises(ModelFileError, match=r"found no \.gguf at its end"):
        module.convert(source, f"{tmp_path}/{target}", "Q8_0", fixed=FIXED)


def test_gguf_py_reads_it(source, tmp_path):
    converted(source, "Q4_K_M")
    reader = gguf.GGUFReader(tmp_path / "Q4_K_M.gguf")
    assert {tensor.name for tensor in reader.tensors} == set(WEIGHTS)
    weight = next(tensor for tensor in reader.tensors if tensor.name == "single_layers.0.attn.w1v.weight")
    assert weight.tensor_type == gguf.GGMLQuantizationType.Q5_K
    dequantized = gguf.quants.dequantize(weight.data, weight.tensor_type)
    expected = WEIGHTS[weight.name].float().numpy()
    assert np.abs(dequantized - expected).max() < 0.01


def test_progress_goes_from_nothing_to_all(source):
    seen = []
    converted(source, progress=lambda done, total: seen.append((done, total)))
    total = sum(weight.numel() for weight in WEIGHTS.values())
    assert {pair[1] for pair in seen} == {total}
    assert [pair[0] for pair in seen] == sorted(pair[0] for pair in seen)
    assert seen[-1] == (total, total)


@pytest.mark.parametrize(
    ("value", "type_name"), [(float("nan"), "Q8_0"), (float("inf"), "F32"), (1e5, "F16"), (1e5, "Q4_K")]
)
def test_numbers_that_the_type_cannot_hold_are_refused(tmp_path, value, type_name):
    weights = native_weights()
    weights["single_layers.1.mlp.c_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match=r"in single_layers\.1\.mlp\.c_proj\.weight, expected numbers between"):
        converted(tmp_path / "a.safetensors", type_name)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_source_that_ends_early_leaves_nothing(source, tmp_path):
    def cut(done, total):
        if done > total // 2:
            os.truncate(source, 1000)

    with pytest.raises(ModelFileError, match="The file is cut off"):
        converted(source, progress=cut)
    assert os.listdir(tmp_path) == ["aura.safetensors"]


def test_ctrl_c_leaves_nothing(source, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(source, progress=interrupt)
    assert os.listdir(tmp_path) == ["aura.safetensors"]


def test_the_source_is_never_replaced(source, tmp_path):
    converted(source, "Q8_0")
    before = (tmp_path / "Q8_0.gguf").read_bytes()
    with pytest.raises(ModelFileError, match="the source of the conversion under this name"):
        convert(tmp_path / "Q8_0.gguf", tmp_path / "Q8_0.gguf", "Q4_0", overwrite=True, fixed=FIXED)
    assert (tmp_path / "Q8_0.gguf").read_bytes() == before


def test_a_pattern_that_fits_nothing_is_refused(source, tmp_path):
    with pytest.raises(ModelFileError, match=r"no tensor that fits 'single_blocks\.\*'"):
        converted(source, tensor_types=["single_blocks.*=Q8_0"])
    assert os.listdir(tmp_path) == ["aura.safetensors"]


def test_what_was_left_out_is_said(tmp_path, caplog):
    save_file(WEIGHTS | {"vae.conv.weight": torch.ones(4)}, tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO):
        converted(tmp_path / "a.safetensors", "Q8_0")
    assert "left out: 1 tensors of other parts, such as vae.conv.weight" in caplog.text


MEASURED = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from auraflow_gguf.benchmarks.measure import peak_growth
from auraflow_gguf.quantizer.convert import convert
print(peak_growth(lambda: convert({source!r}, {target!r}, "BF16", fixed={{}})))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process's peak since a moment")
def test_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path):
    weights = {name: tensor for name, tensor in WEIGHTS.items() if not name.startswith("single_layers.1.")}
    layer = {name: tensor for name, tensor in weights.items() if name.startswith("single_layers.0.")}
    for number in range(1, 80):
        weights |= {name.replace(".0.", f".{number}.", 1): tensor.clone() for name, tensor in layer.items()}
    size = sum(tensor.nbytes for tensor in weights.values())
    save_file(weights, tmp_path / "a.safetensors")
    script = MEASURED.format(
        tests=str(Path(__file__).parents[1]), source=str(tmp_path / "a.safetensors"), target=str(tmp_path / "a.gguf")
    )
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert size > 190e6
    assert grown < 100e6


def test_types_are_taken_over_from_another_file(source, tmp_path):
    rules = ["single_layers.0.*=Q3_K", "double_layers.*.mod*=Q2_K", "modF.1=Q8_0"]
    first = converted(source, "Q4_K_M", tensor_types=rules)
    other = {name: weight + 0.01 for name, weight in WEIGHTS.items()}
    save_file(diffusers_weights(other), tmp_path / "fine-tune.safetensors")
    like = tmp_path / "like.gguf"
    convert(tmp_path / "fine-tune.safetensors", like, like=first.path, fixed=FIXED)
    made = open_gguf(like)
    assert {name: info.type for name, info in made.tensors.items()} == {
        name: info.type for name, info in first.tensors.items()
    }
    assert {info.type.name for info in made.tensors.values()} >= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q8_0"}
    assert made.metadata["quantize.like"] == "Q4_K_M.gguf"
    assert made.metadata["general.file_type"] == first.metadata["general.file_type"]
    convert(tmp_path / "fine-tune.safetensors", tmp_path / "a.gguf", "Q4_K_M", tensor_types=rules, fixed=FIXED)
    assert contents(made) == contents(open_gguf(tmp_path / "a.gguf"))
    changed = ["single_layers.0.mlp.*=Q6_K"]
    convert(source, like, like=first.path, tensor_types=changed, fixed=FIXED, overwrite=True)
    assert open_gguf(like).tensors["single_layers.0.mlp.c_proj.weight"].type.name == "Q6_K"
    assert open_gguf(like).tensors["single_layers.0.attn.w1q.weight"].type.name == "Q3_K"


def test_a_file_that_cannot_be_taken_for_an_example_is_refused(source, tmp_path):
    example = converted(source, "Q8_0").path
    fewer = {name: weight for name, weight in WEIGHTS.items() if not name.startswith("single_layers.1.")}
    save_file(fewer, tmp_path / "small.safetensors")
    with pytest.raises(
        ModelFileError, match=r"Q8_0.gguf: found other tensors: single_layers.1.attn.w1k, .* and 3 more"
    ):
        convert(tmp_path / "small.safetensors", tmp_path / "a.gguf", like=example, fixed=FIXED)
    with pytest.raises(ValueError, match="either a type or a file"):
        convert(source, tmp_path / "a.gguf", "Q8_0", like=example, fixed=FIXED)
    with pytest.raises(ValueError, match="either a type or a file"):
        convert(source, tmp_path / "a.gguf", fixed=FIXED)
    matrix = ImportanceMatrix()
    for name, weight in WEIGHTS.items():
        matrix.add(name, weight.reshape(-1, weight.shape[-1]).float())
    write_imatrix(tmp_path / "imatrix.gguf", matrix)
    converted(source, "IQ2_XXS", imatrix=tmp_path / "imatrix.gguf")
    with pytest.raises(ModelFileError, match=r"IQ2_XXS.gguf: found tensors of IQ2_XXS, .*--imatrix"):
        convert(source, tmp_path / "a.gguf", like=tmp_path / "IQ2_XXS.gguf", fixed=FIXED)
    assert not (tmp_path / "a.gguf").exists()
