"""``python dev.py gpu``: what a GPU makes of packed weights, in parts, each in a process and a time of its own.

What a part has found is written as it goes: a part that fails, or is not done in its time, loses neither its own rows
nor another's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ...devtools import ROOT
from ...devtools.arguments import GPU_TYPES
from ...devtools.hosts import Host
from ...loader.quant_types import QUANT_TYPES
from ..measure import machine
from . import comfyui_step, diffusers_step, kernels, tables, vram
from .setting import LeftOut, Setting

NO_GPU = "There is no GPU here that torch can use through CUDA or ROCm: nothing was measured."


class Part(NamedTuple):
    """What is measured: in words, at most how long, and how, row by row."""

    text: str
    seconds: int
    rows: Callable[[Setting], Iterator[dict]]


PARTS = {
    "bits": Part(kernels.BITS_TEXT, 200, kernels.bits),
    "bandwidth": Part(kernels.BANDWIDTH_TEXT, 45, kernels.bandwidth),
    "products": Part(kernels.PRODUCTS_TEXT, 75, kernels.products),
    "step": Part(diffusers_step.STEP_TEXT, 120, diffusers_step.step),
    "compiled": Part(diffusers_step.COMPILED_TEXT, 100, diffusers_step.compiled),
    "comfyui": Part(comfyui_step.TEXT, 700, comfyui_step.step),
    "comfyui-compiled": Part(comfyui_step.COMPILED_TEXT, 300, comfyui_step.compiled),
    "vram": Part(vram.TEXT, 1200, vram.measure),
}


def main(options: argparse.Namespace, hosts: list[Host]) -> int:
    """Runs the parts, or one of them in this process for `_in_a_process`.

    Returns:
        0; 1 when a part failed or a kernel's bits are wrong; 2 without a GPU.
    """
    if options.cards is not None:
        from . import cards

        return cards.main(options.cards)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    options.type = options.type or list(GPU_TYPES)
    if unknown := set(options.type) - {name for name, kind in QUANT_TYPES.items() if kind.block_size > 1}:
        print(f"found --type {', '.join(sorted(unknown))}, expected packed types: Q4_K, Q8_0, …", file=sys.stderr)
        return 2
    if options.child:
        setting = Setting(
            torch.device(options.device), options.quick, tuple(options.type), hosts[0].path if hosts else None
        )
        return _child(setting, options.child, options.rows)
    print(f"{machine()}, ComfyUI {hosts[0].version if hosts else 'absent'}", flush=True)
    results = {"machine": _device() | machine(), "comfyui": hosts[0].version if hosts else None}
    results |= {"quick": options.quick, "parts": {}}
    if options.quick:
        print("Tiny sizes: these figures say nothing about this machine.")
    for name in options.part or PARTS:
        results["parts"][name] = {"setting": PARTS[name].text, **_in_a_process(name, options)}
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(tables.of_part(name, results["parts"][name]), flush=True)
    print(f"\nWritten to {options.output}")
    return int(any("failed" in part for part in results["parts"].values()))


def _device() -> dict:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "units": properties.multi_processor_count,
        "device_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _in_a_process(name: str, options: argparse.Namespace) -> dict:
    """``rows``, ``seconds``, and ``left_out`` or ``failed``, why there are no (more) rows."""
    limit = options.seconds or PARTS[name].seconds
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder, "rows"), Path(folder, "log")
        command = [sys.executable, str(ROOT / "dev.py"), "--inside-environment", "gpu", "--child", name]
        command += ["--rows", str(rows), "--device", options.device, *(["--quick"] if options.quick else [])]
        command += [argument for kind in options.type for argument in ("--type", kind)]
        rows.touch()
        with open(log, "wb") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                failure = None if child.wait(limit) == 0 else _last_line(log, child.returncode)
            except subprocess.TimeoutExpired:
                failure = f"not done in {limit} s"
            finally:
                _end(child)
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    reasons = [row["left_out"] for row in found if row.keys() == {"left_out"}]
    result = {"rows": [row for row in found if row.keys() != {"left_out"}], "seconds": time.monotonic() - begin}
    if failure:
        return result | {"failed": failure}
    if wrong := tables.wrong(name, result["rows"]):
        return result | {"failed": wrong}
    return result | ({"left_out": reasons[0]} if reasons else {})


def _end(child: subprocess.Popen) -> None:
    """Ends it, and what it has started, if it has not ended by itself."""
    if child.poll() is None:
        if os.name == "posix":
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code} without a message"


def _child(setting: Setting, name: str, path: Path) -> int:
    with open(path, "a", encoding="utf-8") as file:
        try:
            for row in PARTS[name].rows(setting):
                print(json.dumps(row), file=file, flush=True)
        except LeftOut as reason:
            print(json.dumps({"left_out": str(reason)}), file=file, flush=True)
        except ModuleNotFoundError as error:
            print(json.dumps({"left_out": f"{error.name} is not installed here."}), file=file, flush=True)
    return 0
