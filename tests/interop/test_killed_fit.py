"""A fit that is killed, at any moment, leaves no half file, and goes on where it was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from auraflow_gguf.quantizer.unfinished import LOCK, YOUNG
from safetensors.torch import save_file

from ..quantizer.small_model import native_weights

MOMENTS = 10

# Imports once; then forks, for each line, which is a folder, a process that fits in it, and at the next line waits.
FITTER = """
import os, sys
sys.path.insert(0, {tests!r})
import conftest
import torch
torch.set_num_threads(1)
from auraflow_gguf.quantizer.quality.evaluation import Inputs
from auraflow_gguf.quantizer.quality.fit import fit
from auraflow_gguf.quantizer.quality.fitted import Wanted
from auraflow_gguf.quantizer.quality.inputs import Noise
inputs = Inputs(Noise(size=4, tokens=2, timesteps=(0.5,)), heads=4)
wanted = Wanted(bits=5, types=("Q3_K", "Q4_K", "Q5_K", "Q6_K"))
print("ready", flush=True)
while folder := sys.stdin.readline().strip():
    child = os.fork()
    if child == 0:
        fit("aura.safetensors", os.path.join(folder, "a.gguf"), wanted, inputs, measured=("Q3_K",), overwrite=True)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Fitter:
    def __init__(self, process: subprocess.Popen):
        self.process = process

    def start(self, folder: Path) -> int:
        print(folder, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        print(file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def measurements(folder: Path) -> int:
    """How many are kept."""
    return sum(
        len(types) for kept in folder.glob("*.fit.json") for types in json.loads(kept.read_text())["errors"].values()
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Windows has not")
def test_a_killed_fit_goes_on_where_it_was(tmp_path):
    save_file(native_weights(), tmp_path / "aura.safetensors")
    folders = whole, killed = [tmp_path / name for name in ("whole", "killed")]
    for folder in (*folders, tmp_path / "tmp"):
        folder.mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    script = FITTER.format(tests=str(Path(__file__).parents[1]))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, **pipes, cwd=tmp_path, env=environment) as process:
        assert process.stdout.readline() == "ready\n"
        fitter = Fitter(process)
        durations = []
        for _ in range(2):  # with measuring, and without
            begin = time.monotonic()
            fitter.start(whole)
            assert fitter.wait() == 0
            durations.append(time.monotonic() - begin)
        expected, measured = (whole / "a.gguf").read_bytes(), measurements(whole)

        moments, counts, unfinished = random.Random(0), [0], set()
        for moment in range(MOMENTS):
            (killed / "a.gguf").write_bytes(b"as it was")
            child = fitter.start(killed)
            measuring = counts[-1] < measured and moment < MOMENTS // 2
            deadline = time.monotonic() + 300
            while measuring and measurements(killed) == counts[-1]:
                assert time.monotonic() < deadline, "nothing more is measured"
                time.sleep(0.001)
            time.sleep(moments.uniform(0, durations[0] / 10 if measuring else durations[1]))
            os.kill(child, signal.SIGKILL)
            fitter.wait()
            assert (killed / "a.gguf").read_bytes() in (b"as it was", expected)
            counts.append(measurements(killed))
            left = [name for name in os.listdir(killed) if name.endswith(".partial")]
            unfinished |= {*left}
            with_lock = [name for name in left if name.startswith("a.gguf.") and (killed / name / LOCK).exists()]
            assert len(with_lock) <= 1, "what an earlier one left"
            assert {name.split(".")[0] for name in os.listdir(killed)} <= {"a", "aura"}
        assert counts == sorted(counts)
        assert unfinished
        assert counts[1] > 0  # what it had measured is kept
        for folder in tmp_path.rglob("*.partial"):  # those that were killed when they were just made, a minute later
            os.utime(folder, (time.time() - 2 * YOUNG,) * 2)
        fitter.start(killed)
        assert fitter.wait() == 0
        assert (killed / "a.gguf").read_bytes() == expected
        assert not list(tmp_path.rglob("*.partial"))
        process.stdin.close()
