"""``python dev.py bench``: measures everything on this machine, prints it, and writes ``benchmarks/results.json``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..devtools.hosts import Host
from ..devtools.server import device_arguments
from .measure import machine

RESULTS = Path(__file__).with_name("results.json")


def main(arguments: list[str], hosts: list[Host]) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py bench", description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs of runs for each ratio")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the figures go, as JSON")
    options = parser.parse_args(arguments)
    if not hosts:
        print("There is no ComfyUI here to measure in: set COMFYUI_PATH.", file=sys.stderr)
        return 1
    _enter(hosts[0])
    from . import load, step

    print(f"{machine()}, ComfyUI {hosts[0].version}")
    results = {"machine": machine(), "comfyui": hosts[0].version}
    print("\nLoading a full-size file")
    results["load"] = load.measure()
    print(json.dumps(results["load"], indent=2))
    print(f"\nA step beside the dense weights: {step.SETTING_TEXT}")
    results["step"] = {"setting": step.SETTING_TEXT, "rows": step.measure(options.pairs)}
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {options.output}")
    return 0


def _enter(host: Host) -> None:
    sys.path.insert(0, str(host.path))
    from comfy.cli_args import args

    args.cpu = "--cpu" in device_arguments()
