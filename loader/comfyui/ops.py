"""The operations class that puts packed linears and embeddings into ComfyUI's models, bias optional."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.ops import cast_bias_weight, manual_cast, uncast_bias_weight

from ..kernels import packed_linear
from ..quant_types import QUANT_TYPES
from ..weights.int8_linear import int8_linear, packed_int8_linear
from ..weights.layout import is_packed, linear
from .low_rank import LowRank


class Int8Products:
    """Whether a model's linears of its type multiply in int8; one for all of them.

    Attributes:
        on: False while something needs the exact products.
    """

    def __init__(self):
        self.on = True


class _FromFile:
    """A module that owns nothing until the file's tensors are handed to it.

    The weight may be packed or dense. The bias exists exactly when the state dict holds one.
    """

    def _own_nothing(self, dtype: torch.dtype | None) -> None:
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.low_rank: LowRank | None = None
        self.int8: Int8Products | None = None  # where the weight has the scales of its int8 rows
        self.stays_mapped = False  # on no device: each use takes the weight from where the file is mapped
        # What ComfyUI's dynamic VRAM casts a dense parameter to.
        self.weight_comfy_model_dtype = dtype
        self.bias_comfy_model_dtype = dtype

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        bias = state_dict.get(prefix + "bias")
        if bias is not None:
            self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def convert_weight(self, weight, inplace=False):
        """The dense form of the weight, which ComfyUI's patcher asks for before it patches or merges."""
        return weight.dequantize() if is_packed(weight) else weight

    def _apply(self, fn, recurse=True):
        if self.stays_mapped:
            return self
        # nn.Module assigns `param.data`, which changes what a packed tensor shows, not what it holds.
        for name, param in self._parameters.items():
            if param is not None:
                self._parameters[name] = _moved(param, fn)
        return self


def original_in_map(param: torch.nn.Parameter) -> torch.nn.Parameter | None:
    """Of a parameter that is a copy in other memory, the one that lies in its file's map."""
    return getattr(param, "original_in_map", None)


def is_in_map(weight: torch.Tensor) -> bool:
    """Whether a weight is a view on its file's map."""
    held = weight._qdata if is_packed(weight) else weight
    storage = held.untyped_storage()
    alone = hasattr(storage, "_comfy_tensor_file_slice")  # file_reader.py
    return held.device.type == "cpu" and (alone or storage.nbytes() > held.nbytes)


def _moved(param: torch.nn.Parameter, move: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Parameter:
    """A parameter moved, from its file's map to a device, or back: then it is the map's again, and no copy is made."""
    origin = param if is_in_map(param) else original_in_map(param)
    if origin is not None and origin is not param:
        to = move(torch.empty(0, dtype=param.dtype, device=param.device))
        if (to.device, to.dtype) == (origin.device, origin.dtype):
            return origin
    result = torch.nn.Parameter(move(param), requires_grad=False)
    if origin is not None and result.device != origin.device and result.dtype == origin.dtype:
        result.original_in_map = origin
    return result


class GGUFOps(manual_cast):
    """ComfyUI's operations, with a Linear and an Embedding that take their tensors from the file.

    Everything else is inherited: casting, offloading, streams, weight functions.
    """

    class Linear(_FromFile, manual_cast.Linear):
        """A linear whose bias exists when the file holds one, whatever the ``bias`` argument says."""

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features = in_features
            self.out_features = out_features
            self._own_nothing(dtype)

        def forward_comfy_cast_weights(self, input):
            in_int8 = self.int8 is not None and self.int8.on and not torch.is_grad_enabled()
            taken_apart = torch.compiler.is_compiling() or (torch.is_grad_enabled() and input.requires_grad)
            if taken_apart and self._is_at_hand():
                output = self._by_itself(input, in_int8)
            else:
                output = self._cast(input, int8_linear if in_int8 else linear)
            return output if self.low_rank is None else self.low_rank.add_to(output, input)

        def _is_at_hand(self):
            """Whether the weight is packed, unpatched, and not where dynamic VRAM has it (_v)."""
            return is_packed(self.weight) and not (self.weight_function or self.bias_function or hasattr(self, "_v"))

        def _by_itself(self, input, in_int8):
            """The same for torch.compile and autograd, which take torch's linear apart before a packed one answers."""
            bias = None if self.bias is None else self.bias.to(input.device, input.dtype)
            packed, params = self.weight._qdata.to(input.device), self.weight._params
            if in_int8 and params.scale is not None:
                params = params.to_device(input.device)
                return packed_int8_linear(
                    input, packed, QUANT_TYPES[params.quant_type], params.scale, params.smoothing, bias
                )
            return packed_linear(input, packed, QUANT_TYPES[params.quant_type], bias)

        def _cast(self, input, product):
            weight, bias, stream = cast_bias_weight(self, input, offloadable=True)
            try:
                return product(input, weight, bias)
            finally:
                uncast_bias_weight(self, weight, bias, stream)

    class Embedding(_FromFile, manual_cast.Embedding):
        """An embedding that dequantizes the rows that it looks up, and no others, unless it is patched."""

        def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.num_embeddings = num_embeddings
            self.embedding_dim = embedding_dim
            self.padding_idx = self.max_norm = None
            self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
            self._own_nothing(dtype)

        def forward_comfy_cast_weights(self, input, out_dtype=None):
            output = super().forward_comfy_cast_weights(input, out_dtype)
            return output if self.low_rank is None else self.low_rank.add_rows_to(output, input)
