"""The output's error when groups of weights are quantized, on the small model in diffusers' class."""

import json
from dataclasses import replace
from statistics import mean

import pytest
import torch
from auraflow_gguf.loader.diffusers.transformer import load_diffusers_transformer
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.loader.files.parts import PARTS
from auraflow_gguf.quantizer import convert
from auraflow_gguf.quantizer.quality import comparison, evaluation
from auraflow_gguf.quantizer.quality.evaluation import Inputs, output_errors
from auraflow_gguf.quantizer.quality.heads import head_count
from auraflow_gguf.quantizer.quality.inputs import Noise
from auraflow_gguf.quantizer.quality.sensitivity import ALL, GROUPS, sensitivity
from safetensors.torch import save_file

from ..quantizer.small_model import native_weights

WEIGHTS = native_weights()
HEADS = 4
INPUTS = Inputs(Noise(size=8, tokens=5), heads=HEADS)


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
        assert list(expected) == list(INPUTS.source.timesteps)
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
    with evaluation.as_gguf(tmp_path / "other.safetensors") as copy:
        types = {info.type.name for name, info in open_gguf(copy).tensors.items() if name.endswith(".weight")}
    assert types == {type_name}
    assert not copy.parent.exists()
    everything, _ = comparison.compare(source, tmp_path / "other.safetensors")
    errors = output_errors(source, tmp_path / "other.safetensors", INPUTS)
    assert all(error < 10 * everything.relative_error + 1e-6 for error in errors.values())


def test_the_number_of_heads_decides_the_output(source, tmp_path):
    """Beside diffusers' own class with as many heads; 256 a head, which nothing says, is another model."""
    with evaluation.transformer(source, INPUTS) as model:
        output = INPUTS.outputs(model)[0]
    with evaluation.transformer(source, replace(INPUTS, heads=1)) as model:
        other = INPUTS.outputs(model)[0]
    convert.convert(source, tmp_path / "bf16.gguf", "BF16")
    theirs = load_diffusers_transformer(tmp_path / "bf16.gguf", heads=HEADS)
    assert torch.equal(output, INPUTS.outputs(theirs)[0])
    assert evaluation.relative_error(other, output) > 1e-2


def test_the_number_of_heads_is_read_where_a_file_says_it(source, tmp_path):
    config = {"_class_name": "AuraFlowTransformer2DModel", "num_attention_heads": HEADS}
    unsaid = replace(INPUTS, heads=None)
    with pytest.raises(ModelFileError, match=r"found a hidden size of 256, and nothing .* --heads"):
        output_errors(source, source, unsaid)
    convert.convert(source, tmp_path / "said.gguf", "Q4_0", fixed={"head_count": HEADS})
    assert open_gguf(tmp_path / "said.gguf").metadata["aura.attention.head_count"] == HEADS
    expected = output_errors(source, tmp_path / "said.gguf", INPUTS)
    assert output_errors(source, tmp_path / "said.gguf", unsaid) == expected
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert.convert(source, tmp_path / "unsaid.gguf", "Q4_0")
    assert output_errors(source, tmp_path / "unsaid.gguf", unsaid) == expected
    with pytest.raises(ModelFileError, match=r"aura.safetensors: found 4 attention heads, expected 8"):
        output_errors(source, source, replace(INPUTS, heads=8))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": "4"}))
    with pytest.raises(ModelFileError, match=r"config.json: found num_attention_heads = '4'"):
        output_errors(source, source, unsaid)


@pytest.mark.parametrize(("hidden", "given", "expected"), [(3072, None, 12), (3072, 24, 24), (512, 8, 8)])
def test_auraflows_own_width_has_auraflows_heads(source, hidden, given, expected):
    assert head_count([evaluation.open_checkpoint(source)], hidden, given) == expected


def test_heads_of_no_whole_width_are_refused(source):
    with pytest.raises(ModelFileError, match="expected a multiple of the 7 attention heads"):
        output_errors(source, source, replace(INPUTS, heads=7))


def test_the_inputs_are_seeded(source):
    with evaluation.transformer(source, INPUTS) as model:
        first, again = INPUTS.outputs(model), INPUTS.outputs(model)
        other = replace(INPUTS, source=replace(INPUTS.source, seed=1)).outputs(model)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
