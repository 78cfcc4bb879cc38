"""``python dev.py bench``: measures everything on this machine, prints it, and writes ``benchmarks/results.json``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..devtools.hosts import Host
from ..devtools.server import device_arguments
from ..tests.quantizer.ggml import Unavailable
from .measure import machine

RESULTS = Path(__file__).with_name("results.json")
CONVERSIONS = 3  # each takes seconds to minutes, and varies little


def main(arguments: list[str], hosts: list[Host]) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py bench", description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs of runs for each ratio")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the figures go, as JSON")
    parser.add_argument(
        "--full-size", action="store_true", help="convert a 13.7 GB checkpoint, once; takes 18 GB of disk and minutes"
    )
    options = parser.parse_args(arguments)
    if not hosts:
        print("There is no ComfyUI here to measure in: set COMFYUI_PATH.", file=sys.stderr)
        return 1
    _enter(hosts[0])
    from . import convert, load, lora, step

    print(f"{machine()}, ComfyUI {hosts[0].version}")
    results = {"machine": machine(), "comfyui": hosts[0].version}
    print("\nLoading a full-size file")
    results["load"] = load.measure()
    print(json.dumps(results["load"], indent=2))
    print(f"\nA step beside the dense weights: {step.SETTING_TEXT}")
    results["step"] = {"setting": step.SETTING_TEXT, "rows": step.measure(options.pairs)}
    print(f"\nWhat LoRAs add to a step: {lora.SETTING_TEXT}")
    results["lora"] = {"setting": lora.SETTING_TEXT, "rows": lora.measure(options.pairs)}
    print("\nConverting beside a quantizer alone")
    try:
        pairs = 1 if options.full_size else min(options.pairs, CONVERSIONS)
        results["convert"] = convert.measure(pairs, full_size=options.full_size)
        print(json.dumps(results["convert"], indent=2))
    except Unavailable as reason:
        print(f"Left out: {reason}")
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {options.output}")
    return 0


def _enter(host: Host) -> None:
    sys.path.insert(0, str(host.path))
    from comfy.cli_args import args

    args.cpu = "--cpu" in device_arguments()
