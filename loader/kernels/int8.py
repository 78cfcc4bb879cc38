"""A packed weight as rotated int8 with one scale a row, and on CPUs its product with int8 activations.

A row of a weight and a token have the same product when both are turned by one orthogonal matrix. ConvRot's (as in
``comfy_kitchen.tensor.int8_utils``) spreads what stands out over 256 neighbours, so that a row, or a token, can share
one scale: a Hadamard matrix of 256, ``H4 ⊗ H4 ⊗ H4 ⊗ H4 / 16``, symmetric, with ::

    H4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

A channel that stands far above its neighbours would take them with it, rotated or not. So the columns of such a channel
may be *smoothed* (SmoothQuant, arXiv:2211.10438): its activations are divided by a power of two, and its weights are
multiplied by it before they are rotated.

**Exactness.** The sums are taken in the order of `rotated`, in float32, everywhere; powers of two do not round, and
the rounding to integers is to nearest, ties to even. So torch, C and Triton give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from ..quant_types import QuantType
from . import cpu, dequantize, gpu, native, processor
from .dequantizers import SUFFIXES, dequantizer_in_c
from .tiles import in_tiles, tile

GROUP = 256
"""Neighbours that are rotated together: a row is a whole number of groups."""

TINY = 1e-30
"""The least scale, of rows of zeros, as in comfy-kitchen."""

# Powers of two by which channels are smoothed: less would gain nothing, and more would leave float16.
LEAST_SMOOTHED, MOST_SMOOTHED = 2, 12

NORM_ROWS = 1024  # dequantized at a time

# Tokens that a thread turns at a time, and at most so many rows of int8 in a product of one thread.
TOKENS, PRODUCT_ROWS = 128, 1024

TORCH_ROWS = 32  # that torch turns at a time, in a core's cache

# Fewer rows of input cost more to turn into int8 than their product does.
FEW_ROWS = 16


def rotated(weights: torch.Tensor) -> torch.Tensor:
    """``(…, n · 256) float32``: each group times the Hadamard matrix of 256.

    The sums of four neighbours are taken first, then of four that are 4, 16 and 64 apart.
    """
    x = weights.reshape(-1, 16, 16)
    for _ in range(2):
        x = x.transpose(1, 2).contiguous()  # neighbours are 16 apart now, and sums of many at a time are fast
        for stride in (16, 64):
            a, b, c, d = x.view(-1, 4, stride).unbind(1)
            p, m, q, n = a + b, a - b, c + d, c - d
            x = torch.stack((p + n, p - n, m + q, q - m), 1)
        x = x.view(-1, 16, 16)
    return x.mul_(1 / 16).view(weights.shape)


def scales_of(rows: torch.Tensor) -> torch.Tensor:
    """``(rows, columns) float32`` → ``(rows,) float32``: what an int8 step of each is worth."""
    return scales_of_maxima(rows.abs().amax(1))


def scales_of_maxima(maxima: torch.Tensor) -> torch.Tensor:
    """The same of the largest magnitudes."""
    return (maxima / 127).clamp_(min=TINY)


def rounded_(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``(rows, columns) float32`` in place, as multiples of each row's scale: whole numbers of at most ±127."""
    return rows.mul_(scales.reciprocal()[:, None]).clamp_(-127, 127).round_()


def can_be_int8(quant_type: QuantType, columns: int) -> bool:
    """Whether a weight of rows of this type and length can be turned into int8 with profit."""
    return quant_type.block_size > 1 and columns % GROUP == 0


def refused_by_cpu() -> str | None:
    """Why int8 products would be slower than float32 ones on this CPU, or None."""
    if not processor.multiplies_int8():
        return "torch multiplies int8 no faster than float32 on this CPU, as it would with AMX or VNNI"
    if _in_c(None) is None:
        return "the C for CPUs is not compiled: run `python cli.py compile` in the pack's folder, and restart ComfyUI"
    return None


def refused_by_gpu(device: torch.device) -> str | None:
    """Why a weight cannot be turned into int8 in one launch on a GPU, or None."""
    return None if gpu.has_triton(device) else "Triton does not work there"


