"""Linears and embeddings whose weight stays in ggml's blocks, as modules of torch that any library takes for its own.

The blocks are a parameter of plain bytes: what moves, offloads, counts or copies modules (torch, accelerate, diffusers)
needs to know nothing of them, and a change of dtype leaves them alone. ``weight`` is the same blocks as a packed
tensor, with the logical shape and the dtype that is computed in, for who asks for these (transformers' T5, PEFT).
"""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..kernels import packed_linear
from ..quant_types import QUANT_TYPES
from ..weights.layout import is_packed, pack


class _ReadOnly(QuantizedTensor):
    """A packed weight as it is shown. Whatever is written into it would be lost with it: it is made for each look."""

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise TypeError(
            "The weight is packed, and nothing can be merged into it. An adapter of PEFT works beside it as it is; to "
            "have it in a file, merge it before the model is converted."
        )


class _Packed:
    """A module with the parameters ``packed`` ``(rows, row_bytes) uint8`` and ``bias``, and a dtype to compute in."""

    def _hold(self, weight: QuantizedTensor) -> None:
        self.packed = torch.nn.Parameter(weight._qdata, requires_grad=False)
        self.quant_type = QUANT_TYPES[weight._params.quant_type]
        self.logical_shape = tuple(weight.shape)
        self.compute_dtype = weight.dtype

    @property
    def weight(self) -> QuantizedTensor:
        """``logical_shape`` in ``compute_dtype``; the bytes are those of ``packed``."""
        weight = pack(self.packed.data, self.quant_type.name, self.logical_shape, self.compute_dtype)
        if torch.compiler.is_compiling():  # which knows no class of tensors but the layout's own
            return weight
        return _ReadOnly(weight._qdata, weight._layout_cls, weight._params)

    def __setattr__(self, name: str, value: object) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif is_packed(value):
            self._hold(value)
        else:
            raise TypeError(f"{type(self).__name__} holds a packed weight, not a {type(value).__name__}.")

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self


class PackedLinear(_Packed, torch.nn.Linear):
    """A linear; ``weight`` is ``(out_features, in_features)``. Computes in the input's dtype."""

    def __init__(self, weight: QuantizedTensor, bias: torch.Tensor | None):
        torch.nn.Module.__init__(self)
        self._hold(weight)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias, requires_grad=False))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return packed_linear(input, self.packed, self.quant_type, self.bias)


class PackedEmbedding(_Packed, torch.nn.Embedding):
    """An embedding, which dequantizes the rows that it looks up; ``weight`` is ``(num_embeddings, embedding_dim)``."""

    def __init__(self, weight: QuantizedTensor):
        torch.nn.Module.__init__(self)
        self._hold(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.embedding(input, self.packed)
        return self.quant_type.dequantize(rows.flatten(0, -2), self.compute_dtype).view(
            *input.shape, self.embedding_dim
        )


def fill(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give a model that is on the device meta its weights, which may be packed, by the model's names for them.

    The bias of a linear exists exactly when ``weights`` has it.
    """
    for name, weight in weights.items():
        path, _, last = name.rpartition(".")
        if not is_packed(weight):
            model.get_submodule(path).register_parameter(last, torch.nn.Parameter(weight, requires_grad=False))
            continue
        embedding = isinstance(model.get_submodule(path), torch.nn.Embedding)
        packed = PackedEmbedding(weight) if embedding else PackedLinear(weight, weights.get(f"{path}.bias"))
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)


def dense_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A filled model's state dict with its weights dense, under the names that they have without packing."""
    dense = {}
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, _Packed) and last == "packed":
            dense[f"{path}.weight"] = module.weight.dequantize()
        else:
            dense[name] = tensor
    return dense
