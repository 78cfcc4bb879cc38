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
PARTS = ("load", "step", "modulation", "lora", "convert")
CONVERSIONS = 3  # each takes half a minute, and they vary little


def main(arguments: list[str], hosts: list[Host]) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py bench", description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs of runs for each ratio")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure only this; may be repeated")
    parser.add_argument(
        "--full-size", action="store_true", help="convert a 13.7 GB checkpoint, once; takes 18 GB of disk and minutes"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the figures go, as JSON")
    options = parser.parse_args(arguments)
    if not hosts:
        print("There is no ComfyUI here to measure in: set COMFYUI_PATH.", file=sys.stderr)
        return 1
    _enter(hosts[0])
    parts = options.part or PARTS
    print(f"{machine()}, ComfyUI {hosts[0].version}")
    # a part that is measured alone stands beside the others' figures of before
    results = json.loads(options.output.read_text(encoding="utf-8")) if options.part and options.output.exists() else {}
    results |= {"machine": machine(), "comfyui": hosts[0].version}
    if "load" in parts:
        results["load"] = _load()
    if "step" in parts:
        results["step"] = _step(options.pairs)
    if "modulation" in parts:
        results["modulation"] = _modulation(options.pairs)
    if "lora" in parts:
        results["lora"] = _lora(options.pairs)
    if "convert" in parts and (figures := _convert(options.pairs, options.full_size)):
        results["convert"] = figures
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {options.output}")
    return 0


def _load() -> dict:
    from . import load

    print("\nLoading a full-size file")
    figures = load.measure()
    print(json.dumps(figures, indent=2))
    return figures


def _step(pairs: int) -> dict:
    from . import step

    print(f"\nA step beside the dense weights: {step.SETTING_TEXT}")
    return {"setting": step.SETTING_TEXT, "rows": step.measure(pairs)}


def _modulation(pairs: int) -> dict:
    from . import modulation

    print(f"\nA step with the modulation cache beside one without: {modulation.SETTING_TEXT}")
    return {"setting": modulation.SETTING_TEXT, **modulation.measure(pairs)}


def _lora(pairs: int) -> dict:
    from . import lora

    print(f"\nA step with LoRAs beside one without: {lora.SETTING_TEXT}")
    return {"setting": lora.SETTING_TEXT, "rows": lora.measure(pairs)}


def _convert(pairs: int, full_size: bool) -> dict | None:
    from ..tests.quantizer.ggml import Unavailable
    from . import convert

    print(f"\nConverting to {convert.TYPE} beside a quantizer alone")
    try:
        figures = convert.measure(1 if full_size else min(pairs, CONVERSIONS), full_size=full_size)
    except Unavailable as reason:
        print(f"left out: {reason}")
        return None
    print(json.dumps(figures, indent=2))
    return figures


def _enter(host: Host) -> None:
    sys.path.insert(0, str(host.path))
    from comfy.cli_args import args

    args.cpu = "--cpu" in device_arguments()
