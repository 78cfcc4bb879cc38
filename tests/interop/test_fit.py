"""The best file for a size, on the small model in diffusers' class."""

import json
import math
import os
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from auraflow_gguf.loader.diffusers.transformer import load_diffusers_transformer
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.loader.weights.layout import pack
from auraflow_gguf.quantizer.checkpoints import open_checkpoint
from auraflow_gguf.quantizer.convert import convert
from auraflow_gguf.quantizer.imatrix import ImportanceMatrix, write_imatrix
from auraflow_gguf.quantizer.inspection import describe, report
from auraflow_gguf.quantizer.quality import evaluation
from auraflow_gguf.quantizer.quality.evaluation import Inputs, mean_square
from auraflow_gguf.quantizer.quality.fit import fit
from auraflow_gguf.quantizer.quality.fitted import Wanted
from auraflow_gguf.quantizer.quality.groups import group_weights
from auraflow_gguf.quantizer.quality.inputs import Fewer, Noise
from auraflow_gguf.quantizer.quality.measurements import kept_measurements
from auraflow_gguf.quantizer.quality.measuring import Subject, measure
from auraflow_gguf.quantizer.quality.resumed import Resumed
from safetensors.torch import save_file

from ..quantizer.small_model import FIXED, native_weights

HEADS = 4
WEIGHTS = native_weights()
INPUTS = Inputs(Noise(size=8, tokens=5, timesteps=(0.8, 0.2)), heads=HEADS)
COUNT = sum(weight.numel() for weight in WEIGHTS.values())
QUICK = {"measured": ("Q2_K", "Q4_K")}
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "Q4_0", "Q5_0")  # those that are quick to make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the small model, and what is measured of it by the first test that needs it."""
    folder = tmp_path_factory.mktemp("fit")
    save_file(WEIGHTS, folder / "aura.safetensors")
    fit(folder / "aura.safetensors", folder / "first.gguf", Wanted(bits=5, types=TYPES), INPUTS, **QUICK)
    return folder


def types(path):
    return {name: info.type.name for name, info in open_gguf(path).tensors.items()}


def of_groups(path):
    """The types of each group in a file, one or several."""
    written = types(path)
    return {group.name: {written[name] for name in group.weights} for group in group_weights(written)}


def test_every_linear_is_in_one_group():
    groups = group_weights(WEIGHTS)
    members = [name for group in groups for name in group.weights]
    assert sorted(members) == sorted(name for name in WEIGHTS if name.endswith(".weight"))
    by_name = {group.name: group.weights for group in groups}
    assert by_name["single_layers.1 q, k"] == ("single_layers.1.attn.w1q.weight", "single_layers.1.attn.w1k.weight")
    assert by_name["double_layers.0 image v"] == ("double_layers.0.attn.w2v.weight",)
    assert by_name["double_layers.0 text MLP in"] == tuple(f"double_layers.0.mlpC.c_fc{n}.weight" for n in (1, 2))
    assert by_name["modF.1"] == ("modF.1.weight",)
    assert len(groups) == 12 + 2 * 6 + 6


def test_the_file_has_the_size_and_the_types(folder):
    source, target = folder / "aura.safetensors", folder / "a.gguf"
    lines = []
    for bits in (3.5, 6.5):
        made = fit(source, target, Wanted(bits=bits, types=TYPES), INPUTS, **QUICK, overwrite=True, say=lines.append)
        copying, measuring, *_ = lines
        assert copying.startswith("Copying the model into a GGUF file of 0.01 GB")
        assert "All is measured already" in measuring
        lines.clear()
        assert made.size == target.stat().st_size <= bits * COUNT / 8
        assert made.size > 0.97 * bits * COUNT / 8
        for group, written in of_groups(target).items():
            assert written == {made.types.get(group) or "BF16"}, group
        assert len(set(made.types.values())) > 3
        assert torch.isfinite(INPUTS.outputs(load_diffusers_transformer(target, heads=HEADS))[0]).all()
    limit = made.size - 1
    assert fit(source, target, Wanted(size=limit, types=TYPES), INPUTS, **QUICK, overwrite=True).size <= limit
    assert not list(folder.glob("*.partial"))


