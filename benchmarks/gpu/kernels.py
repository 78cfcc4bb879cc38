"""The kernels alone: their bits beside torch's formulas, bytes a second beside a plain copy, products beside dense
weights."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch

from ...loader.kernels import packed_linear
from ...loader.quant_types import QUANT_TYPES, QuantType
from .setting import LeftOut, Setting, in_processes, milliseconds, random_packed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = (231, (1 << 14) + 3)  # fewer than a program takes, and more than a whole number of programs
FEW_ROWS = (1, 3, 16)
ROWS, COLUMNS = 18432, 3072  # AuraFlow's largest weight, of a modulation
SETS = 4  # of inputs and outputs, which take turns
OUT_FEATURES, IN_FEATURES = 8192, 3072  # of an MLP
INPUT_ROWS = (1, 2, 4, 8, 16, 77, 1024, 4352)  # 4352: of a picture of 1024² and its text

BITS_TEXT = "every type's kernels beside the formulas in torch, on random bytes: dequantized bits, products of few rows"
BANDWIDTH_TEXT = f"a weight of {ROWS} × {COLUMNS} into bfloat16, 10⁹ bytes read and written a second"
PRODUCTS_TEXT = f"a weight of {OUT_FEATURES} × {IN_FEATURES} by rows of bfloat16 input, beside the dense weight"


def _need_triton(setting: Setting) -> None:
    if setting.device.type == "cpu":
        raise LeftOut("Triton's kernels run on GPUs alone; on CPUs its interpreter tries them, in the tests.")
    if importlib.util.find_spec("triton") is None:
        raise LeftOut("Triton is not installed here.")


def bits(setting: Setting) -> Iterator[dict]:
    """A row a type, of all types: ``different``, by dtype how many weights have other bits than torch's formula gives
    them (a NaN's payload is not asked), and ``products``, by rows of input the largest error beside the allowed one."""
    _need_triton(setting)
    from ...loader.kernels.triton_kernels import FORMULAS

    yield from in_processes(bits_of, FORMULAS, setting)


@torch.inference_mode()
def bits_of(name: str, setting: Setting) -> dict:
    """A type's row of `bits`."""
    kind = QUANT_TYPES[name]
    return {
        "type": name,
        "different": {
            str(dtype).removeprefix("torch."): sum(_different(kind, blocks, dtype, setting) for blocks in BLOCKS)
            for dtype in DTYPES
        },
        "products": {rows: _product_error(kind, rows, setting) for rows in FEW_ROWS},
    }


def _different(kind: QuantType, blocks: int, dtype: torch.dtype, setting: Setting) -> int:
    from ...loader.kernels.triton_kernels import dequantize_into

    packed = torch.randint(0, 256, (1, blocks * kind.type_size), dtype=torch.uint8, device=setting.device)
    ours = torch.empty(1, blocks * kind.block_size, dtype=dtype, device=setting.device)
    dequantize_into(ours, packed, kind)
    expected = kind.dequantize(packed, dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    same = (ours.view(integers) == expected.view(integers)) | (ours.isnan() & expected.isnan())
    return int((~same).sum())


def _product_error(kind: QuantType, rows: int, setting: Setting) -> float:
    """The error beside float64 as a share of what float32 sums and one rounding to bfloat16 may have: 1 at most."""
    from ...loader.kernels.triton_kernels import linear_into

    packed = random_packed(kind, 77, 1024, setting)
    x = torch.randn(rows, 1024, dtype=torch.bfloat16, device=setting.device)
    weight = kind.dequantize(packed, x.dtype).double()
    expected, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    allowed = 1e-6 * magnitude + 1.001 * torch.finfo(x.dtype).eps / 2 * expected.abs()
    ours = torch.empty(rows, len(packed), dtype=x.dtype, device=setting.device)
    linear_into(ours, x, packed, kind, None)
    return float(((ours.double() - expected).abs() / allowed).max())


@torch.inference_mode()
def bandwidth(setting: Setting) -> Iterator[dict]:
    """A row a type: ``copy``, ``triton`` and ``torch``, in GB/s, of a copy of as many bytes and of dequantizing."""
    _need_triton(setting)
    from ...loader.kernels.triton_kernels import dequantize_into

    for kind in map(QUANT_TYPES.__getitem__, setting.types):
        packed = [random_packed(kind, ROWS, COLUMNS, setting, seed) for seed in range(SETS)]
        dense = [torch.empty(ROWS, COLUMNS, dtype=setting.dtype, device=setting.device) for _ in range(SETS)]
        moved = packed[0].nbytes + dense[0].nbytes
        source, target = (torch.empty(moved // 2, dtype=torch.uint8, device=setting.device) for _ in "rw")
        runs = {
            "copy": lambda: target.copy_(source),  # noqa: B023
            "triton": _taking_turns(lambda p, out: dequantize_into(out, p, kind), packed, dense),  # noqa: B023
            "torch": _taking_turns(lambda p, out: kind.dequantize(p, out.dtype), packed, dense),  # noqa: B023
        }
        yield {"type": kind.name} | {way: moved / (1e6 * milliseconds(run, setting)) for way, run in runs.items()}


def products(setting: Setting) -> Iterator[dict]:
    """A row a type and number of rows of input: ``packed_ms`` and ``dense_ms``."""
    for name in setting.types:
        yield from products_of(name, setting)


@torch.inference_mode()
def products_of(name: str, setting: Setting) -> list[dict]:
    """A type's rows of `products`."""
    kind = QUANT_TYPES[name]
    out_features, in_features = (96, 256) if setting.quick else (OUT_FEATURES, IN_FEATURES)
    packed = random_packed(kind, out_features, in_features, setting)
    dense = kind.dequantize(packed, setting.dtype)
    found = []
    for rows in INPUT_ROWS[: 2 if setting.quick else None]:
        x = torch.randn(rows, in_features, dtype=setting.dtype, device=setting.device)
        packed_ms = milliseconds(lambda: packed_linear(x, packed, kind), setting)  # noqa: B023
        dense_ms = milliseconds(lambda: torch.nn.functional.linear(x, dense), setting)  # noqa: B023
        found.append({"type": name, "rows": rows, "packed_ms": packed_ms, "dense_ms": dense_ms})
    return found


def _taking_turns(run: Callable, *sets: list[torch.Tensor]) -> Callable[[], object]:
    """``run`` with one tensor of each list, the next ones in each run."""
    arguments = itertools.cycle(zip(*sets, strict=True))
    return lambda: run(*next(arguments))
