"""The output's error when groups of weights are quantized, on the small model in diffusers' class."""

from dataclasses import replace
from statistics import mean

import pytest
import torch
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.parts import PARTS
from auraflow_gguf.quantizer import convert
from auraflow_gguf.quantizer.quality import comparison, evaluation
from auraflow_gguf.quantizer.quality.evaluation import Inputs, output_errors
from auraflow_gguf.quantizer.quality.sensitivity import ALL, GROUPS, sensitivity
from safetensors.torch import save_file

from ..quantizer.small_model import native_weights

WEIGHTS = native_weights()
INPUTS = Inputs(size=8, tokens=5)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "transformer", replace(AURAFLOW, fixed={}))
    save_file(WEIGHTS, tmp_path / "aura.safetensors")
    return tmp_path / "aura.safetensors"


def test_each_group_alone_gives_what_a_file_of_it_gives(source, tmp_path):
    seen = []
    rows = {
        row.group: row
        for row in sensitivity(source, ["Q8_0", "Q3_K"], INPUTS, progress=lambda *pair: seen.append(pair))
    }
    assert rows.keys() == {*GROUPS, ALL}
    assert seen[-1] == (14, 14)
    assert sum(rows[group].weights for group in GROUPS) == sum(
        weight.numel() for name, weight in WEIGHTS.items() if name.endswith(".weight")
    )
    for group, rules in {
        "MLP c_proj": ["*.c_proj=Q3_K"],
        "attention output": ["*.attn.w[12]o=Q3_K"],
        ALL: ["*_layers.*=Q3_K"],
    }.items():
        row, target = rows[group], tmp_path / "one.gguf"
        assert 0 < row.errors["Q8_0"] < row.errors["Q3_K"]
        convert.convert(source, target, "BF16", tensor_types=rules, overwrite=True)
        expected = output_errors(source, target, INPUTS)
        assert list(expected) == list(INPUTS.timesteps)
        assert row.errors["Q3_K"] == pytest.approx(mean(expected.values()), rel=1e-4)
        assert row.nbytes["Q3_K"] == row.weights * 110 // 256
    assert rows[ALL].errors["Q3_K"] > rows["MLP c_proj"].errors["Q3_K"]


def test_the_model_is_as_it_was_after_each_measurement(source):
    rows = sensitivity(source, ["Q2_K", "BF16", "F32"], INPUTS)
    for row in rows:
        assert row.errors["Q2_K"] > 0
        assert row.errors["BF16"] < 1e-6
        assert row.errors["F32"] < 1e-6


@pytest.mark.parametrize(
    ("dtype", "type_name"),
    [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float8_e4m3fn, "BF16")],
)
def test_a_checkpoint_is_evaluated_in_its_own_precision(tmp_path, source, dtype, type_name):
    save_file(native_weights(dtype), tmp_path / "other.safetensors")
    checkpoint = evaluation.open_checkpoint(tmp_path / "other.safetensors")
    assert evaluation._float_type(checkpoint) == type_name
    everything, _ = comparison.compare(source, tmp_path / "other.safetensors")
    errors = output_errors(source, tmp_path / "other.safetensors", INPUTS)
    assert all(error < 10 * everything.relative_error + 1e-6 for error in errors.values())


def test_the_inputs_are_seeded(source):
    with evaluation.transformer(source, INPUTS) as model:
        first, again = INPUTS.outputs(model), INPUTS.outputs(model)
        other = replace(INPUTS, seed=1).outputs(model)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
