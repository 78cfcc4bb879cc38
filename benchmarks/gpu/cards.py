"""``python dev.py gpu --cards``: what the dequantizing kernels cost on cards that are not here.

Each kernel is compiled for each kind of card and its instructions are counted. From these comes a bound: how long a
card takes at least to issue them, over how long it takes at least to move the bytes. Below 1 the memory is what limits.
Nothing is measured. The counts are kept in ``cards.json``, kind by kind, and the tables of ``docs/gpu.md`` drawn from
them.

What a kernel takes of a pipe is the sum of its instructions, each as many times as the pipe is narrower than a result
a lane; the pipe that takes longest counts, as if all others ran beside it. An instruction is taken to be executed once:
the kernels have no loop.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from ...devtools import ROOT
from ...loader.quant_types import QUANT_TYPES

if TYPE_CHECKING:
    from ...tests.loader.kernels.machine_code import MachineCode

COUNTS = ROOT / "benchmarks" / "cards.json"
PAGE = ROOT / "docs" / "gpu.md"
MARKS = ("<!-- made by python dev.py gpu --cards -->", "<!-- end -->")
DETAILED = "sm_90"
OUT_BYTES = 2  # of a weight in bfloat16


class Card(NamedTuple):
    """A card on the market: what it is compiled for, multiprocessors (AMD: compute units), GHz, GB/s."""

    target: str
    units: int
    ghz: float
    gb_s: int


# From the makers' data sheets: boost clocks, for the H100 and H200 those of the PCIe board.
CARDS = {
    "RTX 2060": Card("sm_75", 30, 1.68, 336),
    "A100 80 GB": Card("sm_80", 108, 1.41, 2039),
    "RTX 3060": Card("sm_86", 28, 1.78, 360),
    "RTX 3090": Card("sm_86", 82, 1.70, 936),
    "RTX 4090": Card("sm_89", 128, 2.52, 1008),
    "H100 SXM": Card("sm_90", 132, 1.755, 3350),
    "H200": Card("sm_90", 132, 1.755, 4800),
    "B200": Card("sm_100", 148, 1.85, 8000),
    "RTX 5090": Card("sm_120", 170, 2.41, 1792),
    "MI210": Card("gfx90a", 104, 1.70, 1638),
    "MI300X": Card("gfx942", 304, 2.10, 5300),
    "RX 7900 XTX": Card("gfx1100", 96, 2.50, 960),
    "RX 9070 XT": Card("gfx1201", 64, 2.97, 640),
}

# Lanes of a pipe of a multiprocessor, results a clock: CUDA's programming guide, "Throughput of native arithmetic
# instructions". "fma" also does what "imad" does, which is half of it where it has 128. Memory's lanes have 4 bytes.
NVIDIA = {"issue": 128, "alu": 64, "fma": 128, "imad": 64, "convert": 16, "memory": 32}
# A compute unit, from AMD's descriptions of the instruction sets; nothing is issued in pairs.
AMD = {"vector": 64, "multiply": 16, "memory": 32}

_CONVERT = {"I2F", "F2I", "F2F", "MUFU", "POPC", "FLO", "BREV"}
_FMA = {"FFMA", "FMUL", "FADD"}
_IMAD = {"IMAD", "HADD2", "HMUL2", "HFMA2"}
_MEMORY = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL"}
_ISSUED_ONLY = {"BAR", "EXIT", "LDC", "ULDC", "S2R", "S2UR", "CS2R", "BRA", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR"}


def lanes_of(target: str) -> dict[str, int]:
    """The pipes of a kind of card."""
    if target.startswith("gfx"):
        return AMD
    return NVIDIA | ({"fma": 64} if target in ("sm_75", "sm_80") else {})


def work(instructions: Counter[str], target: str) -> dict[str, int]:
    """What a thread gives to each pipe, in results of a lane."""
    given = Counter()
    for name, count in instructions.items():
        for pipe, times in (_amd if target.startswith("gfx") else _nvidia)(name):
            given[pipe] += times * count
    return dict(given)


def _nvidia(name: str) -> list[tuple[str, int]]:
    base, *rest = name.split(".")
    if base == "NOP":
        return []
    if base in _MEMORY:
        # LDG.E.U16, STG.E.128; STSM.16.M88.4 stores four words
        number = next((int(part) for part in reversed(rest) if part.isdigit()), 4 if base.endswith("M") else 32)
        return [("issue", 1), ("memory", number if base.endswith("M") else max(1, number // 32))]
    if base in _CONVERT:
        return [("issue", 1), ("convert", 1)]
    if base in _FMA:
        return [("issue", 1), ("fma", 1)]
    if base in _IMAD:
        return [("issue", 1), ("fma", 1), ("imad", 1)]
    if base in _ISSUED_ONLY or base.startswith("U"):  # the uniform ones have a pipe for themselves
        return [("issue", 1)]
    return [("issue", 1), ("alu", 1)]


def _amd(name: str) -> list[tuple[str, int]]:
    if re.match(r"(global|buffer|ds)_", name):
        words = re.search(r"(?:b|dwordx)(\d+)$", name)
        number = int(words[1]) if words else 1
        return [("memory", max(1, number // 32 if "_b" in name else number))]
    if re.match(r"v_(mul_lo_u32|mul_hi|mad_u64|mad_i64)", name):
        return [("multiply", 1)]
    return [("vector", 1)] if name.startswith("v_") else []


def count(target: str, type_name: str) -> dict:
    """`figures` of a type's dequantizing kernel into bfloat16 on a kind of card."""
    from ...tests.loader.kernels.machine_code import compiled

    return figures(compiled(target, type_name, "*bf16"), target, type_name)


