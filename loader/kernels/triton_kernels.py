"""Three kernels over the formulas: a packed weight dequantized, or rotated and rounded to int8, in one launch, and a
few rows multiplied with it.

The formula is a compile-time argument, so each type has kernels of its own, with no branch on data. No launch waits
for the device. Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..quant_types import QuantType
from ..quant_types.grids import grid
from . import triton_formulas as formulas

# The most rows of input that the multiplying kernel takes.
FEW_ROWS = 16

# Weights of a program of the dequantizing kernel: 64 for each thread of four warps, which share the work on a scale.
DEQUANTIZED_AT_ONCE = 8192

# Neighbours that the rotating kernel takes together, see ``int8.py``, and the weights of a program of it.
GROUP = 256
ROTATED_AT_ONCE = 4096

# Tile of the multiplying kernel: rows of the weight, at most, and weights of each; and sums of a thread.
WEIGHT_ROWS, WEIGHT_COLUMNS = 8, 256
SUMS = 64

# For a kernel of which NVIDIA's compiler would rather spill some registers, to have more threads at once.
ALL_REGISTERS = {"maxnreg": 255}
_spilling: set[tuple] = set()


class Formula(NamedTuple):
    """A type's device function, see ``triton_formulas``, and the name of the grid that is its table."""

    weights: Callable
    grid: str | None = None

    def table(self, device: torch.device) -> torch.Tensor | None:
        return None if self.grid is None else grid(self.grid, device)


FORMULAS = {
    "Q1_0": Formula(formulas.q1_0),
    "Q2_0": Formula(formulas.q2_0),
    "Q4_0": Formula(formulas.q4_0),
    "Q4_1": Formula(formulas.q4_1),
    "Q5_0": Formula(formulas.q5_0),
    "Q5_1": Formula(formulas.q5_1),
    "Q8_0": Formula(formulas.q8_0),
    "Q2_K": Formula(formulas.q2_k),
    "Q3_K": Formula(formulas.q3_k),
    "Q4_K": Formula(formulas.q4_k),
    "Q5_K": Formula(formulas.q5_k),
    "Q6_K": Formula(formulas.q6_k),
    "TQ1_0": Formula(formulas.tq1_0),
    "TQ2_0": Formula(formulas.tq2_0),
    "MXFP4": Formula(formulas.mxfp4),
    "NVFP4": Formula(formulas.nvfp4),
    "IQ4_NL": Formula(formulas.iq4_nl),
    "IQ4_XS": Formula(formulas.iq4_xs),
    "IQ3_XXS": Formula(formulas.iq3_xxs, "IQ3_XXS"),
    "IQ3_S": Formula(formulas.iq3_s, "IQ3_S"),
    "IQ2_XXS": Formula(formulas.iq2_xxs, "IQ2_XXS"),
    "IQ2_XS": Formula(formulas.iq2_xs, "IQ2_XS"),
    "IQ2_S": Formula(formulas.iq2_s, "IQ2_S"),
    "IQ1_S": Formula(formulas.iq1_s, "IQ1_S"),
    "IQ1_M": Formula(formulas.iq1_m, "IQ1_S"),
}


def dequantize_into(out: torch.Tensor, packed: torch.Tensor, quant_type: QuantType) -> None:
    """Unpack a weight: the float32 value, rounded once to ``out``'s dtype.

    Args:
        out: float32, float16 or bfloat16, contiguous, as many elements as ``packed`` has weights.
        packed: uint8, contiguous, one whole block or more, on ``out``'s device, which is the current one.
        quant_type: one of ``FORMULAS``.
    """
    formula = FORMULAS[quant_type.name]
    n_blocks = packed.numel() // quant_type.type_size
    tile, options = dequantize_tile(quant_type, n_blocks)
    programs = triton.cdiv(n_blocks, tile["BLOCKS"])
    arguments = (out, packed, formula.table(packed.device), n_blocks)
    _launch(dequantize_kernel, programs, arguments, (quant_type.name,), options, WEIGHTS=formula.weights, **tile)


