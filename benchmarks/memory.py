"""The most memory that a process takes which loads a file and makes a step, over what ComfyUI alone takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import comfy.cli_args
import torch

from ..devtools.server import ROOT
from ..loader.comfyui.model import load_model
from ..tests.host.aura_files import make_gguf
from ..tests.host.forward import CPU, forward
from .load import full_size_file
from .measure import peak_growth
from .step import SETTING

SETTING_TEXT = "the most that a process holds in a float32 step, over the file and what ComfyUI holds without it"

SCRIPT = """
import sys
sys.path[:0] = {folders!r}
import dev
dev.register_pack()
from comfy.cli_args import args
args.cpu = True
from auraflow_gguf.benchmarks.{module} import in_this_process
print(in_this_process(*{arguments!r}))
"""


def measure(types: tuple[str, ...]) -> list[dict]:
    """One row a type, of a file of 1 + 1 layers, and first a full-size one of Q4_0. Linux alone tells the peak.

    Returns:
        ``type``, ``layers``, ``file_bytes``, and ``over_file_bytes``: what is resident at most, less what was
        resident before the file was opened, less the file. The pages of the file that are mapped count as resident.
    """
    if sys.platform != "linux":
        return []
    files = [("Q4_0", [4, 32], full_size_file("Q4_0"))]
    files += [(type_name, [1, 1], make_gguf(type_name)) for type_name in types]
    rows = []
    for type_name, layers, path in files:
        file_bytes = os.path.getsize(path)
        over = grown("memory", str(path)) - file_bytes
        rows.append({"type": type_name, "layers": layers, "file_bytes": file_bytes, "over_file_bytes": over})
        print(f"{type_name:8} {file_bytes / 1e6:6.0f} MB file, {over / 1e6:+6.0f} MB at the peak", flush=True)
    return rows


def grown(module: str, *arguments: object) -> int:
    """What ``in_this_process`` of one of these modules says, in a new process."""
    folders = [str(ROOT), str(Path(comfy.__path__[0]).parent)]
    script = SCRIPT.format(folders=folders, module=module, arguments=arguments)
    return int(subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE).stdout.split()[-1])


def in_this_process(path: str) -> int:
    """Bytes by which this process, with the host imported, grows at most while it loads a file and makes a step."""

    @torch.inference_mode()
    def load_and_step() -> None:
        model = load_model(Path(path), torch.float32)
        model.patch_model(CPU)
        forward(model, **SETTING)

    return peak_growth(load_and_step)
