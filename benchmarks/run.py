"""``python dev.py bench``: measures everything on this machine and prints it.

All of it together goes into ``benchmarks/results.json`` and the README's chart, ``benchmarks/results.svg``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ..devtools.hosts import Host
from ..devtools.server import device_arguments
from . import chart
from .measure import machine

RESULTS = Path(__file__).with_name("results.json")
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_XS", "IQ4_NL", "Q3_K", "Q2_K", "BF16")
PARTS = ("load", "memory", "dequantize", "step")


def main(arguments: list[str], hosts: list[Host]) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs of runs for each ratio")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure only this; may be repeated")
    parser.add_argument("--type", action="append", choices=TYPES, help="measure only this; may be repeated")
    parser.add_argument("--output", type=Path, help="the JSON file; of all parts and types it is the README's")
    options = parser.parse_args(arguments)
    if not hosts:
        print("There is no ComfyUI here to measure in: set COMFYUI_PATH.", file=sys.stderr)
        return 1
    _enter(hosts[0])
    output = options.output or (None if options.part or options.type else RESULTS)
    results = {"machine": machine(), "comfyui": hosts[0].version}
    print(f"{machine()}, ComfyUI {hosts[0].version}")
    for part in options.part or PARTS:
        results[part] = _measure(part, tuple(options.type or TYPES), options.pairs)
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nWritten to {output}")
        if {"dequantize", "step"} <= results.keys():
            output.with_suffix(".svg").write_text(chart.draw(results), encoding="utf-8")
    if torch.cuda.is_available():
        from . import gpu_dequantize

        print("\nDequantizing on the GPU")
        gpu_dequantize.main(["--output", str(output.with_name("gpu_dequantize.json"))] if output else [])
    return 0


def _measure(part: str, types: tuple[str, ...], pairs: int) -> dict:
    """One part's figures. Its module needs ComfyUI on the import path."""
    from . import dequantize, load, memory, step

    module = {"load": load, "memory": memory, "dequantize": dequantize, "step": step}[part]
    print(f"\n{part}: {module.SETTING_TEXT}")
    if part == "load":
        figures = load.measure()
        print(json.dumps(figures, indent=2))
        return figures
    rows = step.measure(pairs, types) if part == "step" else module.measure(types)
    return {"setting": module.SETTING_TEXT, "rows": rows}


def _enter(host: Host) -> None:
    sys.path.insert(0, str(host.path))
    from comfy.cli_args import args

    args.cpu = "--cpu" in device_arguments()