def linear_into(
    out: torch.Tensor, input: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, bias: torch.Tensor | None
) -> None:
    """``input @ dequantize(packed).T + bias`` in one pass over the packed weight, for few rows of input.

    The weights are rounded to ``input``'s dtype, as those of a dense weight are; products and sums are float32, and
    the result is rounded once, after the bias.

    Args:
        out: ``(rows, out_features)``, of ``input``'s dtype, contiguous.
        input: ``(rows, in_features)``, float32, float16 or bfloat16, contiguous, 1 to ``FEW_ROWS`` rows.
        packed: ``(out_features, row_bytes) uint8``, contiguous, on ``input``'s device, which is the current one.
        quant_type: one of ``FORMULAS``.
        bias: ``(out_features,)``, of any floating dtype, contiguous, or None.
    """
    formula = FORMULAS[quant_type.name]
    input_rows, weight_rows = out.shape
    tile, options = linear_tile(quant_type, input_rows)
    programs = triton.cdiv(weight_rows, tile["WEIGHT_ROWS"])
    row_blocks = packed.shape[1] // quant_type.type_size
    arguments = (out, input, packed, formula.table(packed.device), bias, input_rows, weight_rows, row_blocks)
    variant = (quant_type.name, tile["INPUT_ROWS"], bias is None)
    _launch(linear_kernel, programs, arguments, variant, options, WEIGHTS=formula.weights, **tile)


def rotate_into(
    out: torch.Tensor,
    packed: torch.Tensor,
    quant_type: QuantType,
    scales: torch.Tensor | None,
    smoothing: torch.Tensor | None = None,
) -> None:
    """Turn a weight into ``int8.rotated``'s, in steps of its rows' scales; or find each group's largest magnitude.

    Args:
        out: ``(rows, columns) int8``, contiguous; without ``scales`` ``(rows, columns / 256) float32``.
        packed: ``(rows, row_bytes) uint8``, contiguous, rows of whole groups, on ``out``'s device, the current one.
        quant_type: one of ``FORMULAS``.
        scales: ``(rows,) float32``, or None.
        smoothing: ``(columns,) float32`` by which the columns are multiplied first, or None.
    """
    formula = FORMULAS[quant_type.name]
    groups = packed.numel() // quant_type.type_size * quant_type.block_size // GROUP
    tile, options = rotate_tile(quant_type)
    programs, row_groups = triton.cdiv(groups, tile["GROUPS"]), groups // max(1, len(packed))
    arguments = (out, packed, formula.table(packed.device), scales, smoothing, groups, row_groups)
    variant = (quant_type.name, smoothing is None)
    _launch(rotate_kernel, programs, arguments, variant, options, WEIGHTS=formula.weights, **tile)


def _launch(kernel, programs: int, arguments: tuple, variant: tuple, options: dict[str, int], **constants) -> None:
    """Launch a kernel; one that turns out to spill registers is compiled and launched once more at once, with all of
    them, and so from then on.

    Args:
        arguments: its tensors and numbers, first of all what it writes.
        variant: what the compiled code depends on besides the kernel, and the device and dtype of what is written.
    """
    variant = (kernel.__name__, arguments[0].device, arguments[0].dtype, *variant)
    if variant not in _spilling:
        launched = kernel[(programs,)](*arguments, **constants, **options)
        if torch.version.hip is not None or not getattr(launched, "n_spills", 0):
            return
        _spilling.add(variant)
    kernel[(programs,)](*arguments, **constants, **options, **ALL_REGISTERS)


