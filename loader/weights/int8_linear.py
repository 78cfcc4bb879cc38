"""The product of a packed weight in int8: comfy-kitchen's on GPUs, whose kernels rotate and round the activations."""

from __future__ import annotations

import inspect

import comfy_kitchen
import torch

from ..kernels import int8, packed_linear
from ..quant_types import QUANT_TYPES, QuantType
from .layout import is_packed, linear, with_scales


def refused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why int8 products cannot be had on a device, or would be slower than exact ones; None where they can.

    On a GPU this makes a small product, as the only way to know.
    """
    product = getattr(comfy_kitchen, "int8_linear", None)
    if product is None or "convrot" not in inspect.signature(product).parameters:
        return "comfy-kitchen is too old: `pip install -U comfy-kitchen`"
    if device.type == "cpu":
        return int8.refused_by_cpu()
    try:
        weight = torch.zeros(int8.GROUP, int8.GROUP, dtype=torch.int8, device=device)
        scales = torch.ones(int8.GROUP, device=device)
        input = torch.zeros(2 * int8.FEW_ROWS, int8.GROUP, dtype=dtype, device=device)
        arguments = {"x": input, "weight": weight, "weight_scale": scales, "bias": None, "out_dtype": dtype}
        options = {"convrot": True, "convrot_groupsize": int8.GROUP}
        if comfy_kitchen.registry.get_capable_backend("int8_linear", arguments | options) == "eager":
            return "comfy-kitchen has no kernels for it there"
        _product(input, weight, scales, None)
    except Exception as error:  # each backend has exceptions of its own
        reason = str(error).partition("\n")[0]
        return f"comfy-kitchen's kernels do not work there ({type(error).__name__}: {reason})"
    return int8.refused_by_gpu(device)


def can_be_int8(weight: torch.Tensor) -> bool:
    """Whether a weight is one for `with_row_scales`."""
    return is_packed(weight) and int8.can_be_int8(QUANT_TYPES[weight._params.quant_type], weight.shape[-1])


def with_row_scales(
    weight: torch.Tensor, device: torch.device, activations_from: torch.Tensor | None = None
) -> torch.Tensor:
    """A packed weight with the scales of its int8 rows, 4 bytes each, which it keeps wherever it goes.

    Args:
        weight: one that `can_be_int8`.
        device: where the scales are found, in one pass.
        activations_from: the weight by whose rows the sizes of its input's channels can be told, if there is one: where
            some stand out, its columns are smoothed, with 4 bytes each.

    Raises:
        RuntimeError: on a GPU where Triton does not work.
    """
    packed, quant_type = weight._qdata.to(device), QUANT_TYPES[weight._params.quant_type]
    smoothing = None
    if activations_from is not None and is_packed(activations_from):
        sizes, _ = _norms(activations_from, device)
        smoothing = int8.smoothing_of(sizes, _norms(weight, device)[1])
    scales = int8.row_scales(packed, quant_type, smoothing)
    return with_scales(weight, *(None if x is None else x.to(weight.device) for x in (scales, smoothing)))


def _norms(weight: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return int8.norms(weight._qdata.to(device), QUANT_TYPES[weight._params.quant_type])


def int8_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``input @ weight.T + bias`` in int8 where the weight has row scales, else as `layout.linear` has it.

    Few rows of input and whatever needs a gradient are multiplied exactly.
    """
    if not is_packed(weight) or weight._params.scale is None or torch.is_grad_enabled():
        return linear(input, weight, bias)
    params = weight._params
    quant_type = QUANT_TYPES[params.quant_type]
    return packed_int8_linear(input, weight._qdata, quant_type, params.scale, params.smoothing, bias)


def packed_int8_linear(
    input: torch.Tensor,
    packed: torch.Tensor,
    quant_type: QuantType,
    scales: torch.Tensor,
    smoothing: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``input @ dequantize(packed).T + bias``, of int8 activations and weights; under torch.compile one operator.

    Args:
        input: ``(…, in_features)``, float32, bfloat16 or float16.
        packed: ``(out_features, row_bytes) uint8`` on ``input``'s device.
        quant_type: the type of ``packed``.
        scales: ``(out_features,) float32``, those of `int8.row_scales`.
        smoothing: ``(in_features,) float32``, as `int8.row_scales` was given it; or None.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(…, out_features)`` in ``input``'s dtype.
    """
    if torch.compiler.is_compiling():
        return _int8_linear_operator(input, packed, quant_type.name, scales, smoothing, bias)
    return _computed(input, packed, quant_type, scales, smoothing, bias)


def _computed(input, packed, quant_type, scales, smoothing, bias, *, reuse_buffer=True):
    if input.numel() <= int8.FEW_ROWS * input.shape[-1]:
        return packed_linear(input, packed, quant_type, bias)
    if input.device.type == "cpu":
        return int8.linear_on_cpu(input, packed, quant_type, scales, smoothing, bias)
    return _by_comfy_kitchen(input, packed, quant_type, scales, smoothing, bias, reuse_buffer=reuse_buffer)


def _by_comfy_kitchen(input, packed, quant_type, scales, smoothing, bias, *, reuse_buffer=True):
    weight = int8.int8_weight(packed, quant_type, scales, smoothing, reuse_buffer=reuse_buffer)
    return _product(int8.smoothed(input, smoothing), weight, scales, bias)


def _product(input, weight, scales, bias):
    return comfy_kitchen.int8_linear(
        input, weight, scales, bias, input.dtype, convrot=True, convrot_groupsize=int8.GROUP
    )


@torch.library.custom_op(
    "auraflow_gguf::int8_linear",
    mutates_args=(),
    schema="(Tensor input, Tensor packed, str quant_type, Tensor scales, Tensor? smoothing, Tensor? bias) -> Tensor",
)
def _int8_linear_operator(input, packed, quant_type, scales, smoothing, bias):
    # As with the exact operator: the compiler may run this while it records a CUDA graph.
    return _computed(input, packed, QUANT_TYPES[quant_type], scales, smoothing, bias, reuse_buffer=False)


@_int8_linear_operator.register_fake
def _(input, packed, quant_type, scales, smoothing, bias):
    return input.new_empty(*input.shape[:-1], packed.shape[0])
