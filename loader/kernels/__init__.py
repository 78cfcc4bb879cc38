"""A packed weight dequantized, or its matrix product, in the way that suits the device.

Under torch.compile the product is an operator of its own, ``auraflow_gguf::linear``, which the compiler calls and does
not look into: so it neither breaks the graph nor depends on the number of rows. A weight that is only dequantized goes
to the compiler as torch's operations.

The same operator is what a gradient goes through. It keeps the packed weight for the backward pass, and dequantizes it
there once more: training an adapter takes no memory for dense weights.
"""

from __future__ import annotations

import torch

from ..quant_types import QUANT_TYPES, STORED_DTYPES, QuantType
from . import cpu, gpu

_STORED_TYPES = {dtype: name for name, dtype in STORED_DTYPES.items()}


def packed_linear(
    input: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``input @ dequantize(packed).T + bias``.

    Args:
        input: ``(…, in_features)``, float32, bfloat16 or float16; its dtype is the compute type.
        packed: ``(out_features, row_bytes) uint8`` on ``input``'s device.
        quant_type: the type of ``packed``.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(…, out_features)`` in ``input``'s dtype.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and input.requires_grad):
        return _linear_operator(input, packed, quant_type.name, bias)
    if input.device.type == "cpu":
        return cpu.linear(input, packed, quant_type, bias)
    return gpu.linear(input, packed, quant_type, bias)


def dense_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``input @ weight.T + bias`` of a dense weight: torch's, or by our own C on a CPU where that is faster.

    Args:
        input: ``(…, in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(…, out_features)`` in ``input``'s dtype.
    """
    name = _STORED_TYPES.get(weight.dtype) if weight.dtype == input.dtype and weight.is_contiguous() else None
    if name is None or torch.is_grad_enabled() or not input.device.type == weight.device.type == "cpu":
        return torch.nn.functional.linear(input, weight, bias)
    return packed_linear(input, weight.view(torch.uint8), QUANT_TYPES[name], bias)


def add_low_rank(output: torch.Tensor, input: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> None:
    """``output += input @ down.T @ up.T``.

    Args:
        output: ``(…, out_features)``, contiguous or as `packed_linear` gives it.
        input: ``(…, in_features)``.
        down, up: ``(rank, in_features)`` and ``(out_features, rank)``, all of one dtype and device.
    """
    if input.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        cpu.add_low_rank(output, input, down, up)
        return
    hidden = torch.nn.functional.linear(input, down)
    output.view(-1, output.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), up.t())


@torch.library.custom_op(
    "auraflow_gguf::linear",
    mutates_args=(),
    schema="(Tensor input, Tensor packed, str quant_type, Tensor? bias) -> Tensor",
)
def _linear_operator(input, packed, quant_type, bias):
    if input.device.type == "cpu":
        return cpu.linear(input, packed, QUANT_TYPES[quant_type], bias)
    # The compiler may run this while it records a CUDA graph, or warms up for it, in memory that is the graph's.
    return gpu.linear(input, packed, QUANT_TYPES[quant_type], bias, reuse_buffer=False)


@_linear_operator.register_fake
def _(input, packed, quant_type, bias):
    if input.device.type == "cpu" and STORED_DTYPES.get(quant_type) != input.dtype:
        return cpu.new_product(input, packed.shape[0])
    return input.new_empty(*input.shape[:-1], packed.shape[0])


@torch.library.custom_op(
    "auraflow_gguf::linear_input_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor packed, str quant_type) -> Tensor",
)
def _input_gradient_operator(gradient, packed, quant_type):
    if gradient.device.type == "cpu":
        return cpu.input_gradient(gradient, packed, QUANT_TYPES[quant_type])
    return gpu.input_gradient(gradient, packed, QUANT_TYPES[quant_type], reuse_buffer=False)


@_input_gradient_operator.register_fake
def _(gradient, packed, quant_type):
    kind = QUANT_TYPES[quant_type]
    return gradient.new_empty(*gradient.shape[:-1], kind.columns(packed.shape[1]))


def _keep(ctx, inputs, output):
    # Not by save_for_backward, which refuses what was made in inference mode, as ComfyUI's weights are.
    _, ctx.packed, ctx.quant_type, _ = inputs


def _backward(ctx, gradient):
    _, _, _, needs_bias = ctx.needs_input_grad
    to_input = _input_gradient_operator(gradient, ctx.packed, ctx.quant_type)
    return to_input, None, None, gradient.flatten(0, -2).sum(0) if needs_bias else None


_linear_operator.register_autograd(_backward, setup_context=_keep)


def dequantize(packed: torch.Tensor, quant_type: QuantType, dtype: torch.dtype) -> torch.Tensor:
    """``QuantType.dequantize`` of ``(rows, row_bytes) uint8``, in the way that suits the device; the same bits."""
    if torch.compiler.is_compiling():
        return quant_type.dequantize(packed, dtype)
    if packed.device.type == "cpu":
        return cpu.dequantize(packed, quant_type, dtype)
    return gpu.dequantize(packed, quant_type, dtype)
