"""``python dev.py bench``: measures everything on this machine and prints it.

Writes ``benchmarks/results.json``, and the README's chart of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..devtools.hosts import Host
from ..devtools.server import device_arguments
from . import chart
from .measure import machine

RESULTS = Path(__file__).with_name("results.json")
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_XS", "IQ4_NL", "Q3_K", "Q2_K", "BF16")
PARTS = ("load", "memory", "dequantize", "step")


def main(arguments: list[str], hosts: list[Host]) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py bench", description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs of runs for each ratio")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure only this; may be repeated")
    parser.add_argument("--type", action="append", choices=TYPES, help="measure only this type; may be repeated")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="where the figures go, as JSON; the chart stands beside it"
    )
    options = parser.parse_args(arguments)
    if not hosts:
        print("There is no ComfyUI here to measure in: set COMFYUI_PATH.", file=sys.stderr)
        return 1
    _enter(hosts[0])
    types, parts = tuple(options.type or TYPES), options.part or PARTS
    print(f"{machine()}, ComfyUI {hosts[0].version}")
    results = {"machine": machine(), "comfyui": hosts[0].version}
    if "load" in parts:
        results["load"] = _load()
    if "memory" in parts:
        results["memory"] = _memory(types)
    if "dequantize" in parts:
        results["dequantize"] = _dequantize(types)
    if "step" in parts:
        results["step"] = _step(types, options.pairs)
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {options.output}")
    if {"dequantize", "step"} <= results.keys():
        picture = options.output.with_suffix(".svg")
        picture.write_text(chart.draw(results), encoding="utf-8")
        print(f"Drawn to {picture}")
    return 0


def _load() -> dict:
    from . import load

    print("\nLoading a full-size file")
    figures = load.measure()
    print(json.dumps(figures, indent=2))
    return figures


def _memory(types: tuple[str, ...]) -> dict:
    from . import memory

    print(f"\nMemory: {memory.SETTING_TEXT}")
    return {"setting": memory.SETTING_TEXT, "rows": memory.measure(types)}


def _dequantize(types: tuple[str, ...]) -> dict:
    from . import dequantize

    print(f"\nDequantizing: {dequantize.SETTING_TEXT}")
    return {"setting": dequantize.SETTING_TEXT, "rows": dequantize.measure(types)}


def _step(types: tuple[str, ...], pairs: int) -> dict:
    from . import step

    print(f"\nA step beside the dense weights: {step.SETTING_TEXT}")
    return {"setting": step.SETTING_TEXT, "rows": step.measure(pairs, types)}


def _enter(host: Host) -> None:
    sys.path.insert(0, str(host.path))
    from comfy.cli_args import args

    args.cpu = "--cpu" in device_arguments()
