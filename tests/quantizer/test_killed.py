"""A conversion that is killed, at any moment, leaves no half file under the target's name."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from auraflow_gguf.quantizer.inspection import verify
from safetensors.torch import save_file

from .small_model import FIXED, native_weights

MOMENTS = 20

# Imports once; then forks, for each line, a process that converts, says its number, and at the next line waits for it.
CONVERTER = """
import os, sys
sys.path.insert(0, {tests!r})
import conftest
from auraflow_gguf.quantizer.convert import convert
print("ready", flush=True)
while sys.stdin.readline():
    child = os.fork()
    if child == 0:
        convert({source!r}, {target!r}, "Q4_K_M", overwrite=True, fixed={{}})
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@contextmanager
def converter(source: Path, target: Path):
    script = CONVERTER.format(tests=str(Path(__file__).parents[1]), source=str(source), target=str(target))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def start(process: subprocess.Popen) -> int:
    print(file=process.stdin, flush=True)
    return int(process.stdout.readline())


def wait(process: subprocess.Popen) -> None:
    print(file=process.stdin, flush=True)
    assert process.stdout.readline() == "ended\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Windows has not")
def test_a_killed_conversion_leaves_the_target_as_it_was(tmp_path):
    """Where there was none, and where there was one, by turns."""
    source, target = tmp_path / "aura.safetensors", tmp_path / "aura.gguf"
    save_file(native_weights(), source)
    with converter(source, target) as process:
        durations = []
        for _ in range(3):
            begin = time.monotonic()
            start(process)
            wait(process)
            durations.append(time.monotonic() - begin)
        whole = target.read_bytes()
        assert verify(target, fixed=FIXED) == []

        moments = random.Random(0)
        unfinished = set()
        for before in [None, b"as it was"] * (MOMENTS // 2):
            target.unlink(missing_ok=True)
            if before:
                target.write_bytes(before)
            child = start(process)
            time.sleep(moments.uniform(0, min(durations)))
            os.kill(child, signal.SIGKILL)
            wait(process)
            content = target.read_bytes() if target.exists() else None
            assert content in (whole, before)
            left = [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
            assert len(left) <= 1, "what an earlier one left"
            unfinished |= {*left}
            assert set(os.listdir(tmp_path)) <= {"aura.safetensors", "aura.gguf", *left}
        assert len(unfinished) >= MOMENTS // 4