def test_the_figures_are_those_of_the_file(folder):
    source, target = folder / "aura.safetensors", folder / "b.gguf"
    made = fit(source, target, Wanted(bits=4.6, types=TYPES), INPUTS, **QUICK)
    held_back = replace(INPUTS, source=INPUTS.source.held_back())
    with evaluation.transformer(source, held_back) as model:
        reference = held_back.outputs(model)

    def error(path):
        return math.sqrt(mean_square(held_back.outputs(load_diffusers_transformer(path, heads=HEADS)), reference))

    assert made.measured == pytest.approx(error(target), rel=1e-4)
    assert made.predicted == pytest.approx(made.measured, rel=1 / 3)
    smaller, larger = made.recipes
    assert smaller.size <= made.size <= larger.size
    for recipe in made.recipes:
        convert(source, folder / "recipe.gguf", recipe.name, overwrite=True, fixed={"head_count": HEADS})
        assert (folder / "recipe.gguf").stat().st_size == recipe.size
        assert recipe.measured == pytest.approx(error(folder / "recipe.gguf"), rel=1e-4)
        assert recipe.predicted == pytest.approx(recipe.measured, rel=1 / 3)
    assert made.measured < smaller.measured
    metadata = open_gguf(target).metadata
    assert metadata["quantize.fit.measured_error"] == pytest.approx(made.measured)
    assert metadata["quantize.fit.predicted_error"] == pytest.approx(made.predicted)
    assert metadata["quantize.fit.inputs"].startswith(INPUTS.source.about)
    assert metadata["aura.attention.head_count"] == HEADS
    assert set(metadata["quantize.fit.groups"]) == made.types.keys()
    description = describe(target, fixed=FIXED)
    assert description.metadata["quantize.fit.measured_error"] == metadata["quantize.fit.measured_error"]
    assert "quantize.fit.tool: auraflow-gguf fit" in report(description)
    squares = sum(error**2 for error in metadata["quantize.fit.group_errors"])
    assert math.sqrt(squares) == pytest.approx(made.predicted, rel=1e-4)


def test_a_measurement_is_what_a_file_of_it_gives(folder):
    source = folder / "aura.safetensors"
    (kept,) = folder.glob("*.fit.json")
    errors = json.loads(kept.read_text())["errors"]
    assert errors["cond_seq_linear"].keys() == {"Q4_0", "Q8_0"}  # rows of 128
    choosing = replace(INPUTS, source=INPUTS.source.choosing())
    with evaluation.transformer(source, choosing) as model:
        reference = choosing.outputs(model)
    for group, pattern in (
        ("single_layers.1 q, k", "single_layers.1.attn.w1[qk]"),
        ("double_layers.0 text MLP out", "double_layers.0.mlpC.c_proj"),
        ("t_embedder.mlp.2", "t_embedder.mlp.2"),
        ("modF.1", "modF.1"),
    ):
        rules = [f"{pattern}=Q2_K"]
        convert(source, folder / "one.gguf", "BF16", tensor_types=rules, fixed=FIXED, overwrite=True)
        outputs = choosing.outputs(load_diffusers_transformer(folder / "one.gguf", heads=HEADS))
        assert errors[group]["Q2_K"] == pytest.approx(mean_square(outputs, reference), rel=1e-3)
        assert errors[group]["Q2_K"] > 2 * errors[group]["Q4_K"]


