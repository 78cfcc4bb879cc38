"""Converting bfloat16 to Q4_K_M beside a quantizer alone, on the same weights with as many threads.

Two quantizers: ggml's own library as llama.cpp builds it, and libgguf, which the converter uses: the same code and the
same bytes in another build.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ..devtools.cache import cache_folder
from ..devtools.random_models import make_auraflow
from ..loader.architecture import match
from ..loader.auraflow import AURAFLOW
from ..loader.quant_types.base import QuantType
from ..quantizer.checkpoint import open_checkpoint
from ..quantizer.convert import convert, quantize
from ..quantizer.recipe import RECIPES
from ..tests.quantizer import ggml
from .measure import side_by_side

TYPE = "Q4_K_M"
ROWS = 64  # that a thread quantizes at a time

Tensors = list[tuple[np.ndarray, QuantType]]  # float32 rows, and what they are to become

PEAK = """
import resource, sys
sys.path.insert(0, {root!r})
import dev
dev.register_pack()
from auraflow_gguf.quantizer.convert import convert
convert({source!r}, {target!r}, {type!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def measure(pairs: int, double_layers: int = 1, single_layers: int = 1) -> dict:
    """The ratios of `convert` to each quantizer alone, and the memory that a process that converts takes at most.

    The checkpoint has AuraFlow's width and random weights; it is in the page cache. The quantizers get their float32
    rows in memory, and what they give is thrown away: they neither read nor write.
    """
    threads = os.cpu_count() or 1
    source = cache_folder() / "benchmarks" / f"auraflow-{double_layers}-{single_layers}.safetensors"
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        make_auraflow(source, double_layers, single_layers, seed=0)
    tensors = list(_quantized_tensors(source))
    oracle = ggml.load()
    with TemporaryDirectory(dir=source.parent) as folder, ThreadPoolExecutor(threads) as pool:
        target = Path(folder, "model.gguf")
        alone = {
            "ggml": lambda: _with_ggml(pool, oracle, tensors),
            "libgguf": lambda: _with_libgguf(tensors),
        }
        ratios = {
            name: side_by_side(baseline, lambda: convert(source, target, TYPE, overwrite=True), pairs)
            for name, baseline in alone.items()
        }
        return {
            "type": TYPE,
            "layers": [double_layers, single_layers],
            "threads": threads,
            "weights": sum(rows.size for rows, _ in tensors),
            **{f"beside_{name}": asdict(ratio) for name, ratio in ratios.items()},
            "peak_bytes": _peak(source, target.with_name("peak.gguf")),
        }


def _quantized_tensors(source: Path) -> Iterator[tuple[np.ndarray, QuantType]]:
    """The float32 rows and the type of each tensor that is quantized."""
    checkpoint = open_checkpoint(source)
    matched = match(AURAFLOW, checkpoint.shapes, metadata=checkpoint.metadata, path=checkpoint.path)
    for name, tensor in matched.weights.items():
        quant_type = RECIPES[TYPE].type_of(name, tensor.shape, checkpoint.dtype(tensor.name))
        if quant_type.block_size > 1:
            yield checkpoint.read(tensor.name).float().numpy(), quant_type


def _with_ggml(pool: ThreadPoolExecutor, oracle: ggml.Ggml, tensors: Tensors) -> None:
    pieces = [
        (rows[begin : begin + ROWS], quant_type) for rows, quant_type in tensors for begin in range(0, len(rows), ROWS)
    ]
    for _ in pool.map(lambda piece: oracle.quantize(*piece), pieces):
        pass


def _with_libgguf(tensors: Tensors) -> None:
    for rows, quant_type in tensors:
        quantize(torch.from_numpy(rows), quant_type)  # as many threads as there are cores


def _peak(source: Path, target: Path) -> int | None:
    """Bytes resident at most in a process that converts; None where the system does not say it in KiB."""
    if sys.platform != "linux":
        return None
    root = str(Path(__file__).resolve().parent.parent)
    script = PEAK.format(root=root, source=str(source), target=str(target), type=TYPE)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