def figures(code: MachineCode, target: str, type_name: str) -> dict:
    """What a dequantizing kernel is, by its machine code.

    Returns:
        ``registers`` of a thread, ``load`` and ``store``, the bytes of the widest, ``instructions`` a weight, and
        ``lanes``: by pipe, the results of a lane that a weight takes.
    """
    from ...loader.kernels.triton_kernels import dequantize_tile
    from ...tests.loader.kernels.machine_code import CARDS as TARGETS
    from ...tests.loader.kernels.machine_code import MANY_BLOCKS

    tile, options = dequantize_tile(QUANT_TYPES[type_name], MANY_BLOCKS)
    weights = tile["BLOCKS"] * tile["BLOCK_SIZE"] / (options["num_warps"] * TARGETS[target].warp_size)
    issued = sum(number for name, number in code.instructions.items() if not re.match(r"NOP|s_", name))
    return {
        "registers": code.registers,
        "load": code.widest("load"),
        "store": code.widest("store"),
        "instructions": round(issued / weights, 2),
        "lanes": {pipe: round(lanes / weights, 2) for pipe, lanes in work(code.instructions, target).items()},
    }


def bound(card: Card, type_name: str, counted: dict) -> tuple[float, str]:
    """Least time to compute over least time to move, and the pipe that takes the time."""
    kind = QUANT_TYPES[type_name]
    moving = (OUT_BYTES + kind.type_size / kind.block_size) / (card.gb_s * 1e9)
    clocks = {pipe: lanes / lanes_of(card.target)[pipe] for pipe, lanes in counted["lanes"].items()}
    busiest = max(clocks, key=clocks.get)
    return clocks[busiest] / (card.units * card.ghz * 1e9) / moving, busiest


def main(targets: list[str]) -> int:
    """Counts anew for ``targets``, keeps the counts of the others, and writes the tables."""
    import triton

    counts = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
    for target in targets:
        counted = {}
        for name, kind in QUANT_TYPES.items():
            if kind.block_size > 1:
                counted[name] = count(target, name)
                print(target, name, counted[name], flush=True)
        counts[target] = {"triton": triton.__version__, "types": counted}
        COUNTS.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{tables(counts)}\n\n{MARKS[1]}{after}", encoding="utf-8")
    print(f"Written to {COUNTS} and {PAGE}")
    return 0


def tables(counts: dict) -> str:
    """Both tables in Markdown: the bound by type and card, and the counts on `DETAILED`."""
    cards = {name: card for name, card in CARDS.items() if card.target in counts}
    types = list(counts[DETAILED]["types"])
    rows = [["type", *cards], ["---"] * (1 + len(cards))]
    for name in types:
        bounds = (bound(card, name, counts[card.target]["types"][name])[0] for card in cards.values())
        rows.append([name, *(f"{value:.2f}" for value in bounds)])
    first = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    rows = [["type", "registers", "instructions a weight", "widest load", "widest store", "busiest"], ["---"] * 6]
    for name in types:
        counted = counts[DETAILED]["types"][name]
        _, busiest = bound(CARDS["H100 SXM"], name, counted)
        widths = (f"{counted[way]} byte{'s' * (counted[way] > 1)}" for way in ("load", "store"))
        rows.append([name, str(counted["registers"]), f"{counted['instructions']:.1f}", *widths, busiest])
    second = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{first}\n\nOn {DETAILED}, into bfloat16:\n\n{second}"