def rotate_tile(quant_type: QuantType) -> tuple[dict[str, int], dict[str, int]]:
    """What a program of the rotating kernel takes: its constants, and the options of its launch."""
    sizes = {"BLOCK_SIZE": quant_type.block_size, "TYPE_SIZE": quant_type.type_size}
    return sizes | {"GROUPS": ROTATED_AT_ONCE // GROUP}, {"num_warps": 4}


def dequantize_tile(quant_type: QuantType, n_blocks: int) -> tuple[dict[str, int], dict[str, int]]:
    """What a program of the dequantizing kernel takes: its constants, and the options of its launch.

    Never more blocks than there are, so that no program has to look where the weight ends.
    """
    tile = _blocks(quant_type, DEQUANTIZED_AT_ONCE)
    return tile | {"BLOCKS": min(tile["BLOCKS"], 1 << n_blocks.bit_length() - 1)}, {"num_warps": 4}


def linear_tile(quant_type: QuantType, input_rows: int) -> tuple[dict[str, int], dict[str, int]]:
    """The same of the multiplying kernel, for a number of rows of input.

    Each thread keeps a sum for every row of input and its share of the tile. The more rows, the more threads share a
    tile, and then the smaller it is, so that no thread has more than `SUMS` of them and its registers suffice.
    """
    rows = triton.next_power_of_2(input_rows)
    warps, weight_rows = 4, WEIGHT_ROWS
    while rows * weight_rows * WEIGHT_COLUMNS > SUMS * 32 * warps:
        warps, weight_rows = (warps * 2, weight_rows) if warps < 8 else (warps, weight_rows // 2)
    tile = {"INPUT_ROWS": rows, "WEIGHT_ROWS": weight_rows}
    return _blocks(quant_type, WEIGHT_COLUMNS) | tile, {"num_warps": warps}


def _blocks(quant_type: QuantType, weights: int) -> dict[str, int]:
    return {
        "BLOCK_SIZE": quant_type.block_size,
        "TYPE_SIZE": quant_type.type_size,
        "BLOCKS": weights // quant_type.block_size,
    }


@triton.jit(do_not_specialize=["n_blocks"])
def dequantize_kernel(
    out,
    packed,
    table,
    n_blocks,
    WEIGHTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A program unpacks ``BLOCKS`` neighbours; there are no fewer.

    The last program takes the last ones, some of them a second time: none needs to ask where the weight ends.
    """
    first = tl.minimum(tl.program_id(0).to(tl.int64) * BLOCKS, n_blocks - BLOCKS)
    weights = WEIGHTS(packed + first * TYPE_SIZE + tl.arange(0, BLOCKS) * TYPE_SIZE, table)
    weights = tl.reshape(weights, (BLOCKS * BLOCK_SIZE,)).to(out.dtype.element_ty)
    tl.store(out + first * BLOCK_SIZE + tl.arange(0, BLOCKS * BLOCK_SIZE), weights)


@triton.jit
def _rotated(x):
    """``[N, 256]``: each row times 16 Hadamard matrices, the sums in the order of ``int8.rotated``.

    Each round takes the neighbours of four, and leaves them 64 apart: after four rounds all are where they were.
    """
    for _ in tl.static_range(4):
        even, odd = tl.split(tl.reshape(x, (x.shape[0], 64, 2, 2)))
        p, q = tl.split(even + odd)
        m, n = tl.split(even - odd)
        fours = tl.reshape(tl.join(tl.join(p + n, m + q), tl.join(p - n, q - m)), (x.shape[0], 64, 4))
        x = tl.reshape(tl.permute(fours, (0, 2, 1)), (x.shape[0], 256))
    return x


@triton.jit(do_not_specialize=["groups", "row_groups"])
def rotate_kernel(
    out,
    packed,
    table,
    scales,
    smoothing,
    groups,
    row_groups,
    WEIGHTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A program turns ``GROUPS`` neighbours of 256 weights; the last reads its last block again, not what is beyond.

    The magnitude's largest bits are found as integers, so that a NaN is the largest. The smallest of ±127 and the
    product lies between that and the addition that rounds it: no compiler can make one multiply-add of both.
    """
    BLOCKS: tl.constexpr = GROUPS * 256 // BLOCK_SIZE
    first = tl.program_id(0).to(tl.int64) * GROUPS
    rest = tl.minimum(groups - first, GROUPS).to(tl.int32)
    block = tl.minimum(tl.arange(0, BLOCKS), rest * (256 // BLOCK_SIZE) - 1)
    weights = WEIGHTS(packed + (first * (256 // BLOCK_SIZE) + block) * TYPE_SIZE, table)
    group = tl.arange(0, GROUPS)
    weights = tl.reshape(weights, (GROUPS, 256))
    if smoothing is not None:
        columns = ((first + group) % row_groups * 256)[:, None] + tl.arange(0, 256)[None, :]
        weights *= tl.load(smoothing + columns)
    rotated = _rotated(weights) * 0.0625
    inside = group < rest
    if scales is None:
        magnitude = tl.max(rotated.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        tl.store(out + first + group, magnitude.to(tl.float32, bitcast=True), mask=inside)
    else:
        scale = tl.load(scales + (first + group) // row_groups, mask=inside, other=1.0)
        steps = rotated * tl.div_rn(1.0, scale)[:, None]
        steps = tl.minimum(tl.maximum(steps, -127.0), 127.0) + 12582912.0  # 1.5 · 2²³: its last bits are a whole number
        place = first * 256 + group[:, None] * 256 + tl.arange(0, 256)[None, :]
        tl.store(out + place, steps.to(tl.int32, bitcast=True).to(tl.int8), mask=inside[:, None])


@triton.jit(do_not_specialize=["input_rows", "weight_rows", "row_blocks"])
def linear_kernel(
    out,
    input,
    packed,
    table,
    bias,
    input_rows,
    weight_rows,
    row_blocks,
    WEIGHTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    INPUT_ROWS: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
):
    """A program multiplies the whole input with ``WEIGHT_ROWS`` rows of the weight, ``BLOCKS`` blocks at a time.

    Beyond the last row or block it reads the last one again. The products are summed over the blocks first, and over
    the columns of a tile once, at the end.
    """
    COLUMNS: tl.constexpr = BLOCKS * BLOCK_SIZE
    first_row = tl.program_id(0) * WEIGHT_ROWS
    tile = tl.arange(0, WEIGHT_ROWS * BLOCKS)
    tile_row = tl.minimum(first_row + tile // BLOCKS, weight_rows - 1)
    packed_row = packed + tile_row.to(tl.int64) * (row_blocks * TYPE_SIZE)
    input_row = tl.arange(0, INPUT_ROWS)[:, None]

    products = tl.zeros((INPUT_ROWS, WEIGHT_ROWS, COLUMNS), tl.float32)
    for first in range(0, row_blocks, BLOCKS):
        block = tl.minimum(first + tile % BLOCKS, row_blocks - 1)
        weights = tl.reshape(WEIGHTS(packed_row + block * TYPE_SIZE, table), (1, WEIGHT_ROWS, COLUMNS))
        column = first * BLOCK_SIZE + tl.arange(0, COLUMNS)[None, :]
        inside = column < row_blocks * BLOCK_SIZE
        weights = tl.where(inside[:, None, :], weights, 0.0).to(input.dtype.element_ty).to(tl.float32)
        pointers = input + (input_row * (row_blocks * BLOCK_SIZE) + column)
        values = tl.load(pointers, mask=inside & (input_row < input_rows), other=0.0).to(tl.float32)
        products += values[:, None, :] * weights
    sums = tl.sum(products, 2)

    weight_row = first_row + tl.arange(0, WEIGHT_ROWS)[None, :]
    inside = weight_row < weight_rows
    if bias is not None:
        sums += tl.load(bias + weight_row, mask=inside, other=0.0).to(tl.float32)
    pointers = out + (input_row * weight_rows + weight_row)
    tl.store(pointers, sums.to(out.dtype.element_ty), mask=inside & (input_row < input_rows))
