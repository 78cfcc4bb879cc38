"""The command: in this process on the small model, and run as a file from a folder of another name."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from auraflow_gguf import cli
from auraflow_gguf.devtools.random_models import native_shapes, random_weight
from auraflow_gguf.loader.files.parts import PARTS
from auraflow_gguf.loader.files.pile_t5 import PILE_T5_XL
from auraflow_gguf.quantizer import convert, inspection
from auraflow_gguf.quantizer.imatrix import ImportanceMatrix, write_imatrix
from auraflow_gguf.quantizer.quality.calibration import Calibration, write_calibration
from safetensors.torch import save_file

from .quantizer.small_model import TEXT, native_weights
from .quantizer.test_text_encoder import SIZES as TEXT_SIZES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The small model's checkpoint, in a folder that is the current one; its widths are accepted."""
    for part, architecture in PARTS.items():
        monkeypatch.setitem(PARTS, part, replace(architecture, fixed={}))
    monkeypatch.chdir(tmp_path)
    save_file(native_weights(), "aura.safetensors")
    return "aura.safetensors"


def test_convert_inspect_verify(source, capsys):
    assert cli.main(["convert", source, "a.gguf", "--type", "q8_0", "--tensor-type", "*.c_proj=F16"]) == 0
    assert "a.gguf: 0.01 GB written." in capsys.readouterr().out
    assert cli.main(["verify", "a.gguf"]) == 0
    assert capsys.readouterr().out == "a.gguf: sound.\n"
    assert cli.main(["inspect", "a.gguf"]) == 0
    shown = capsys.readouterr().out
    assert "an AuraFlow transformer, native names\n" in shown
    assert "Q8_0 × 8, F16 × 4" in shown
    assert "VRAM: 0.00 GB for the weights with the modulation cache, 0.01 GB without" in shown
    assert cli.main(["inspect", "--json", "a.gguf"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metadata"]["general.name"] == "aura"
    assert report["groups"][1]["types"] == {"Q8_0": 8, "F16": 4}
    assert report["groups"][2] == {
        "name": "modulation",
        "weights": 1703936,
        "nbytes": 1933312,
        "types": {"Q8_0": 4, "BF16": 1},
        "bits_per_weight": 9.0769,
    }


def test_a_text_encoder_by_the_same_commands(source, capsys):
    shapes = native_shapes(PILE_T5_XL, TEXT_SIZES)
    encoder = {f"text_encoders.{name}": random_weight(name, shape, seed=0) for name, shape in shapes.items()}
    save_file(encoder, "t5.safetensors")
    save_file(
        encoder | {f"model.diffusion_model.{name}": w for name, w in native_weights().items()}, "both.safetensors"
    )
    convert = ["convert", "both.safetensors"]
    assert cli.main([*convert, "a.gguf", "--type", "Q8_0", "--part", "text_encoder"]) == 0
    assert cli.main([*convert, "transformer.gguf", "--type", "Q8_0"]) == 0
    assert cli.main(["convert", "t5.safetensors", "b.gguf", "--type", "Q8_0"]) == 0
    assert Path("a.gguf").stat().st_size == Path("b.gguf").stat().st_size != Path("transformer.gguf").stat().st_size
    assert cli.main(["verify", "a.gguf"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", "a.gguf"]) == 0
    shown = capsys.readouterr().out
    assert "the Pile-T5-XL text encoder, llama.cpp names" in shown
    assert "norms" in shown
    assert cli.main(["compare", "t5.safetensors", "b.gguf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_target_is_replaced_only_on_request(source, capsys):
    Path("a.gguf").write_text("precious")
    assert cli.main(["convert", source, "a.gguf", "--type", "Q8_0"]) == 1
    assert "found a file of that name" in capsys.readouterr().err
    assert Path("a.gguf").read_text() == "precious"
    assert cli.main(["convert", source, "a.gguf", "--type", "Q8_0", "--overwrite"]) == 0
    assert cli.main(["verify", "a.gguf"]) == 0


def test_verify_tells_a_damaged_file(source, capsys):
    cli.main(["convert", source, "a.gguf", "--type", "Q8_0"])
    with open("a.gguf", "r+b") as file:
        start = inspection.open_gguf("a.gguf").tensors["single_layers.0.attn.w1q.weight"].offset
        file.seek(start)
        file.write(b"\xff\x7f")
    capsys.readouterr()
    assert cli.main(["verify", "a.gguf"]) == 1
    assert capsys.readouterr().out == (
        "single_layers.0.attn.w1q.weight (Q8_0): 1 of 2048 blocks have NaN or infinity.\na.gguf: damaged.\n"
    )


def test_compare(source, capsys):
    cli.main(["convert", source, "a.gguf", "--type", "Q4_K_M"])
    capsys.readouterr()
    assert cli.main(["compare", source, "a.gguf"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("all ")
    assert len(lines) == 2 + 10 + 1
    assert "_layers." in lines[2]
    assert cli.main(["compare", source, "a.gguf", "--json", "--forward", "--size", "8", "--heads", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tensors"]) == len(native_weights())
    assert report["tensors"][0]["relative_error"] > report["all"]["relative_error"] > 0.01
    assert report["forward"].keys() == {"0.9", "0.7", "0.5", "0.3", "0.1"}
    assert all(0 < error < 1 for error in report["forward"].values())


def test_a_latent_larger_than_the_positions_is_refused(source, capsys):
    assert cli.main(["sensitivity", source, "--type", "Q8_0", "--size", "18", "--heads", "4"]) == 1
    assert "found positions for a latent of 16 × 16, expected 18 × 18" in capsys.readouterr().err


def test_a_code_page_without_our_letters(source, tmp_path):
    """As on Windows, when the output goes to a file."""
    command = [sys.executable, str(ROOT / "cli.py"), "convert", source, "模型.safetensors", "--type", "Q8_0"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp437"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert ran.returncode == 1
    assert rb"\u6a21\u578b.safetensors: found no .gguf at its end" in ran.stderr


def test_sensitivity(source, capsys):
    arguments = ["sensitivity", source, "--type", "q4_k", "--type", "Q8_0", "--size", "8", "--tokens", "4"]
    assert cli.main(arguments) == 1
    assert "nothing that says the number of attention heads" in capsys.readouterr().err
    assert cli.main([*arguments, "--heads", "4"]) == 0
    shown = capsys.readouterr()
    assert "runs on noise in place of latents and texts" in shown.err
    lines = shown.out.splitlines()
    assert lines[1] == "| weights quantized | millions | Q4_K | Q8_0 |"
    assert [line.split("|")[1].strip() for line in lines[3:]][-2:] == ["embedders, output", "all layers"]


def test_a_calibration_file_is_what_the_transformer_runs_on(source, capsys):
    cli.main(["convert", source, "a.gguf", "--type", "Q4_0"])
    latents, text = torch.randn(4, 4, 8, 8), torch.randn(3, TEXT)
    calibration = Calibration().adding("", [0.8, 0.6, 0.4, 0.2], latents, {"positive": text, "negative": 0 * text})
    write_calibration("b.safetensors", calibration)
    capsys.readouterr()
    options = ["--heads", "4", "--json", "--calibration", "b.safetensors"]
    assert cli.main(["compare", source, "a.gguf", "--forward", *options]) == 0
    shown = capsys.readouterr()
    assert "runs on the part that is held back of b.safetensors" in shown.err
    forward = json.loads(shown.out)["forward"]
    assert {round(float(timestep), 3) for timestep in forward} == {0.6, 0.2}
    assert all(0 < error < 1 for error in forward.values())
    assert cli.main(["sensitivity", source, "--type", "Q4_0", *options]) == 0
    shown = capsys.readouterr()
    assert "runs on the part to choose by of b.safetensors" in shown.err
    assert cli.main(["sensitivity", source, "--type", "Q4_0", "--heads", "4", "--calibration", "none"]) == 1
    assert "none: found no such file, expected a calibration file" in capsys.readouterr().err


def test_fit(source, capsys):
    arguments = [
        "fit",
        source,
        "a.gguf",
        "--bits",
        "5",
        "--heads",
        "4",
        "--noise-size",
        "8",
        "--tokens",
        "4",
        "--quick",
    ]
    arguments += [word for name in ("q3_k", "Q4_K", "Q6_K") for word in ("--type", name)]
    assert cli.main([*arguments, "--at-least", "single_layers.*.mlp.c_proj=Q6_K"]) == 0
    shown = capsys.readouterr()
    assert "noise in place of latents and texts" in shown.err
    assert "measurements of 4 evaluations" in shown.err
    rows = [line.split(" | ") for line in shown.out.splitlines()[2:]]
    assert len(rows) == 3
    assert rows[2][0] == "| a.gguf"
    assert 4.9 < float(rows[2][2]) <= 5
    assert cli.main(["convert", source, "b.gguf", "--like", "a.gguf"]) == 0
    assert cli.main(["inspect", "b.gguf"]) == 0
    assert "quantize.like: a.gguf" in capsys.readouterr().out
    assert cli.main(["inspect", "a.gguf"]) == 0
    *_, last, _ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"single_layers\.1( +(Q3_K|Q4_K|Q6_K|BF16) 0\.\d{5}){6}", last)
    assert cli.main(["inspect", "a.gguf", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]["names"]) == 4
    assert cli.main(["fit", source, "a.gguf", "--size", "1KB", "--heads", "4", "--noise-size", "8", "--overwrite"]) == 1
    assert "expected 0.00" in capsys.readouterr().err


def test_an_importance_matrix_allows_the_types_that_need_one(source, capsys):
    matrix = ImportanceMatrix()
    for name, weight in native_weights().items():
        matrix.add(name, weight.reshape(-1, weight.shape[-1]).float())
    write_imatrix("imatrix.gguf", matrix)
    assert cli.main(["convert", source, "a.gguf", "--type", "IQ2_XXS", "--imatrix", "imatrix.gguf"]) == 0
    assert cli.main(["verify", "a.gguf"]) == 0
    assert cli.main(["convert", source, "b.gguf", "--type", "Q4_0", "--imatrix", "a.gguf"]) == 1
    assert "a.gguf: found a GGUF file without sums of squares" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "aura.safetensors", "a.gguf", "--type", "Q9"], "Q9 is not a type that can be written"),
        (["convert", "aura.safetensors", "a.gguf", "--type", "IQ2_XS"], "importance matrix"),
        (["convert", "aura.safetensors", "a.gguf", "--type", "Q8_0", "--tensor-type", "x"], "PATTERN=TYPE"),
        (["convert", "aura.safetensors"], "required"),
        (["compare", "a.gguf", "b.gguf", "--forward", "--size", "33"], "size is even and at least 2"),
        (["compare", "a.gguf", "b.gguf", "--forward", "--device", "foo"], "--device foo cannot be used here"),
        (["sensitivity", "aura.safetensors", "--tokens", "0"], "--tokens 0: at least 1"),
        (["sensitivity", "aura.safetensors", "--heads", "0"], "--heads 0: at least 1"),
        (["sensitivity", "aura.safetensors", "--type", "Q4_K_M"], "Q4_K_M cannot be measured. These can: F32"),
        (["fit", "aura.safetensors", "a.gguf"], "one of the arguments --size --bits is required"),
        (["fit", "aura.safetensors", "a.gguf", "--size", "4"], "expected a number and a unit, such as 4.0GB"),
        (
            ["fit", "aura.safetensors", "a.gguf", "--bits", "4", "--type", "Q4_K_M"],
            "Q4_K_M is not the type of a tensor",
        ),
        (["fit", "aura.safetensors", "a.gguf", "--bits", "4", "--at-most", "x"], "PATTERN=TYPE"),
        ([], "required"),
    ],
)
def test_a_wrong_command_line_exits_with_2(source, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["aura.safetensors"]


@pytest.mark.parametrize(
    ("package", "modules", "arguments"),
    [
        (
            "libgguf",
            ("quantizer.convert", "quantizer.quantize"),
            ["convert", "aura.safetensors", "a.gguf", "--type", "Q8_0"],
        ),
        (
            "diffusers",
            ("loader.diffusers.transformer", "quantizer.quality.evaluation", "quantizer.quality.sensitivity"),
            ["sensitivity", "aura.safetensors"],
        ),
    ],
)
def test_a_missing_package_is_said(source, monkeypatch, capsys, package, modules, arguments):
    monkeypatch.setitem(sys.modules, package, None)
    for module in modules:
        monkeypatch.delitem(sys.modules, f"auraflow_gguf.{module}", raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert f"pip install {package}" in capsys.readouterr().err


def test_an_interrupt_is_said(source, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_quantize", interrupted)
    assert cli.main(["convert", source, "a.gguf", "--type", "Q8_0"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert os.listdir() == ["aura.safetensors"]


def test_it_runs_as_a_file_from_a_folder_of_any_name(tmp_path):
    pack = tmp_path / "my pack-1.0"
    pack.mkdir()
    for name in ("__init__.py", "cli.py", "loader", "quantizer"):
        (pack / name).symlink_to(ROOT / name)
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html><html></html>")

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)

    shown = run(str(pack / "cli.py"), "inspect", "page.gguf")
    assert shown.returncode == 1
    assert shown.stderr.startswith("auraflow-gguf: page.gguf: found ")
    assert "Traceback" not in shown.stderr
    assert "convert" in run(str(pack / "cli.py"), "--help").stdout
