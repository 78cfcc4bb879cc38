"""Every command and table of README.md and docs/ is tried; what `OF_OTHER_TESTS` has, the messages and the demo by
tests/host and tests/interop."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from auraflow_gguf import cli
from auraflow_gguf.devtools.arguments import CARDS, PARSERS, TIERS
from auraflow_gguf.devtools.arguments import PARTS as MEASURED
from auraflow_gguf.devtools.random_models import full_size
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.parts import PARTS
from auraflow_gguf.quantizer.quality.calibration import Calibration, write_calibration
from safetensors.torch import save_file

import dev

from .quantizer.small_model import TEXT, native_weights

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IN_PROSE = [*PAGES, ROOT / "SECURITY.md", ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml"]
NEEDS_NETWORK = ("git clone", "pip install")  # and change the Python that runs this
OF_OTHER_TESTS = ("api.md", "library.md", "diffusers.md", "scale.md")  # whose blocks of code those execute


def commands() -> list[str]:
    """All lines of all blocks of code, those of a quoted script as one, and what stands in the text as `python …`."""
    found = []
    for page in PAGES:
        if page.name in OF_OTHER_TESTS:
            continue
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            whole = re.split(r"\n(?=python |git |pip )", block.strip())
            found += [command for command in whole if not command.startswith(NEEDS_NETWORK)]
    for page in IN_PROSE:
        found += re.findall(r"`(python [^`]+)`", page.read_text(encoding="utf-8"))
    return list(dict.fromkeys(found))


def test_nothing_is_written_down_that_no_test_tries():
    assert all(command.startswith(("python cli.py ", "python dev.py ", "python -c ")) for command in commands())
    names = set()
    for command in commands():
        if command.startswith("python dev.py "):
            name, *arguments = shlex.split(command)[2:]
            assert arguments[:1] in ([], ["--tier"], ["--newest"], ["--cards"], ["--part"]), command
            assert arguments[:1] != ["--part"] or set(arguments[1::2]) <= set(MEASURED), command
            assert arguments[:1] != ["--cards"] or set(arguments[1:]) <= set(CARDS), command
            assert {tier for flag, tier in pairwise(arguments) if flag == "--tier"} <= set(TIERS), command
            names.add(name)
    assert names == PARSERS.keys() == dev.COMMANDS.keys()


@pytest.mark.parametrize("name", dev.COMMANDS)
def test_a_command_for_developers_has_its_help(name):
    ran = developers(name, "--help")
    assert (ran.returncode, ran.stdout[:6]) == (0, "usage:"), ran.stderr


def test_a_wrong_argument_is_said_before_anything_is_made():
    for arguments in (["test", "--tier", "browsers"], ["demo", "--model", "absent.gguf"], ["bench", "--", "-k", "x"]):
        ran = developers(*arguments)
        assert ran.returncode == 2
        assert ran.stderr.startswith("usage:"), ran.stderr
        assert ran.stdout == ""


def developers(*arguments: str) -> subprocess.CompletedProcess:
    """``dev.py`` by a Python without any package, which could not run the command itself."""
    command = [sys.executable, "-S", "-E", "dev.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python cli.py ")])
def test_a_command_of_the_command_line(command, tmp_path, monkeypatch, capsys):
    """In a folder with the small model under every name that the pages use."""
    monkeypatch.setitem(PARTS, "transformer", replace(AURAFLOW, fixed={}))
    monkeypatch.chdir(tmp_path)
    for name in ("SOURCE", "MODEL", "A", "B", "random"):
        save_file(native_weights(), f"{name}.safetensors")
    prompt = {"1": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "v7.gguf"}}}
    Path("workflow.json").write_text(json.dumps(prompt))
    arguments = shlex.split(command)[2:]
    for name in ("TARGET.gguf", "FILE.gguf"):
        if name in arguments and arguments[0] not in ("convert", "fit"):
            assert cli.main(["convert", "SOURCE.safetensors", name, "--type", "Q4_K_M"]) == 0
    arguments = [f"{name}.safetensors" if name in ("SOURCE", "MODEL", "A", "B") else name for name in arguments]
    if arguments[0] == "sensitivity":
        arguments += ["--size", "8", "--tokens", "4"]
        arguments += [] if "--heads" in arguments else ["--heads", "4"]
    if arguments[0] == "fit":
        calibration = Calibration().adding("", [0.9, 0.1], torch.randn(2, 4, 8, 8), {"positive": torch.randn(4, TEXT)})
        write_calibration("FILE", calibration)
        arguments += ["--heads", "4", "--quick", "--type", "Q4_K"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -c ")])
def test_a_script(command, tmp_path):
    _, _, script = shlex.split(command)
    script = script.replace("random.safetensors", str(tmp_path / "random.safetensors"))
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "random.safetensors").stat().st_size > 1_000_000


def test_the_sizes_of_files_are_true():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ GB \| `(\w+)` \| ([\d.]+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$", text, re.M)
    assert len(rows) == 5
    for recipe, bits, file, cached, whole in rows:
        _, tensors = full_size(recipe)
        total = sum(tensor.nbytes for tensor in tensors)
        modulation = sum(tensor.nbytes for tensor in tensors if re.search(r"(^|\.)mod[CXF]", tensor.name))
        weights = sum(tensor.size for tensor in tensors)
        computed = (f"{8 * total / weights:.1f}", *(f"{n / 1e9:.2f}" for n in (total, total - modulation, total)))
        assert (bits, file, cached, whole) == computed


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
