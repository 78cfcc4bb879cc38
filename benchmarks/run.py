"""``python dev.py bench``: measures everything on this machine and prints it.

All of it together goes into ``benchmarks/results.json`` and the README's chart, ``benchmarks/results.svg``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..devtools.arguments import TYPES
from ..devtools.hosts import Host
from ..devtools.server import device_arguments
from . import chart
from .measure import machine

CONVERSIONS = 3  # each takes half a minute, and they vary little


def main(options: argparse.Namespace, hosts: list[Host]) -> int:
    if not hosts:
        print("There is no ComfyUI here to measure in: set COMFYUI_PATH.", file=sys.stderr)
        return 1
    _enter(hosts[0])
    types = tuple(options.type or TYPES)
    this = {"machine": machine(), "comfyui": hosts[0].version}
    print(f"{this['machine']}, ComfyUI {hosts[0].version}")
    results = _measured_before(options.output, this) if options.part else {}
    results |= this
    for part in options.part or PARTS:
        print(f"\n{part}")
        if figures := PARTS[part](types, options):
            results["convert_full_size" if part == "convert" and options.full_size else part] = figures
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {options.output}")
    if {"dequantize", "step"} <= results.keys():
        options.output.with_suffix(".svg").write_text(chart.draw(results), encoding="utf-8")
    return 0


def _measured_before(path: Path, this: dict) -> dict:
    """The figures of this machine and host beside which a part stands that is measured alone."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return before if this.items() <= before.items() else {}


def _load(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import load

    figures = load.measure()
    print(json.dumps(figures, indent=2))
    return {"setting": load.SETTING_TEXT, **figures}


def _memory(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import memory

    return {"setting": memory.SETTING_TEXT, "rows": memory.measure(types)}


def _dequantize(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import dequantize

    return {"setting": dequantize.SETTING_TEXT, "rows": dequantize.measure(types)}


def _step(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import step

    return {"setting": step.SETTING_TEXT, "rows": step.measure(options.pairs, types)}


def _sizes(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import sizes

    chosen = tuple(options.type or sizes.TYPES)
    return {"setting": sizes.SETTING_TEXT, "rows": sizes.measure(options.pairs, chosen)}


def _modulation(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import modulation

    return {"setting": modulation.SETTING_TEXT, **modulation.measure(options.pairs)}


def _compiled(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import compiled

    return {"setting": compiled.SETTING_TEXT, "rows": compiled.measure(options.pairs)}


def _lora(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import lora

    return {"setting": lora.SETTING_TEXT, "rows": lora.measure(options.pairs)}


def _training(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import training

    return {"setting": training.SETTING_TEXT, "rows": training.measure()}


def _diffusers(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import diffusers_door

    return {"setting": diffusers_door.SETTING_TEXT, "rows": diffusers_door.measure(options.pairs, types)}


def _scale(types: tuple[str, ...], options: argparse.Namespace) -> dict:
    from . import scale

    return {"setting": scale.SETTING_TEXT, **scale.measure()}


def _traffic(types: tuple[str, ...], options: argparse.Namespace) -> dict | None:
    from ..devtools.cxx import NoCompiler
    from . import traffic

    try:
        return {"setting": traffic.SETTING_TEXT, "rows": traffic.measure(*(options.type or ())[:1])}
    except NoCompiler as reason:
        print(f"left out: {reason}")
        return None


def _convert(types: tuple[str, ...], options: argparse.Namespace) -> dict | None:
    from ..tests.ggml import Unavailable
    from . import convert

    try:
        repeats = 1 if options.full_size else min(options.pairs, CONVERSIONS)
        figures = convert.measure(repeats, full_size=options.full_size)
    except Unavailable as reason:
        print(f"left out: {reason}")
        return None
    print(json.dumps(figures, indent=2))
    return figures


PARTS = {
    "load": _load,
    "memory": _memory,
    "dequantize": _dequantize,
    "step": _step,
    "sizes": _sizes,
    "modulation": _modulation,
    "compiled": _compiled,
    "lora": _lora,
    "training": _training,
    "diffusers": _diffusers,
    "scale": _scale,
    "traffic": _traffic,
    "convert": _convert,
}
"""A function for each part, which gives its figures; their modules need ComfyUI on the import path."""


def _enter(host: Host) -> None:
    sys.path.insert(0, str(host.path))
    from comfy.cli_args import args

    args.cpu = "--cpu" in device_arguments()
