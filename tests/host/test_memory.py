"""The file is mapped, not copied, and nothing of it stays when the model is gone."""

import ctypes
import gc
import os
import shutil
import sys
from pathlib import Path

import comfy.model_management
import pytest
import torch
from auraflow_gguf.benchmarks.measure import anonymous_bytes
from auraflow_gguf.loader.comfyui.model import load_model

from .aura_files import make_gguf
from .sampling import QUICK, sample

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="reads /proc/self, which Linux alone has, and the counters of glibc 2.33",
)

CYCLES = 8
MAX_BYTES = 20_000  # that a cycle may leave
MAX_OBJECTS = 100


class Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


def held() -> dict[str, int]:
    """What the process has. Of its memory malloc keeps free parts, more of them or less by chance: those are given
    back before it is read, and what malloc has lent out, to tensors and all else, is counted by itself."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    info = libc.mallinfo2()
    libc.malloc_trim(0)
    return {
        "allocated memory": info.uordblks + info.hblkhd,
        "Python's objects": sys.getallocatedblocks(),
        "anonymous memory": anonymous_bytes(),
        "open files": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_loading_maps_the_file_and_copies_nothing():
    path = make_gguf("Q4_0")
    load_model(path)  # whatever the first load imports and allocates
    before = held()
    model = load_model(path, torch.float32)
    after = held()
    bare = sum(parameter.nbytes for parameter in model.model.diffusion_model.parameters(recurse=False))
    for what in ("allocated memory", "anonymous memory"):
        assert after[what] - before[what] < 16 * 2**20 < bare / 2, (what, before, after)


def test_cycles_of_load_sample_and_unload_leave_nothing(tmp_path):
    path = tmp_path / "auraflow.gguf"
    shutil.copy(make_gguf("Q4_0"), path)

    def cycle() -> None:
        model = load_model(path)
        assert mappings_of(path)
        sample(model, **QUICK | {"steps": 1}, cfg=1.0)
        comfy.model_management.unload_all_models()

    for _ in range(3):
        cycle()
    before = held()
    for _ in range(CYCLES):
        cycle()
    after = held()
    assert mappings_of(path) == 0
    assert after["allocated memory"] - before["allocated memory"] < CYCLES * MAX_BYTES, (before, after)
    assert after["Python's objects"] - before["Python's objects"] < CYCLES * MAX_OBJECTS, (before, after)
    for what, value in after.items():
        assert value <= before[what] * 1.01, (what, before, after)
    path.unlink()
