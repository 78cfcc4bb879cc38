"""Converting bfloat16 to Q4_K_M beside a quantizer alone, on the same weights with as many threads.

Two quantizers: ggml's own library as llama.cpp builds it, and libgguf, which the converter uses where our C does not
serve. All of them give the same bytes. The two get their float32 rows in memory, tensor after tensor, and what they
give is thrown away: reading, widening to float32 and writing are in the converter's time, not in theirs.

And each type that our C serves beside ggml's library, rows in memory to blocks in memory, with an importance matrix and
without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import libgguf
import numpy as np
import torch

from ..devtools.cache import cache_folder
from ..devtools.random_models import make_auraflow
from ..loader.files.auraflow import AURAFLOW
from ..loader.files.matching import match
from ..loader.quant_types import QUANT_TYPES
from ..loader.quant_types.base import QuantType
from ..quantizer.checkpoints import open_checkpoint
from ..quantizer.quantize import IN_C, quantize
from ..quantizer.recipe import RECIPES
from ..tests import ggml
from .measure import Ratio, seconds, side_by_side

TYPE = "Q4_K_M"
ROWS = 64  # that a thread quantizes at a time
TYPE_ROWS, TYPE_COLUMNS = 1024, 3072  # of each type's measurement
SMALL = {"double_layers": 1, "single_layers": 1}
FULL_SIZE = {"double_layers": 4, "single_layers": 32, "positional": 9216}  # AuraFlow v0.3: 13.7 GB

Quantizer = Callable[[np.ndarray, QuantType], object]  # of float32 rows

# VmHWM is the process's own; ru_maxrss may be that of the process that started it.
CONVERTER = """
import json, re, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import dev
dev.register_pack()
from auraflow_gguf.quantizer.convert import convert
begin = time.perf_counter()
convert({source!r}, {target!r}, {type!r}, overwrite=True)
seconds = time.perf_counter() - begin
status = Path("/proc/self/status")
peak = re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text()) if status.exists() else None
print(json.dumps([seconds, 1024 * int(peak[1]) if peak else None]))
"""


def measure(pairs: int, *, full_size: bool = False) -> dict:
    """The ratios of `convert` to each quantizer alone, and the memory that a process that converts takes at most.

    The checkpoint has AuraFlow's width and random weights. ``full_size`` takes 18 GB of disk, and minutes for each run;
    then only ggml's library is measured beside. The files are deleted at the end.

    Raises:
        ggml.Unavailable: ggml's library is not to be had here.
    """
    oracle = ggml.load()
    threads = os.cpu_count() or 1
    parent = cache_folder() / "benchmarks"
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent) as folder, ThreadPoolExecutor(threads) as pool:
        source, target = Path(folder, "auraflow.safetensors"), Path(folder, "auraflow.gguf")
        size = FULL_SIZE if full_size else SMALL
        make_auraflow(source, **size, seed=0)
        alone: dict[str, Quantizer] = {
            "ggml": lambda rows, quant_type: _in_threads(
                pool, rows, lambda piece, _: oracle.quantize(piece, quant_type)
            )
        }
        if not full_size:  # this one threads by itself
            alone["libgguf"] = lambda rows, quant_type: libgguf.quantize_rows(rows, quant_type.id)
        times, peaks = [], []
        for _ in range(pairs):
            ours, peak = _convert(source, target)
            times.append((ours, _seconds_alone(source, alone)))
            peaks.append(peak)
        return {
            "type": TYPE,
            "layers": [size["double_layers"], size["single_layers"]],
            "threads": threads,
            "source_bytes": source.stat().st_size,
            **{f"beside_{name}": asdict(Ratio.of([(other[name], ours) for ours, other in times])) for name in alone},
            "peak_bytes": None if None in peaks else max(peaks),
            **({} if full_size else {"types": by_type(5 * pairs, oracle, pool)}),
        }


def by_type(pairs: int, oracle: ggml.Ggml, pool: ThreadPoolExecutor) -> dict[str, dict[str, dict]]:
    """By type, and whether with an importance matrix: the ratio of our quantizer to ggml's with as many threads."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((TYPE_ROWS, TYPE_COLUMNS), np.float32) * np.float32(0.02)
    moments = np.exp(random.standard_normal(TYPE_COLUMNS, np.float32))

    def ratio(quant_type: QuantType, importance: np.ndarray | None) -> dict:
        def alone() -> None:
            packed = np.empty((TYPE_ROWS, quant_type.row_bytes(TYPE_COLUMNS)), np.uint8)
            _in_threads(
                pool,
                rows,
                lambda piece, begin: oracle.quantize(piece, quant_type, importance, packed[begin : begin + ROWS]),
            )

        return asdict(
            side_by_side(
                alone,
                lambda: quantize(torch.from_numpy(rows), quant_type, importance),
                pairs,
            )
        )

    ways = {"plain": None, "imatrix": moments}
    return {name: {way: ratio(QUANT_TYPES[name], given) for way, given in ways.items()} for name in IN_C}


def _convert(source: Path, target: Path) -> tuple[float, int | None]:
    """Seconds, and bytes resident at most, of a process that converts; None where the system does not say them."""
    root = str(Path(__file__).resolve().parent.parent)
    script = CONVERTER.format(root=root, source=str(source), target=str(target), type=TYPE)
    process = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    return tuple(json.loads(process.stdout))


def _seconds_alone(source: Path, quantizers: dict[str, Quantizer]) -> dict[str, float]:
    """What each quantizer takes for all tensors together; one tensor is in memory at a time."""
    sums = dict.fromkeys(quantizers, 0.0)
    for rows, quant_type in _quantized_tensors(source):
        for name, quantizer in quantizers.items():
            sums[name] += seconds(lambda: quantizer(rows, quant_type))  # noqa: B023
    return sums


def _quantized_tensors(source: Path) -> Iterator[tuple[np.ndarray, QuantType]]:
    """The float32 rows and the type of each tensor that is quantized."""
    checkpoint = open_checkpoint(source)
    matched = match(AURAFLOW, checkpoint.shapes, metadata=checkpoint.metadata, path=checkpoint.path)
    for name, tensor in matched.weights.items():
        quant_type = RECIPES[TYPE].type_of(name, tensor.shape, checkpoint.dtype(tensor.name))
        if quant_type.block_size > 1:
            yield checkpoint.read(tensor.name).float().numpy(), quant_type


def _in_threads(pool: ThreadPoolExecutor, rows: np.ndarray, quantizer: Callable[[np.ndarray, int], object]) -> None:
    """Calls the quantizer with each piece of the rows, and the first row's number."""
    for _ in pool.map(lambda begin: quantizer(rows[begin : begin + ROWS], begin), range(0, len(rows), ROWS)):
        pass
