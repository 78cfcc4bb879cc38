"""Sampling in ComfyUI with less memory on the device than the weights take: its static patcher and its dynamic one.

Each setting has a process of its own, as ComfyUI decides both when it starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from ...devtools import ROOT
from .host import enable_dynamic_vram, enter, full_size_file
from .setting import LeftOut, Setting, begin_memory, memory

TEXT = "sampling in ComfyUI, batch 1 with CFG, 1024², with so many GB of the device to use"
LIMITS = (4, 6, 8, None)  # GB; None is the whole device
STEPS = 4
CHILD_SECONDS = 120

SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
import dev
dev.register_pack()
from pathlib import Path
import torch
from auraflow_gguf.benchmarks.gpu import vram
from auraflow_gguf.benchmarks.gpu.setting import LeftOut, Setting
setting = Setting(torch.device({device!r}), {quick!r}, {types!r}, Path({comfyui!r}))
try:
    print(json.dumps(vram.in_this_process(setting, {mode!r}, {limit!r})))
except LeftOut as reason:
    print(json.dumps({{"left_out": str(reason)}}))
"""


def measure(setting: Setting) -> Iterator[dict]:
    """A row for each patcher and limit: what `in_this_process` gives, or ``failed``."""
    if setting.comfyui is None:
        raise LeftOut("There is no ComfyUI here; COMFYUI_PATH names one.")
    on_cpu = setting.device.type == "cpu"
    for mode in ("static",) if on_cpu else ("static", "dynamic"):
        for limit in (None,) if on_cpu else LIMITS:
            yield {"type": setting.types[0], "mode": mode, "limit_gb": limit, **_in_a_process(setting, mode, limit)}


def _in_a_process(setting: Setting, mode: str, limit: float | None) -> dict:
    told = {"device": str(setting.device), "quick": setting.quick, "types": setting.types}
    script = SCRIPT.format(root=str(ROOT), comfyui=str(setting.comfyui), mode=mode, limit=limit, **told)
    try:
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {CHILD_SECONDS} s"}
    if ran.returncode:
        return {"failed": (ran.stderr.strip() or "no message").splitlines()[-1]}
    return json.loads(ran.stdout.splitlines()[-1])


@torch.inference_mode()
def in_this_process(setting: Setting, mode: str, limit: float | None) -> dict:
    """Samples twice; all but ``limit`` GB of the device is taken first, by nothing.

    Returns:
        ``first_seconds`` and ``again_seconds`` of a run of `STEPS` steps, the first with the load; the memory; and
        ``loaded_bytes``, which are on the device afterwards, of ``model_bytes``.
    """
    enter(setting)
    if mode == "dynamic":
        enable_dynamic_vram()
    from ...loader.comfyui.model import load_model
    from ...tests.host.sampling import QUICK, sample

    model = load_model(full_size_file(setting.types[0], setting), setting.dtype)
    size = QUICK if setting.quick else {"steps": STEPS, "size": 128, "tokens": 256}
    taken = _taken(limit, setting)
    begin_memory(setting)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        sample(model, **size)
        seconds.append(time.perf_counter() - begin)
    return {
        "first_seconds": seconds[0],
        "again_seconds": seconds[1],
        **{name: figure - taken.nbytes for name, figure in memory(setting).items()},
        "loaded_bytes": model.loaded_size(),
        "model_bytes": model.model_size(),
    }


def _taken(limit: float | None, setting: Setting) -> torch.Tensor:
    """What leaves ``limit`` GB of the device free."""
    if limit is None:
        return torch.empty(0, dtype=torch.uint8)
    free, _ = torch.cuda.mem_get_info(setting.device)
    if (beyond := free - int(limit * 1e9)) < 0:
        raise LeftOut(f"The device has {free / 1e9:.1f} GB free, less than the limit.")
    return torch.empty(beyond, dtype=torch.uint8, device=setting.device)
