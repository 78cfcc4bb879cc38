"""What the commands of dev.py are told: read before an environment is made for them. Standard library only."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from . import ROOT

TIERS = ("lint", "unit", "interop", "host", "device", "server", "browser")
OF_THE_NEWEST = ("interop", "host", "device", "server")
"""The tiers that depend on other projects' releases."""

PARTS = (
    "load",
    "memory",
    "dequantize",
    "step",
    "sizes",
    "modulation",
    "compiled",
    "lora",
    "training",
    "diffusers",
    "scale",
    "traffic",
    "convert",
)
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_XS", "IQ4_NL", "Q3_K", "Q2_K", "BF16")
RESULTS = ROOT / "benchmarks" / "results.json"

GPU_PARTS = ("bits", "bandwidth", "products", "step", "compiled", "comfyui", "comfyui-compiled", "vram")
GPU_TYPES = ("Q4_K", "Q8_0", "Q6_K", "Q5_K", "Q4_0")
GPU_RESULTS = ROOT / "benchmarks" / "gpu.json"
CARDS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100", "gfx1201")


def _demo() -> argparse.ArgumentParser:
    parser = _parser("demo", "A GGUF file, a real ComfyUI with the pack in it, a prompt, an image.")
    parser.add_argument("--keep", action="store_true", help="leave the server up, for the browser")
    parser.add_argument("--model", type=_file, help="an AuraFlow GGUF file (else: two layers of random weights)")
    parser.add_argument("--text-encoder", type=_file, help="Pile-T5-XL, GGUF or not (else: random weights)")
    parser.add_argument("--vae", type=_file, help="SDXL's VAE (else: random weights)")
    parser.add_argument("--prompt", help="what to paint")
    parser.add_argument("--steps", type=int, default=4, help="of the sampler, default 4; real models want 20 or more")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side, default 512; real models want 1024")
    return parser


def _file(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path


def _test() -> argparse.ArgumentParser:
    parser = _parser("test", "The tests, in tiers.", epilog="Arguments after -- go to pytest.")
    parser.add_argument("--tier", action="append", choices=TIERS, help="run only this tier; may be repeated")
    parser.add_argument(
        "--newest",
        action="store_true",
        help=f"with the newest release of everything that ComfyUI asks for; {', '.join(OF_THE_NEWEST)} by default",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="how many run at a time (default %(default)s)",
    )
    return parser


def _bench() -> argparse.ArgumentParser:
    parser = _parser("bench", "Measures everything on this machine and prints it.")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs of runs for each ratio")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure only this; may be repeated")
    parser.add_argument("--type", action="append", choices=TYPES, help="measure only this; may be repeated")
    parser.add_argument(
        "--full-size", action="store_true", help="convert a 13.7 GB checkpoint, once; takes 18 GB of disk and minutes"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the figures go, as JSON and as a chart")
    return parser


def _gpu() -> argparse.ArgumentParser:
    parser = _parser("gpu", "Tries and measures the GPU of this machine, in parts.")
    parser.add_argument(
        "--here", action="store_true", help="with the Python that runs this, its torch and Triton, and no environment"
    )
    parser.add_argument("--part", action="append", choices=GPU_PARTS, help="only this; may be repeated")
    parser.add_argument("--type", action="append", help=f"measure only this; may be repeated ({', '.join(GPU_TYPES)})")
    parser.add_argument("--seconds", type=int, help="the most that each part may take (by default its own limit)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries what needs no GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command itself")
    parser.add_argument("--output", type=Path, default=GPU_RESULTS, help="where the figures go, as JSON")
    parser.add_argument(
        "--cards",
        nargs="*",
        choices=CARDS,
        metavar="CARD",
        help="measure nothing, but count the kernels' instructions on these kinds of card, and write the tables of "
        f"docs/gpu.md anew, of all that have been counted ({', '.join(CARDS)})",
    )
    parser.add_argument("--child", choices=GPU_PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser


def _assets() -> argparse.ArgumentParser:
    parser = _parser("assets", "Writes what follows from the nodes: templates, translations, the snapshot, pictures.")
    parser.add_argument("--no-pictures", action="store_true", help="write the text files alone")
    return parser


def _fuzz() -> argparse.ArgumentParser:
    parser = _parser("fuzz", "A long run of the fuzzers of the reader.")
    parser.add_argument("--inputs", type=int, default=200_000, help="how many files the reader is given")
    parser.add_argument("--seed", type=int, default=0, help="where the mutations begin")
    return parser


def _parser(name: str, description: str, **options: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"dev.py {name}", description=description, **options)


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "demo": _demo,
    "test": _test,
    "bench": _bench,
    "gpu": _gpu,
    "assets": _assets,
    "fuzz": _fuzz,
}


def parse(command: str, arguments: list[str]) -> argparse.Namespace:
    """The options of a command; ``pytest`` holds what goes to pytest, after ``--``.

    Raises:
        SystemExit: help is asked for, or an argument is wrong; both are printed.
    """
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = PARSERS[command]()
    if command != "test" and split < len(arguments):
        parser.error("only test takes arguments after --")
    options = parser.parse_args(arguments[:split])
    options.pytest = arguments[split + 1 :]
    return options
