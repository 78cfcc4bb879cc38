"""The file is mapped, not copied, and nothing of it stays when the model is gone."""

import gc
import os
import shutil
import sys
from pathlib import Path

import comfy.model_management
import pytest
from auraflow_gguf.benchmarks.measure import anonymous_bytes
from auraflow_gguf.loader.model import load_model

from .aura_files import make_gguf
from .sampling import sample

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self, which Linux alone has")

CYCLES = 50


def held() -> dict[str, int]:
    gc.collect()
    return {
        "anonymous memory": anonymous_bytes(),
        "open files": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_loading_maps_the_file_and_copies_only_the_bare_parameters():
    path = make_gguf("Q4_0")
    load_model(path)  # whatever the first load imports and allocates
    gc.collect()
    before = anonymous_bytes()
    model = load_model(path)
    bare = sum(parameter.nbytes for parameter in model.model.diffusion_model.parameters(recurse=False))
    assert anonymous_bytes() - before < bare + 16 * 2**20 < path.stat().st_size / 4


def test_cycles_of_load_sample_and_unload_leave_nothing(tmp_path):
    path = tmp_path / "auraflow.gguf"
    shutil.copy(make_gguf("Q4_0"), path)

    def cycle() -> None:
        model = load_model(path)
        assert mappings_of(path)
        sample(model, steps=1, cfg=1.0, size=8, tokens=4)
        comfy.model_management.unload_all_models()

    for _ in range(5):
        cycle()
    before = held()
    for _ in range(CYCLES):
        cycle()
    after = held()
    assert mappings_of(path) == 0
    for what, value in after.items():
        assert value <= before[what] * 1.01, (what, before, after)
    path.unlink()
