"""The comfy-kitchen layout of a packed GGUF weight: a tensor whose bytes are ggml's blocks.

Storage
    ``_qdata`` is ``(out_features, row_bytes) uint8``: each row of the weight as its blocks, in the file's
    order. Rows are independent, so a slice of rows is a packed weight again.
Parameters
    ``quant_type`` names the entry of ``QUANT_TYPES`` that holds the formula. ``orig_dtype`` is the
    compute type: a weight whose dtype is that of the input is multiplied as it is, without a dense copy.
    GGUF blocks hold their own scales: ``scale`` is None, and only ``_qdata`` moves between devices; or it is those of
    the rows in int8 (``int8_linear.py``), ``(out_features,) float32``, beside which ``smoothing`` may be that of the
    columns, ``(in_features,) float32``. Both move with the weight and change none of its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class, register_layout_op
from comfy_kitchen.tensor.base import BaseLayoutParams

from ..kernels import dense_linear, dequantize, packed_linear
from ..quant_types import QUANT_TYPES

LAYOUT_NAME = "AuraFlowGGUFLayout"


@dataclass(frozen=True)
class GGUFParams(BaseLayoutParams):
    """Parameters of a packed weight; ``quant_type`` is ggml's name, e.g. ``"Q4_K"``."""

    quant_type: str = ""
    smoothing: torch.Tensor | None = None

    def _tensor_fields(self) -> list[str]:
        return [name for name in ("scale", "smoothing") if getattr(self, name) is not None]


class GGUFLayout(QuantizedLayout):
    """Rows of ggml blocks, dequantized by ``QUANT_TYPES[params.quant_type]``."""

    Params = GGUFParams

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs):
        raise TypeError(
            "a GGUF weight is not packed again while a model is loaded; "
            "make a new file with `auraflow-gguf convert` instead"
        )

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: GGUFParams) -> torch.Tensor:
        """``(out, row_bytes) uint8`` → ``orig_shape`` in ``orig_dtype``, on the same device."""
        return dequantize(qdata, QUANT_TYPES[params.quant_type], params.orig_dtype).reshape(params.orig_shape)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: GGUFParams) -> dict[str, torch.Tensor]:
        """What a saved checkpoint holds: the dense weight, under the weight's own name."""
        return {"": cls.dequantize(qdata, params)}


register_layout_class(LAYOUT_NAME, GGUFLayout)


@register_layout_op(torch.ops.aten.linear.default, GGUFLayout)
def _linear(_, args, kwargs) -> torch.Tensor:
    return linear(*args, **kwargs)


@register_layout_op(torch.ops.aten.embedding.default, GGUFLayout)
def _embedding(_, args, kwargs) -> torch.Tensor:
    return _look_up(*args, **kwargs)


def _look_up(weight: QuantizedTensor, indices: torch.Tensor, *options) -> torch.Tensor:
    """The rows at ``indices`` ``(…)``, dequantized, ``(…, columns)``; the options are about gradients alone."""
    params = weight._params
    rows = torch.nn.functional.embedding(indices, weight._qdata)
    return QUANT_TYPES[params.quant_type].dequantize(rows, params.orig_dtype)


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``input @ weight.T + bias`` of a weight that may be packed or dense."""
    if not is_packed(weight):
        return dense_linear(input, weight, bias)
    return packed_linear(input, weight._qdata, QUANT_TYPES[weight._params.quant_type], bias)


def pack(qdata: torch.Tensor, quant_type: str, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
    """A packed weight as a tensor.

    Args:
        qdata: ``(nbytes,)`` or ``(rows, row_bytes) uint8``, the blocks; kept as a view, not copied.
        quant_type: ggml's name of the type.
        shape: logical shape; the last dimension is a row.
        dtype: compute type, the dtype that the tensor shows.
    """
    row_bytes = QUANT_TYPES[quant_type].row_bytes(shape[-1])
    params = GGUFParams(scale=None, orig_dtype=dtype, orig_shape=tuple(shape), quant_type=quant_type)
    return QuantizedTensor(qdata.reshape(-1, row_bytes), LAYOUT_NAME, params)


def with_scales(
    weight: QuantizedTensor, scales: torch.Tensor, smoothing: torch.Tensor | None = None
) -> QuantizedTensor:
    """A packed weight, its memory shared, with the scales of its int8 rows, and of its columns where it needs any."""
    return QuantizedTensor(weight._qdata, LAYOUT_NAME, replace(weight._params, scale=scales, smoothing=smoothing))


def is_packed(tensor: object) -> bool:
    """Whether a tensor is a GGUF weight of this layout."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT_NAME
