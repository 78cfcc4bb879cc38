"""Dequantizing one weight on a GPU beside a plain copy, and multiplying few rows with it.

For AuraFlow's largest weight, 18432 × 3072 (a modulation), and each quantization type::

    python -c "import sys, dev; dev.register_pack(); from auraflow_gguf.benchmarks import gpu_dequantize; \\
               sys.exit(gpu_dequantize.main(sys.argv[1:]))"

Before a kernel is timed its result is compared with torch's, bit by bit. Times are medians of the device's own clock
(``triton.testing.do_bench``, which empties the L2 cache before every run); the runs take turns among several sets of
inputs and outputs besides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..loader.quant_types import QUANT_TYPES, QuantType
from .measure import machine

RESULTS = Path(__file__).with_name("gpu_dequantize.json")
ROWS, COLUMNS = 18432, 3072
SETS = 4
INPUT_ROWS = (1, 2, 4, 8, 16)
HEADER = (
    f"{'type':8} {'Triton':>10} {'of copy':>8} {'torch':>10}   "
    f"product of {', '.join(map(str, INPUT_ROWS))} rows, ms: fused/dense"
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu_dequantize", description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    quantized = [name for name, entry in QUANT_TYPES.items() if entry.block_size > 1]
    parser.add_argument("--type", action="append", choices=quantized, help="measure only this; may be repeated")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the figures go, as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no GPU here that torch can use through CUDA or ROCm: nothing was measured.", file=sys.stderr)
        return 1
    try:
        import triton  # noqa: F401
    except ImportError as error:
        print(f"Triton is not installed ({error}): nothing was measured.", file=sys.stderr)
        return 1
    print(f"{machine()}, a weight of {ROWS} × {COLUMNS}, {options.dtype}\n\n{HEADER}")
    rows = []
    for name in options.type or quantized:
        rows.append(measure(QUANT_TYPES[name], getattr(torch, options.dtype)))
        print(_line(rows[-1]), flush=True)
    results = {"machine": machine(), "shape": [ROWS, COLUMNS], "dtype": options.dtype, "rows": rows}
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {options.output}")
    return 0


@torch.inference_mode()
def measure(quant_type: QuantType, dtype: torch.dtype) -> dict:
    """One type's figures.

    Returns:
        ``type``; the bytes that are read and written; ``copy_gb_s``, ``triton_gb_s`` and ``torch_gb_s``, in 10⁹ bytes
        read and written in a second; ``product_ms``: by rows of input, the times of the kernel that multiplies
        at once (``fused``) and of dequantizing and then multiplying (``dense``).
    """
    from ..loader.kernels.triton_kernels import dequantize_into, linear_into

    shape = (ROWS, quant_type.row_bytes(COLUMNS))
    packed = [torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for _ in range(SETS)]
    dense = [torch.empty(ROWS, COLUMNS, dtype=dtype, device="cuda") for _ in range(SETS)]
    dequantize_into(dense[0], packed[0], quant_type)
    _check_equal(dense[0], quant_type.dequantize(packed[0], dtype), quant_type)

    moved = packed[0].nbytes + dense[0].nbytes
    sources, targets = ([torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(SETS)] for _ in "rw")
    milliseconds = {
        "copy": _median(lambda source, target: target.copy_(source), sources, targets),
        "triton": _median(lambda p, out: dequantize_into(out, p, quant_type), packed, dense),
        "torch": _median(lambda p: quant_type.dequantize(p, dtype), packed),
    }
    del sources, targets

    def fused(p: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        linear_into(out, x, p, quant_type, None)

    def by_way_of_dense(p: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> None:
        dequantize_into(weight, p, quant_type)
        torch.nn.functional.linear(x, weight)

    product = {}
    for rows in INPUT_ROWS:
        inputs = [torch.randn(rows, COLUMNS, dtype=dtype, device="cuda") for _ in range(SETS)]
        outs = [torch.empty(rows, ROWS, dtype=dtype, device="cuda") for _ in range(SETS)]
        product[rows] = {
            "fused": _median(fused, packed, inputs, outs),
            "dense": _median(by_way_of_dense, packed, dense, inputs),
        }
    return {
        "type": quant_type.name,
        "bytes": moved,
        **{f"{way}_gb_s": moved / (time * 1e6) for way, time in milliseconds.items()},
        "product_ms": product,
    }


def _median(run: Callable, *sets: list[torch.Tensor]) -> float:
    """Milliseconds of ``run`` with one tensor of each list, the next ones in each run."""
    from triton.testing import do_bench

    arguments = itertools.cycle(zip(*sets, strict=True))
    return do_bench(lambda: run(*next(arguments)), warmup=50, rep=300, return_mode="median")


def _check_equal(ours: torch.Tensor, expected: torch.Tensor, quant_type: QuantType) -> None:
    """Bit by bit; random scales may be NaN, whose payload is not promised."""
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    if not ((ours.view(bits) == expected.view(bits)) | (ours.isnan() & expected.isnan())).all():
        raise RuntimeError(f"the Triton kernel of {quant_type.name} and torch disagree on this GPU")


def _line(row: dict) -> str:
    product = "  ".join(f"{times['fused']:.3f}/{times['dense']:.3f}" for times in row["product_ms"].values())
    share = row["triton_gb_s"] / row["copy_gb_s"]
    return f"{row['type']:8} {row['triton_gb_s']:5.0f} GB/s {share:7.0%} {row['torch_gb_s']:5.0f} GB/s   {product}"
