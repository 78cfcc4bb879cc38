"""docs/scale.md: its command, with small random models, on a Ray of this machine."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import comfy.sd
import comfy.utils
import psutil
import pytest
import torch
from auraflow_gguf.devtools import random_models
from auraflow_gguf.devtools.server import ROOT
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.comfyui.text_encoder import load_text_encoder
from PIL import Image

from nodes import CLIPTextEncode, VAEDecode, common_ksampler

from .aura_files import make_gguf

pytestmark = pytest.mark.host_independent

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
(COMMAND,) = re.findall(r"^(python examples/.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SMALL = ["--width", "64", "--height", "64", "--steps", "1", "--min-tokens", "1", "--cpus", "1", "--gpus", "0"]


@pytest.fixture
def arguments(host, tmp_path):
    """Of the page's command, with our files in place of its own; ``arguments(vae=…)`` for another one."""

    def arguments(prompts: str, **files: Path) -> list[str]:
        (tmp_path / "prompts.jsonl").write_text(prompts)
        models = {"transformer": make_gguf("Q4_0"), "text-encoder": random_models.cached_text_encoder()}
        models |= {"vae": random_models.cached_vae(), "comfyui": host.path} | files
        python, script, prompts_, pictures, *options = shlex.split(COMMAND.replace("\\\n", " "))
        assert (python, script) == ("python", "examples/batch_over_ray.py")
        assert (prompts_, pictures) == ("prompts.txt", "pictures")
        for name, path in models.items():
            options[options.index(f"--{name}") + 1] = str(path)
        return [str(tmp_path / "prompts.jsonl"), str(tmp_path / "pictures"), *options, *SMALL]

    return arguments


def _with_ctrl_c() -> None:
    """Undo that what runs in a shell's background, and what that starts, ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Batch:
    """The script in a process of its own. A context manager, which leaves none of Ray's processes.

    Attributes:
        lines: of its output, as far as they have been read.
    """

    def __init__(self, arguments: list[str]):
        self.temporary = TemporaryDirectory(prefix="ray-", dir="/tmp")  # short, for the paths of its sockets
        self.process = subprocess.Popen(
            [sys.executable, "examples/batch_over_ray.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "RAY_TMPDIR": self.temporary.name, "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=_with_ctrl_c if os.name == "posix" else None,
        )
        self.lines: list[str] = []

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in [self.process, *self.left(patience=0)]:
            process.kill()
        self.process.wait()
        self.temporary.cleanup()

    def until(self, pattern: str) -> re.Match:
        """Reads on to the first line with the pattern."""
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no {pattern} in:\n{self}")

    def end(self) -> int:
        """Reads all; returns the exit code."""
        self.lines += self.process.stdout
        return self.process.wait()

    def left(self, patience: float = 30) -> list[psutil.Process]:
        """The processes that have this run's environment, which is inherited, besides its first.

        Args:
            patience: seconds for them to end by themselves, as Ray's do when they notice that their node is gone: one
                that is just loading models notices it later.
        """
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_TMPDIR") == self.temporary.name and process.pid != self.process.pid:
                    found.append(process)
            except psutil.Error:
                continue
        return psutil.wait_procs(found, timeout=patience)[1]

    def __str__(self) -> str:
        return "".join(self.lines)


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("batch_over_ray")


def one_process(jobs: list) -> dict[int, bytes]:
    """The pixels of the jobs' pictures by line, as this process makes them with a worker's number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = load_model(make_gguf("Q4_0"))
        clip = load_text_encoder(random_models.cached_text_encoder())
        for option in ("min_length", "min_padding"):
            clip.set_tokenizer_option(f"pile_t5xl_{option}", 1)
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(random_models.cached_vae())))
        texts = {text for job in jobs for text in (job.prompt, job.negative)}
        encoded = {text: CLIPTextEncode().encode(clip, text)[0] for text in texts}
        pixels = {}
        for job in jobs:
            latent = {"samples": torch.zeros(1, 4, 8, 8)}
            conditioning = (encoded[job.prompt], encoded[job.negative])
            (latent,) = common_ksampler(model, job.seed, 1, 3.5, "euler", "simple", *conditioning, latent)
            (image,) = VAEDecode().decode(vae, latent)
            pixels[job.line] = (image[0] * 255).round().byte().numpy().tobytes()
        return pixels
    finally:
        torch.set_num_threads(threads)