def norms(packed: torch.Tensor, quant_type: QuantType) -> tuple[torch.Tensor, torch.Tensor]:
    """The Euclidean norms of a packed weight's rows, ``(rows,)``, and columns, ``(columns,)``, float32, in one pass.

    Args:
        packed: ``(rows, row_bytes) uint8``.
    """
    rows, columns = [], 0
    for part in packed.split(NORM_ROWS):
        weights = dequantize(part, quant_type, torch.float32)
        rows.append(weights.norm(dim=1))
        columns = columns + weights.square().sum(0)
    return torch.cat(rows), columns.sqrt()


def smoothing_of(outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor | None:
    """By what a weight's input channels are to be smoothed, from weights alone.

    The error of rounding both factors of a product is least where a channel's activations and weights are of one size.
    How large the activations are is judged by the weight that they come out of.

    Args:
        outputs: ``(channels,)``, the norms of the rows of the weight that the activations come out of.
        inputs: ``(channels,)``, the norms of the columns of the weight that they go into.

    Returns:
        ``(channels,) float32``, powers of two; or None where no channel stands out.
    """
    tiny = torch.finfo(torch.float32).tiny
    exponents = (outputs.clamp(min=tiny) / inputs.clamp(min=tiny)).log2() / 2
    exponents = (exponents - exponents.median()).round().clamp(max=MOST_SMOOTHED)
    standing_out = exponents >= LEAST_SMOOTHED
    return torch.where(standing_out, exponents, 0.0).exp2() if standing_out.any() else None


def row_scales(packed: torch.Tensor, quant_type: QuantType, smoothing: torch.Tensor | None = None) -> torch.Tensor:
    """The scales of a weight's rows, in one pass over it.

    Args:
        packed: ``(rows, row_bytes) uint8``.
        quant_type: one for which `can_be_int8`.
        smoothing: ``(columns,) float32`` on ``packed``'s device, by which the columns are multiplied first; or None.

    Returns:
        ``(rows,) float32`` on ``packed``'s device.

    Raises:
        RuntimeError: on a GPU where Triton does not work.
    """
    if packed.device.type != "cpu":
        return scales_of_maxima(gpu.group_maxima(packed, quant_type, smoothing).amax(1))
    scales = torch.empty(len(packed), dtype=torch.float32, device="cpu")

    def find(start: int, stop: int) -> None:
        _turn(packed[start:stop], quant_type, smoothing, scales[start:stop], None, given=False)

    in_tiles(find, len(packed), PRODUCT_ROWS)
    return scales


def int8_weight(
    packed: torch.Tensor,
    quant_type: QuantType,
    scales: torch.Tensor,
    smoothing: torch.Tensor | None = None,
    *,
    reuse_buffer: bool = True,
) -> torch.Tensor:
    """``(rows, columns) int8``: the rotated weight in steps of its rows' scales.

    Args:
        packed: ``(rows, row_bytes) uint8``.
        scales: ``(rows,) float32`` on its device.
        smoothing: as `row_scales` was given it.
        reuse_buffer: on a GPU, whether it may be written where the last dense weight was.

    Raises:
        RuntimeError: on a GPU where Triton does not work.
    """
    if packed.device.type != "cpu":
        return gpu.int8_weight(packed, quant_type, scales, smoothing, reuse_buffer=reuse_buffer)
    out = torch.empty(len(packed), quant_type.columns(packed.shape[1]), dtype=torch.int8, device="cpu")

    def turn(start: int, stop: int) -> None:
        _turn(packed[start:stop], quant_type, smoothing, scales[start:stop], out[start:stop], given=True)

    in_tiles(turn, len(packed), PRODUCT_ROWS)
    return out


def linear_on_cpu(
    input: torch.Tensor,
    packed: torch.Tensor,
    quant_type: QuantType,
    scales: torch.Tensor,
    smoothing: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The product of int8 activations, a scale for each token, with the rotated int8 weight, as comfy-kitchen's.

    Where the CPU has no int8 products, which is slow, the whole numbers are multiplied as float32.

    Args:
        input: ``(…, in_features)``, any float dtype.
        packed: ``(out_features, row_bytes) uint8``.
        scales: ``(out_features,) float32``, those of `row_scales`.
        smoothing: ``(in_features,) float32``, as `row_scales` was given it.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(…, out_features)`` in ``input``'s dtype.
    """
    in_float = not processor.multiplies_int8()
    columns = input.shape[-1]
    tokens, token_scales = _tokens(input.reshape(-1, columns), smoothing)
    tokens = tokens.float() if in_float else tokens
    out = cpu.in_large_pages(len(tokens), len(packed), input.dtype)

    def multiply(start: int, stop: int) -> None:
        weights = tile((stop - start) * columns, torch.int8).view(-1, columns)
        _turn(packed[start:stop], quant_type, smoothing, scales[start:stop], weights, given=True)
        if in_float:
            sums = tokens @ weights.float().t()
        else:
            sums = tile(len(tokens) * len(weights), torch.int32).view(len(tokens), -1)
            torch._int_mm(tokens, weights.t(), out=sums)
        _write(sums, token_scales, scales[start:stop], out[:, start:stop])

    in_tiles(multiply, len(packed), min(PRODUCT_ROWS, cpu.product_tile_bytes() // (4 * len(tokens))))
    if bias is not None:
        out += bias
    return out.view(*input.shape[:-1], len(packed))


def _tokens(input: torch.Tensor, smoothing: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``(tokens, columns)``, any float dtype, in int8, with the scale of each."""
    inverse = None if smoothing is None else smoothing.reciprocal()
    tokens, scales = input.new_empty(input.shape, dtype=torch.int8), input.new_empty(len(input), dtype=torch.float32)

    def turn(start: int, stop: int) -> None:
        rows = input[start:stop].float().contiguous()
        _turn(rows, None, inverse, scales[start:stop], tokens[start:stop], given=False)

    in_tiles(turn, len(input), TOKENS)
    return tokens, scales


def smoothed(input: torch.Tensor, smoothing: torch.Tensor | None) -> torch.Tensor:
    """Activations ``(…, columns)`` for a weight whose columns were multiplied by ``smoothing``, in their own dtype."""
    return input if smoothing is None else input * smoothing.reciprocal().to(input.dtype)


def _turn(
    rows: torch.Tensor,
    quant_type: QuantType | None,
    factors: torch.Tensor | None,
    scales: torch.Tensor,
    out: torch.Tensor | None,
    *,
    given: bool,
) -> None:
    """Rows in int8, or their scales alone.

    Args:
        rows: ``(rows, row_bytes) uint8``, or ``(rows, columns) float32``, contiguous.
        quant_type: that of packed rows, or None.
        factors: ``(columns,) float32``, what the columns are multiplied by before they are rotated; or None.
        scales: ``(rows,) float32``, written unless they are ``given``.
        out: ``(rows, columns) int8``, or None.
    """
    if in_c := _in_c(quant_type):
        in_c(rows, factors, scales, out, given)
        return
    for start in range(0, len(rows), TORCH_ROWS):
        part = slice(start, start + TORCH_ROWS)
        values = rows[part] if quant_type is None else quant_type.dequantize(rows[part])
        turned = rotated(values if factors is None else values * factors)
        if not given:
            scales[part] = scales_of(turned)
        if out is not None:
            out[part] = rounded_(turned, scales[part])


@functools.cache
def _in_c(quant_type: QuantType | None) -> Callable[..., None] | None:
    """`_turn` in C, for packed rows of a type or for float32 ones; None where that is not compiled."""
    int8_rows = native.function("int8.c", "int8_rows")
    found = (None, None) if quant_type is None else dequantizer_in_c(quant_type, torch.float32)
    if int8_rows is None or found is None:
        return None
    dequantizer, grid = found
    dequantizer_address = ctypes.cast(dequantizer, ctypes.c_void_p).value

    def turn(rows, factors, scales, out, given):
        columns = rows.shape[1] if quant_type is None else quant_type.columns(rows.shape[1])
        int8_rows(
            *(rows.data_ptr(), rows.shape[1] * rows.element_size()),
            *(dequantizer_address, _address(grid), columns // quant_type.block_size if quant_type else 0),
            *(_address(factors), tile(columns, torch.float32).data_ptr(), scales.data_ptr(), given),
            *(_address(out), len(rows), columns),
        )

    return turn


def _write(sums: torch.Tensor, token_scales: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Write what sums ``(tokens, rows)``, int32 or float32, are worth into ``out``, of any float dtype."""
    suffix = SUFFIXES.get(out.dtype) if sums.dtype == torch.int32 else None
    if suffix is not None and (in_c := native.function("int8_sums.c", f"int8_sums{suffix}")):
        addresses = (x.data_ptr() for x in (sums, out, token_scales, scales))
        in_c(*addresses, *sums.shape, out.stride(0))
    else:
        out.copy_(sums.float() * (token_scales[:, None] * scales))


def _address(values: torch.Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()
