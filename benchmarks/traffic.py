"""Bytes that go over the bus where a full-size file does not fit: counted exactly, on the tests' simulated accelerator.

ComfyUI runs there as it is, see tests/device. Each setting has a process of its own, as PyTorch can be given one such
device. The table goes into docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..devtools import ROOT
from ..devtools.cxx import compiler

TYPE = "Q8_0"
LIMITS = (3, 4, 6, 8)  # GB
MODES = ("static", "dynamic")
RANK = 16
STRENGTHS = (0.5, 0.8)
SETTING_TEXT = (
    "a file of 4 + 32 layers, with the modulation cache, one latent of 32², 2 text tokens, float32, in ComfyUI on the "
    "simulated accelerator; LoRAs of rank 16 on attention and MLP of all layers"
)
PAGE = ROOT / "docs" / "gpu.md"
MARKS = ("<!-- made by python dev.py bench --part traffic -->", "<!-- end of traffic -->")

SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
import dev
dev.register_pack()
from auraflow_gguf.benchmarks.traffic import in_this_process
print(json.dumps(in_this_process({path!r}, {mode!r}, {limit!r})))
"""


def measure(type_name: str = TYPE) -> list[dict]:
    """A row for each limit and patcher: what `in_this_process` gives. The table of `TYPE` goes into docs/gpu.md.

    Raises:
        NoCompiler: there is none for C++, which the accelerator needs.
        RuntimeError: a setting's process fails; what it says is in it.
    """
    import comfy

    from .load import full_size_file

    compiler()
    path = str(full_size_file(type_name))
    rows = []
    for limit in LIMITS:
        for mode in MODES:
            script = SCRIPT.format(root=str(ROOT), path=path, mode=mode, limit=limit)
            environment = os.environ | {"COMFYUI_PATH": str(Path(comfy.__path__[0]).parent)}
            ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
            if ran.returncode:
                raise RuntimeError(f"{mode} at {limit} GB ended with {ran.returncode}:\n{ran.stderr[-3000:]}")
            figures = json.loads(ran.stdout.splitlines()[-1])
            rows.append({"type": type_name, "limit_gb": limit, "mode": mode, **figures})
            print(*rows[-1].items(), flush=True)
    if type_name == TYPE:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}{after}", encoding="utf-8")
    return rows


def in_this_process(path: str, mode: str, limit: float) -> dict:
    """`figures` of a file's MODEL on a device with ``limit`` GB."""
    from ..devtools.hosts import find_hosts
    from ..tests.device import host_on_device

    management = host_on_device.enter(find_hosts(ROOT, clone=False)[0])
    import torch

    from ..loader.comfyui.model import load_model
    from ..tests.device.dynamic_vram import dynamic_vram
    from ..tests.device.simulated import accelerator

    size = int(limit * 1e9)
    dynamic = dynamic_vram() if mode == "dynamic" else contextlib.nullcontext()
    with torch.inference_mode(), dynamic as library, accelerator.limited(size):
        model = load_model(Path(path), torch.float32)
        # What the host leaves free for computing when it loads a model. comfy-aimdo takes weights away when that is
        # needed; here the room for them is set beforehand.
        room = size - int(management.minimum_inference_memory())
        return figures(model, room, accelerator, library)


def figures(model, room: int, accelerator: ModuleType, library=None) -> dict:
    """What a MODEL that is not loaded yet moves, in runs of one step.

    Args:
        room: bytes of the device for weights and the factors of LoRAs, by which the host loads.
        accelerator: the simulated one.
        library: that of dynamic VRAM, where it is on.

    Returns:
        ``model_bytes``; ``first_bytes``, over the bus in the first run, and ``step_bytes``, in the next one;
        ``least_bytes``, what does not fit; ``lora_bytes`` and ``lora_step_bytes`` of the first run with a LoRA and of
        the next one, ``strength_bytes`` of the first with another strength of it; ``factors_bytes`` of the LoRA; and
        ``peak_bytes``, the most that the device held.
    """
    from ..tests.host.patches import patched
    from ..tests.host.sampling import sample

    most = 0

    def moved(model) -> int:
        nonlocal most
        accelerator.reset()
        sample(model, steps=1, size=4, tokens=2, cfg=1.0)
        most = max(most, accelerator.counters().peak)
        return accelerator.counters().to_device

    if library is not None:
        library.room = room - _without_pages(model)
    linears = model.model.diffusion_model.named_modules()
    names = tuple(name for name, linear in linears if _is_patched(name) and hasattr(linear, "low_rank"))
    strong, other = (patched(model, lora, strength, names) for strength in STRENGTHS)
    first, step, with_lora, lora_step, changed = map(moved, (model, model, strong, strong, other))
    factors = [m.low_rank.nbytes for m in model.model.modules() if getattr(m, "low_rank", None)]
    return {
        "model_bytes": model.model_size(),
        "first_bytes": first,
        "step_bytes": step,
        "least_bytes": max(0, model.model_size() - room),
        "lora_bytes": with_lora,
        "lora_step_bytes": lora_step,
        "strength_bytes": changed,
        "factors_bytes": sum(factors),
        "peak_bytes": most,
    }


def lora(name: str, shape: tuple[int, int]) -> dict:
    from ..tests.host import patches

    return patches.lora(name, shape, RANK)


def _is_patched(name: str) -> bool:
    return "_layers." in name and (".attn." in name or ".mlp" in name)


def _without_pages(model) -> int:
    """Bytes of the parameters that belong to no linear: dynamic VRAM has them besides."""
    return sum(parameter.nbytes for parameter in model.model.diffusion_model.parameters(recurse=False))


def table(rows: list[dict]) -> str:
    """The rows in Markdown, in GB."""
    columns: dict[str, Callable[[dict], str]] = {
        "limit": lambda row: f"{row['limit_gb']} GB",
        "patcher": lambda row: row["mode"],
        "a step": lambda row: _gb(row["step_bytes"]),
        "does not fit": lambda row: _gb(row["least_bytes"]),
        "ratio": lambda row: f"{row['step_bytes'] / row['least_bytes']:.2f}" if row["least_bytes"] else "",
        "a step with a LoRA": lambda row: _gb(row["lora_step_bytes"]),
        "first step at another strength": lambda row: _gb(row["strength_bytes"]),
        "most held": lambda row: _gb(row["peak_bytes"]),
    }
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
