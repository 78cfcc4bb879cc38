"""Importance matrices: collected, written, read by others, and used."""

import os

import gguf
import libgguf
import numpy as np
import pytest
import torch
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.quantizer.convert import convert
from auraflow_gguf.quantizer.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from auraflow_gguf.quantizer.recipe import NEEDS_IMATRIX
from safetensors.torch import save_file

from .small_model import FIXED, native_weights

WEIGHTS = native_weights()
IN_LAYERS = {name: weight for name, weight in WEIGHTS.items() if "_layers." in name}


def random_matrix(names=IN_LAYERS) -> ImportanceMatrix:
    generator = torch.Generator().manual_seed(1)
    matrix = ImportanceMatrix(datasets=["a fox"], chunks=2)
    for name in names:
        matrix.add(name, torch.randn(6, WEIGHTS[name].shape[1], generator=generator).exp())
    return matrix


@pytest.fixture
def source(tmp_path):
    save_file(WEIGHTS, tmp_path / "aura.safetensors")
    return tmp_path / "aura.safetensors"


@pytest.fixture
def imatrix(tmp_path):
    write_imatrix(tmp_path / "imatrix.gguf", random_matrix())
    return tmp_path / "imatrix.gguf"


def test_what_enters_the_linears_is_summed_up_while_the_context_lasts():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2, bias=False))
    model = model.to(torch.bfloat16)
    inputs = torch.randn(4, 2, 7, 3).to(torch.bfloat16)
    matrix = ImportanceMatrix()
    with torch.inference_mode():
        with matrix.collecting(model):
            for batch in inputs:
                model(batch)
        model(inputs[0])
        hidden = model[1](model[0](inputs))
    assert list(matrix.counts.items()) == [("0.weight", 56), ("2.weight", 56)]
    assert matrix.chunks == 4
    for name, entered in (("0.weight", inputs), ("2.weight", hidden)):
        expected = entered.float().square().mean(dim=(0, 1, 2)).numpy()
        np.testing.assert_allclose(matrix.moments(name), expected, rtol=1e-5)


def test_hooks_are_removed_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5))
    with pytest.raises(RuntimeError), ImportanceMatrix().collecting(model):
        model(torch.zeros(2, 4))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_written_matrix_is_read_back(imatrix):
    written, read = random_matrix(), read_imatrix(imatrix)
    assert (read.counts, read.datasets, read.chunks) == (written.counts, ["a fox"], 2)
    for name in IN_LAYERS:
        assert torch.equal(read.sums[name], written.sums[name])


def test_gguf_py_and_libgguf_read_it_as_llama_cpps(imatrix):
    reader = gguf.GGUFReader(imatrix)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a fox"]
    assert reader.fields["imatrix.chunk_count"].contents() == 2
    assert reader.fields["imatrix.chunk_size"].contents() == 3
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    name = "single_layers.0.mlp.c_proj.weight"
    assert tensors[f"{name}.in_sum2"].shape.tolist() == [768, 1]
    assert tensors[f"{name}.counts"].data.tolist() == [[6.0]]
    loaded, ours = libgguf.load_imatrix(imatrix), random_matrix()
    assert loaded.keys() == ours.sums.keys()
    np.testing.assert_array_equal(loaded[name], ours.moments(name))


QUICK = [name for name in NEEDS_IMATRIX if name != "IQ1_S"]  # which test_oracle.py has, on fewer weights


@pytest.mark.parametrize("type_name", [*QUICK, "Q4_K", "IQ3_XXS", "Q8_0"])
def test_the_moments_reach_ggmls_quantizer(source, imatrix, tmp_path, type_name):
    name = "single_layers.1.mlp.c_proj.weight"
    tensor_types = [f"{name}={type_name}"]
    convert(source, tmp_path / "a.gguf", "BF16", tensor_types=tensor_types, imatrix=imatrix, fixed=FIXED)
    file = open_gguf(tmp_path / "a.gguf")
    rows = WEIGHTS[name].float().numpy()
    expected = libgguf.quantize_rows_raw(QUANT_TYPES[type_name].id, rows, *rows.shape, random_matrix().moments(name))
    assert file.packed(name).numpy().tobytes() == expected
    if type_name == "Q4_K":
        assert expected != libgguf.quantize_rows_raw(QUANT_TYPES[type_name].id, rows, *rows.shape)
    assert file.metadata["quantize.imatrix.file"] == "imatrix.gguf"
    assert file.metadata["quantize.imatrix.dataset"] == "a fox"
    assert file.metadata["quantize.imatrix.entries_count"] == len(IN_LAYERS)
    assert file.metadata["quantize.imatrix.chunks_count"] == 2


def test_what_has_no_moments_is_quantized_without_and_said(source, tmp_path, caplog):
    names = list(IN_LAYERS)
    write_imatrix(tmp_path / "imatrix.gguf", random_matrix(names[1:]))
    convert(source, tmp_path / "a.gguf", "Q4_K", imatrix=tmp_path / "imatrix.gguf", fixed=FIXED)
    assert f"imatrix.gguf has no moments for {names[0]}: quantized without." in caplog.text
    rows = WEIGHTS[names[0]].float().numpy()
    expected = libgguf.quantize_rows_raw(QUANT_TYPES["Q4_K"].id, rows, *rows.shape)
    assert open_gguf(tmp_path / "a.gguf").packed(names[0]).numpy().tobytes() == expected


def test_a_type_that_needs_moments_is_refused_where_there_are_none(source, tmp_path):
    names = list(IN_LAYERS)
    write_imatrix(tmp_path / "imatrix.gguf", random_matrix(names[1:]))
    with pytest.raises(ModelFileError, match=f"found no moments for {names[0]}, expected those that IQ2_XS cannot"):
        convert(source, tmp_path / "a.gguf", "IQ2_XS", imatrix=tmp_path / "imatrix.gguf", fixed=FIXED)
    assert "a.gguf" not in os.listdir(tmp_path)


def altered(matrix: ImportanceMatrix, name: str, sums: torch.Tensor) -> ImportanceMatrix:
    matrix.sums[name] = sums
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (altered(random_matrix(), "double_layers.0.attn.w1q.weight", torch.ones(128)), "128 sums for .*expected 256"),
        (ImportanceMatrix({"blk.0.attn_q.weight": torch.ones(4)}, {"blk.0.attn_q.weight": 1}), "none of the model's"),
        (altered(random_matrix(), "double_layers.0.attn.w1q.weight", torch.full((256,), torch.nan)), "NaN, infinity"),
        (altered(random_matrix(), "double_layers.0.attn.w1q.weight", torch.full((256,), -1.0)), "negative"),
        (ImportanceMatrix(), "a GGUF file without sums of squares, expected an importance matrix"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(source, tmp_path, matrix, message):
    write_imatrix(tmp_path / "other.gguf", matrix)
    with pytest.raises(ModelFileError, match=f"^other.gguf: found .*{message}"):
        convert(source, tmp_path / "a.gguf", "Q4_0", imatrix=tmp_path / "other.gguf", fixed=FIXED)
    assert "a.gguf" not in os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "found no x.weight.counts"),
        (np.ones((1, 1), np.float16), "x.weight.counts as F16"),
        (np.ones((8, 1), np.float32), "8 counts for x.weight"),
    ],
)
def test_counts_of_other_kinds_are_refused(tmp_path, counts, message):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "")
    writer.add_tensor("x.weight.in_sum2", np.ones((1, 4), np.float32))
    if counts is not None:
        writer.add_tensor("x.weight.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=message):
        read_imatrix(tmp_path / "other.gguf")