def test_outputs_from_a_layer_on_are_those_of_the_whole(folder):
    with evaluation.transformer(folder / "aura.safetensors", INPUTS) as model:
        resumed = Resumed(model, INPUTS)
        blocks = [*model.joint_transformer_blocks, *model.single_transformer_blocks]
        ran = []
        for number, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, number=number: ran.append(number))
        last = blocks[-1].ff.linear_1
        original, shape = last.weight, tuple(last.weight.shape)
        negative = (-original.dequantize()).bfloat16().view(torch.uint8)
        changed = pack(negative, "BF16", shape, torch.float32)
        for layer in range(resumed.layers + 1):
            resumed.start_at(layer)
            ran.clear()
            assert all(map(torch.equal, resumed.outputs(), INPUTS.outputs(model)))
            assert ran[: len(ran) // 2] != [] or layer == resumed.layers
            assert set(ran[: 2 * (resumed.layers - layer)]) == set(range(layer, resumed.layers))
            if layer < resumed.layers:
                last.weight = changed
                assert all(map(torch.equal, resumed.outputs(), INPUTS.outputs(model)))
                last.weight = original
        assert [*model.joint_transformer_blocks, *model.single_transformer_blocks] == blocks


def test_floors_and_ceilings(folder):
    wanted = Wanted(
        bits=4.5,
        types=("Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
        at_least=("single_layers.0.mlp.*=Q5_K",),
        at_most=("double_layers.*.mod*=Q3_K",),
    )
    made = fit(folder / "aura.safetensors", folder / "c.gguf", wanted, INPUTS, **QUICK)
    for name, chosen in types(folder / "c.gguf").items():
        bits = QUANT_TYPES[chosen].bits_per_weight
        if fnmatchcase(name, "double_layers.*.mod*"):
            assert bits <= QUANT_TYPES["Q3_K"].bits_per_weight
        elif name.startswith("single_layers.0.mlp."):
            assert bits >= QUANT_TYPES["Q5_K"].bits_per_weight
    assert set(made.types.values()) <= {*wanted.types, ""}


def test_an_importance_matrix_is_for_measuring_and_for_writing(tmp_path):
    save_file(WEIGHTS, tmp_path / "aura.safetensors")
    matrix = ImportanceMatrix()
    generator = torch.Generator().manual_seed(0)
    for name, weight in WEIGHTS.items():
        if name.endswith(".weight"):
            scale = torch.rand(weight.shape[-1], generator=generator).mul(4).exp()
            matrix.add(name, scale * torch.randn(32, weight.shape[-1], generator=generator))
    write_imatrix(tmp_path / "imatrix.gguf", matrix)
    measured = {}
    for imatrix in (None, tmp_path / "imatrix.gguf"):
        checkpoint = open_checkpoint(tmp_path / "aura.safetensors")
        types = ("Q2_K", "Q4_K", "IQ2_XXS")
        subject = Subject.of(checkpoint, matrix if imatrix else ImportanceMatrix(), ("Q2_K", "Q1_0"), types)
        kept = kept_measurements(subject.checkpoint, "aura", tmp_path, {"imatrix": imatrix is not None})
        subject = replace(subject, groups=subject.groups[-3:])
        measure(subject, tmp_path / "aura.safetensors", INPUTS, kept, lambda line: None)
        measured[imatrix is not None] = kept
    assert len(list(tmp_path.glob("*.fit.json"))) == 2
    assert measured[True].errors.keys() == measured[False].errors.keys()
    for group in measured[True].errors:
        assert measured[True].errors[group] != measured[False].errors[group]
        assert "IQ2_XXS" in measured[True].rulers[group]
        assert "IQ2_XXS" not in measured[False].rulers[group]


def test_other_inputs_have_other_measurements(folder, tmp_path):
    save_file(WEIGHTS, tmp_path / "aura.safetensors")
    changed = WEIGHTS["single_layers.1.mlp.c_proj.weight"].clone()
    changed[5:] += 0.1
    save_file(WEIGHTS | {"single_layers.1.mlp.c_proj.weight": changed}, tmp_path / "other.safetensors")
    first, other = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("aura", "other"))
    keys = {
        kept_measurements(checkpoint, "aura", tmp_path, {"inputs": inputs}).key
        for checkpoint in (first, other)
        for inputs in (INPUTS.source.fingerprint(), replace(INPUTS.source, seed=9).fingerprint())
    }
    assert len(keys) == 4
    assert first.fingerprint() == other.fingerprint()  # the header alone does not tell


def test_fewer_evaluations_are_of_all_timesteps_and_sides():
    noise = Noise(size=4, tokens=2, timesteps=tuple(n / 32 for n in range(32)))
    fewer = [evaluation.timestep for evaluation in Fewer(noise, 4).evaluations(8)]
    places = [round(32 * timestep) for timestep in fewer]
    assert [place // 8 for place in places] == [0, 1, 2, 3]  # of each picture one
    assert sorted(place % 8 // 2 for place in places) == [0, 1, 2, 3]  # each timestep once
    assert {place % 2 for place in places} == {0, 1}  # both sides
    assert len(Fewer(noise, 40).evaluations(8)) == 32


@pytest.mark.parametrize(
    ("wanted", "options", "message"),
    [
        (Wanted(bits=1.5), {}, "found a wanted size of 0.001 GB, expected 0.00"),
        (Wanted(bits=4, size=10**6), {}, "either a size or bits"),
        (Wanted(bits=4, at_least=("x=Q5_K",)), {}, "'x=Q5_K' fits no weight"),
        (Wanted(bits=4, at_least=("*",)), {}, "not of the form PATTERN=TYPE"),
        (Wanted(bits=4, at_least=("*=Q8_0",), at_most=("*=Q4_0",)), {}, "No type is left for"),
        (Wanted(bits=4), {"measured": ("IQ1_S",)}, "IQ1_S cannot be measured"),
        (Wanted(bits=4), {"measured": ("Q4_K_M",)}, "Q4_K_M cannot be measured"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(folder, wanted, options, message):
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        fit(folder / "aura.safetensors", folder / "none.gguf", wanted, INPUTS, **(QUICK | options))
    assert sorted(os.listdir(folder)) == before


def test_a_target_is_replaced_only_on_request_and_measurements_are_checked(folder, tmp_path):
    save_file(WEIGHTS, tmp_path / "aura.safetensors")
    (tmp_path / "a.gguf").write_text("precious")
    with pytest.raises(ModelFileError, match="found a file of that name"):
        fit(tmp_path / "aura.safetensors", tmp_path / "a.gguf", Wanted(bits=5, types=TYPES), INPUTS, **QUICK)
    (kept,) = folder.glob("*.fit.json")
    values = json.loads(kept.read_text())
    values["errors"]["modF.1"]["Q2_K"] = -1.0
    (tmp_path / kept.name).write_text(json.dumps(values))
    with pytest.raises(ModelFileError, match=r"fit.json: found a damaged file"):
        fit(
            tmp_path / "aura.safetensors",
            tmp_path / "a.gguf",
            Wanted(bits=5, types=TYPES),
            INPUTS,
            **QUICK,
            overwrite=True,
        )
    assert (tmp_path / "a.gguf").read_text() == "precious"