def test_two_workers_of_which_one_is_killed_make_the_pictures_of_one_process(arguments, script, tmp_path):
    lines = [{"prompt": "a cat", "seed": 9}, {"prompt": "\ud800"}]  # the second is no text that can be encoded
    lines += [{"prompt": "a cat", "seed": 3}, {"prompt": "a cat", "negative": "a dog"}]
    lines += [{"prompt": "a cat", "seed": 3}, {"prompt": "a cat"}]
    command = arguments("".join(json.dumps(line) + "\n" for line in lines))
    jobs = script.read_jobs(tmp_path / "prompts.jsonl", 0)
    settings = script.settings_of(script.parser().parse_args(command))
    (tmp_path / "pictures").mkdir()
    black = script.painter.as_png(torch.zeros(64, 64, 3), settings.record(jobs[0]))
    (tmp_path / "pictures" / "00001-9.png").write_bytes(black)

    with Batch(command) as batch:
        first = batch.until(r"worker (\d) has loaded the models: process (\d+)")
        batch.until(rf"\] line \d, seed \d: worker {first[1]}, ")
        os.kill(int(first[2]), signal.SIGKILL)
        code = batch.end()
        text = str(batch)
        assert code == 1, text
        assert batch.left() == [], text
    assert f"worker {first[1]} (process {first[2]} on " in text, text
    killed = re.search(r"died at line (\d), and is replaced", text)
    assert f"line {killed[1]} failed and is tried once more: its worker died" in text, text
    assert re.search(r"^line 2 was not made: \w+: ", text, re.MULTILINE), text
    assert "1 of 6 pictures are there" in text
    assert "5 of 6 pictures are in" in text
    assert sorted(re.findall(r"\] line (\d), seed", text)) == ["3", "4", "5", "6"], text

    pictures = {path.name: Image.open(path) for path in (tmp_path / "pictures").iterdir()}
    assert sorted(pictures) == ["00001-9.png", "00003-3.png", "00004-3.png", "00005-3.png", "00006-5.png"]
    assert pictures["00001-9.png"].tobytes() == bytes(64 * 64 * 3)  # not made again
    expected = one_process(jobs[2:])
    assert len(set(expected.values())) == 3
    for job in jobs[2:]:
        picture = pictures[script.picture_name(job)]
        assert picture.tobytes() == expected[job.line]
        assert json.loads(picture.info["auraflow-gguf"])["negative"] == job.negative


def test_what_cannot_be_loaded_ends_the_run(arguments, tmp_path):
    with Batch(arguments('{"prompt": "a cat"}', vae=tmp_path / "absent.safetensors")) as batch:
        assert batch.end() == 1
        assert batch.left() == []
    assert f"cannot load the models: {tmp_path}/absent.safetensors is not there on" in str(batch)
    assert list((tmp_path / "pictures").iterdir()) == []


def test_ctrl_c_ends_it_and_all_that_it_started(arguments, tmp_path):
    with Batch(arguments('{"prompt": "a cat"}')) as batch:
        batch.until(r"2 workers, each with 0 GPUs and 1 CPUs")
        batch.process.send_signal(signal.SIGINT)
        assert batch.end() == 130
        assert batch.left() == []
    assert batch.lines[-1] == "stopped; the same command goes on where this run was\n"


def test_the_lists_of_the_page(script, tmp_path):
    blocks = dict(re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
    (tmp_path / "prompts.txt").write_text(blocks[""] + "\n\na boat\n")
    jobs = script.read_jobs(tmp_path / "prompts.txt", 100)
    assert [(job.line, job.seed, job.prompt) for job in jobs] == [
        (1, 100, "a lighthouse on a cliff at dawn, oil painting"),
        (2, 7, "a lighthouse in a storm"),
        (5, 104, "a boat"),
    ]
    (tmp_path / "prompts.jsonl").write_text(blocks["json"])
    jobs = script.read_jobs(tmp_path / "prompts.jsonl", 0)
    assert [(job.seed, job.prompt, job.negative) for job in jobs] == [
        (7, "a lighthouse at night", "people"),
        (1, "a lighthouse at night", ""),
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.txt", "seven\ta cat"),
        ("a.txt", f"{1 << 64}\ta cat"),
        ("a.jsonl", "a cat"),
        ("a.jsonl", '["a cat"]'),
        ("a.jsonl", '{"seed": 1}'),
        ("a.jsonl", '{"prompt": "a cat", "seed": "1"}'),
        ("a.jsonl", '{"prompt": "a cat", "seed": -1}'),
        ("a.jsonl", '{"prompt": "a cat", "sed": 1}'),
    ],
)
def test_a_line_that_is_no_job_is_said_before_anything_starts(script, arguments, tmp_path, capsys, name, line):
    (tmp_path / name).write_text(f"\n{line}\n")
    assert script.main([str(tmp_path / name), *arguments("")[1:]]) == 1
    said = capsys.readouterr().err
    assert f"{name}, line 2: found {line!r}, expected a prompt" in said
    assert not (tmp_path / "pictures").exists()


def test_a_picture_that_is_there_is_made_again_only_by_who_removes_it(script, arguments, tmp_path, capsys):
    command = arguments('{"prompt": "a cat"}')
    (job,) = script.read_jobs(tmp_path / "prompts.jsonl", 0)
    settings = script.settings_of(script.parser().parse_args(command))
    path = tmp_path / "pictures" / script.picture_name(job)
    path.parent.mkdir()
    path.write_bytes(script.painter.as_png(torch.zeros(64, 64, 3), settings.record(job)))
    assert script.main(command) == 0
    assert "1 of 1 pictures are there" in capsys.readouterr().out
    for other in (["--steps", "2"], ["--transformer", "other.gguf"]):
        assert script.main([*command, *other]) == 1
        assert "found a picture made of" in capsys.readouterr().err
    path.write_bytes(b"")
    assert script.main(command) == 1
    assert "found a picture made of something unknown" in capsys.readouterr().err
