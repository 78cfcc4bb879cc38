"""From collecting to a fitted file to a picture, by the nodes, at full width with one layer of each kind."""

import json
import os
import sys

import comfy.model_management
import folder_paths
import gguf
import pytest
import torch
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.diffusers.transformer import load_diffusers_transformer
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.nodes.calibration import AuraFlowGGUFCalibration
from auraflow_gguf.nodes.fit import AuraFlowGGUFFit
from auraflow_gguf.nodes.save import ModelCheckpoint
from auraflow_gguf.quantizer.quality import fit as fit_module
from auraflow_gguf.quantizer.quality import measuring
from auraflow_gguf.quantizer.quality.calibration import read_calibration
from auraflow_gguf.quantizer.quality.evaluation import Inputs

from .aura_files import make_gguf
from .patches import LINEARS, lora, patched
from .sampling import QUICK, relative_error, sample

SMALLEST = {"samples": torch.zeros(1, 4, 2, 2)}  # one patch


@pytest.fixture(scope="module")
def packed():
    return load_model(make_gguf("Q8_0"), torch.float32)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's output folder, and models/diffusion_models."""
    output, models = tmp_path / "output", tmp_path / "diffusion_models"
    output.mkdir()
    models.mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(models)], {".safetensors"}))
    return output, models


@pytest.fixture
def quickly(monkeypatch):
    """Types that are packed in no time, and no recipes beside the file."""
    monkeypatch.setattr(fit_module, "MEASURED_QUICKLY", ("Q4_0",))
    monkeypatch.setattr(fit_module, "NEAREST", 0)
    for module in (fit_module, measuring):
        monkeypatch.setattr(module, "WRITTEN", ("Q4_0", "Q5_0", "Q8_0"))


def collect(model):
    text = [[torch.randn(1, 1, 2048, generator=torch.Generator().manual_seed(0)), {}]]
    settings = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    texts = {"positive": text, "negative": text}
    AuraFlowGGUFCalibration.execute(model, **settings, **texts, latent_image=SMALLEST, filename_prefix="x")
    return "x_00001_.safetensors"


def fit(model, calibration, size, **options):
    return AuraFlowGGUFFit.execute(model, calibration, size, quick=True, **options).args


def measurements(models):
    """What is kept by group and type."""
    kept = [json.loads(path.read_text())["errors"] for path in models.glob("*.fit.json")]
    return {(group, name): error for errors in kept for group, types in errors.items() for name, error in types.items()}


@pytest.mark.host_independent
def test_a_model_is_fitted_to_a_size(packed, folders, quickly, monkeypatch):
    """With a LoRA; interrupted, and resumed for another size; then in our node, diffusers and gguf-py."""
    output, models = folders
    model = patched(packed, lora)
    calibration = collect(model)
    asked = comfy.model_management.throw_exception_if_processing_interrupted

    def interrupt_in_the_single_layer():
        if any(group.startswith("single_layers.0") for group, _ in measurements(models)):
            comfy.model_management.interrupt_current_processing(True)
        asked()

    with monkeypatch.context() as patch:
        patch.setattr(
            comfy.model_management, "throw_exception_if_processing_interrupted", interrupt_in_the_single_layer
        )
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            fit(model, calibration, 0.42)
    (kept,) = os.listdir(models)
    before = measurements(models)
    path, report = fit(model, calibration, 0.5, output_name="larger")
    assert path == str(models / "larger.gguf")
    assert sorted(os.listdir(models)) == [kept, "larger.gguf"]
    after = measurements(models)
    assert len(before) == 16
    assert len(after) == 23
    assert {key: after[key] for key in before} == before

    file = open_gguf(path)
    assert 0.49e9 < os.path.getsize(path) <= 0.5e9
    assert {info.type.name for info in file.tensors.values()} >= {"Q4_0", "Q5_0", "Q8_0"}
    assert file.metadata["general.name"] == "larger"
    assert file.metadata["quantize.fit.inputs"].startswith(f"the part to choose by of {calibration}")
    assert f"| larger.gguf | {os.path.getsize(path) / 1e9:.3f} |" in report
    expected = sample(model, **QUICK)
    error = relative_error(sample(load_model(path, torch.float32), **QUICK), expected)
    assert 0 < error < 0.2 < relative_error(sample(packed, **QUICK), expected)  # it has the LoRA
    assert len(gguf.GGUFReader(path).tensors) == len(file.tensors)
    inputs = Inputs(read_calibration(output / "calibration" / calibration).held_back())
    with torch.inference_mode(False):
        (theirs,) = inputs.outputs(load_diffusers_transformer(path))
    assert torch.isfinite(theirs).all()


def test_a_model_is_copied_as_it_is_and_what_is_patched_in_16_bit(packed):
    model = ModelCheckpoint(patched(packed, lora))
    types = {name.removeprefix("diffusion_model."): model.exact_type(name) for name in model.shapes}
    for name, info in open_gguf(make_gguf("Q8_0")).tensors.items():
        if info.type.name == "Q8_0":
            assert types[name] == ("BF16" if name.removesuffix(".weight") in LINEARS else "Q8_0"), name
        else:
            assert types[name] in (info.type.name, "F32"), name


@pytest.mark.host_independent
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0.1}, r"found a wanted size of 0.100 GB, expected 0.\d+ GB or more"),
        ({"size": 1e6}, r"found [\d.]+ GB free"),
        ({"output_name": "../x"}, "not a file's name"),
        ({"output_name": "taken"}, "found a file of that name"),
        ({"calibration": "absent.safetensors"}, "no file of that name in output/calibration"),
        ({"imatrix": "absent.gguf"}, "no file of that name in output/imatrix"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(packed, folders, quickly, options, message):
    _, models = folders
    (models / "taken.gguf").touch()
    with pytest.raises((ModelFileError, ValueError), match=message):
        AuraFlowGGUFFit.execute(packed, **{"calibration": "none", "size": 0.4, "quick": True, **options})
    assert os.listdir(models) == ["taken.gguf"]


@pytest.mark.host_independent
def test_without_diffusers_it_says_what_to_install(packed, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for module in ("loader.diffusers.transformer", "quantizer.quality.evaluation", "quantizer.quality.fit"):
        monkeypatch.delitem(sys.modules, f"auraflow_gguf.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install diffusers, into the Python that runs ComfyUI \("):
        fit(packed, "none", 0.4)
    assert os.listdir(folders[1]) == []
