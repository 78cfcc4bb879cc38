"""The matrix product on a GPU: one Triton launch dequantizes the weight, or multiplies it at once for few rows.

Where Triton is missing (Windows without it, Apple) or does not work (a version before 3.3, old GPUs, no C compiler),
torch dequantizes, in several passes: the same numbers. That is said once. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable

import torch

from ..quant_types import STORED_DTYPES, QuantType

logger = logging.getLogger(__name__)

# Where Triton runs: NVIDIA's and AMD's GPUs, Intel's, and its interpreter on the CPU.
_TRITON_DEVICES = ("cuda", "xpu", "cpu")

MAX_KEPT_BYTES = 64 << 20  # an MLP's weight in 16 bit takes 50 MB
WEIGHTS_IN_TORCH = 1 << 24  # that torch dequantizes at a time

_buffers = threading.local()
_without_triton: set[torch.device] = set()


def linear(
    input: torch.Tensor,
    packed: torch.Tensor,
    quant_type: QuantType,
    bias: torch.Tensor | None,
    *,
    reuse_buffer: bool = True,
) -> torch.Tensor:
    """``input @ dequantize(packed).T + bias``.

    Args:
        input: ``(…, in_features)``, float32, float16 or bfloat16.
        packed: ``(out_features, row_bytes) uint8`` on ``input``'s device.
        bias: ``(out_features,)`` or None.
        reuse_buffer: whether the dense weight may be written where the last one was.

    Returns:
        ``(…, out_features)`` in ``input``'s dtype.
    """
    reuse_buffer = reuse_buffer and not _is_captured(input.device)
    with _current(input.device):
        kernels = _kernels(quant_type, input.device)
        x = input.reshape(-1, input.shape[-1])
        if kernels and 0 < len(x) <= kernels.FEW_ROWS:
            out = x.new_empty(len(x), len(packed))
            multiply = functools.partial(
                kernels.linear_into, out, x.contiguous(), packed.contiguous(), quant_type, bias
            )
            if _launched(multiply, input.device):
                return out.view(*input.shape[:-1], len(packed))
        weight = _dense(packed, quant_type, input.dtype, _buffer if reuse_buffer else torch.empty)
        return torch.nn.functional.linear(input, weight, bias)


def input_gradient(
    gradient: torch.Tensor, packed: torch.Tensor, quant_type: QuantType, *, reuse_buffer: bool = True
) -> torch.Tensor:
    """``gradient @ dequantize(packed)``, the gradient of `linear`'s input.

    Args:
        gradient: ``(…, out_features)``, float32, float16 or bfloat16; of `linear`'s output.
        packed: ``(out_features, row_bytes) uint8`` on its device.
        reuse_buffer: as `linear` takes it.

    Returns:
        ``(…, in_features)`` in ``gradient``'s dtype.
    """
    reuse_buffer = reuse_buffer and not _is_captured(gradient.device)
    with _current(gradient.device):
        return gradient @ _dense(packed, quant_type, gradient.dtype, _buffer if reuse_buffer else torch.empty)


def dequantize(packed: torch.Tensor, quant_type: QuantType, dtype: torch.dtype) -> torch.Tensor:
    """``QuantType.dequantize``, bit by bit the same, in one launch where Triton works.

    Args:
        packed: ``(rows, row_bytes) uint8`` on a GPU.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``(rows, columns)``; shares ``packed``'s memory where that holds numbers of ``dtype``.
    """
    with _current(packed.device):
        return _dense(packed, quant_type, dtype, torch.empty)


def has_triton(device: torch.device) -> bool:
    """Whether Triton may be tried on a device; whether it works there, its first launch says."""
    return device.type in _TRITON_DEVICES and device not in _without_triton and _triton_kernels() is not None


def group_maxima(packed: torch.Tensor, quant_type: QuantType, smoothing: torch.Tensor | None = None) -> torch.Tensor:
    """The largest magnitude of each group of 256 neighbours after rotation, see ``int8``.

    Args:
        packed: ``(rows, row_bytes) uint8`` on a GPU, rows of whole groups.
        smoothing: ``(columns,) float32`` on its device, by which the columns are multiplied first; or None.

    Returns:
        ``(rows, groups) float32``.

    Raises:
        RuntimeError: Triton does not work on the device.
    """
    groups = quant_type.columns(packed.shape[1]) // 256
    out = torch.empty(len(packed), groups, dtype=torch.float32, device=packed.device)
    _launch_rotation(out, packed, quant_type, None, smoothing)
    return out


def int8_weight(
    packed: torch.Tensor,
    quant_type: QuantType,
    scales: torch.Tensor,
    smoothing: torch.Tensor | None = None,
    *,
    reuse_buffer: bool = True,
) -> torch.Tensor:
    """``(rows, columns) int8``: the rotated weight in steps of its rows' scales, in one launch.

    Args:
        packed: ``(rows, row_bytes) uint8`` on a GPU, rows of whole groups of 256.
        scales: ``(rows,) float32`` on its device.
        smoothing: as `group_maxima` was given it.
        reuse_buffer: whether it may be written where the last dense weight was.

    Raises:
        RuntimeError: Triton does not work on the device.
    """
    new = _buffer if reuse_buffer and not _is_captured(packed.device) else torch.empty
    columns = quant_type.columns(packed.shape[1])
    out = new((len(packed), columns), dtype=torch.int8, device=packed.device)
    _launch_rotation(out, packed, quant_type, scales, smoothing)
    return out


def _launch_rotation(
    out: torch.Tensor,
    packed: torch.Tensor,
    quant_type: QuantType,
    scales: torch.Tensor | None,
    smoothing: torch.Tensor | None,
) -> None:
    with _current(packed.device):
        kernels = _kernels(quant_type, packed.device)
        launch = kernels and functools.partial(
            kernels.rotate_into, out, packed.contiguous(), quant_type, scales, smoothing
        )
        if not (launch and _launched(launch, packed.device)):
            raise RuntimeError(f"Triton does not work on {packed.device}, and int8 products need it there.")


def _dense(
    packed: torch.Tensor, quant_type: QuantType, dtype: torch.dtype, new: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """``(rows, columns)``, in memory that ``new(shape, dtype=, device=)`` gives where Triton writes it."""
    if stored := STORED_DTYPES.get(quant_type.name):
        return packed.view(stored).to(dtype)
    if kernels := _kernels(quant_type, packed.device):
        columns = quant_type.columns(packed.shape[1])
        out = new((len(packed), columns), dtype=dtype, device=packed.device)
        unpack = functools.partial(kernels.dequantize_into, out, packed.contiguous(), quant_type)
        if _launched(unpack, packed.device):
            return out
    return _dense_in_torch(packed, quant_type, dtype)


def _dense_in_torch(packed: torch.Tensor, quant_type: QuantType, dtype: torch.dtype) -> torch.Tensor:
    """The same, some rows at a time: what torch's passes need between is several times as large as their result."""
    columns = quant_type.columns(packed.shape[1])
    rows = max(1, WEIGHTS_IN_TORCH // columns)
    if rows >= len(packed):
        return quant_type.dequantize(packed, dtype)
    out = torch.empty(len(packed), columns, dtype=dtype, device=packed.device)
    for some, place in zip(packed.split(rows), out.split(rows), strict=True):
        place.copy_(quant_type.dequantize(some, dtype))
    return out


def _buffer(shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for one dense weight, kept for each stream of this thread, as large as the largest weight so far, but for
    those of modulation, which are seldom used.

    What a stream has been given before to read from it is done before the same stream writes it again.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    if size > MAX_KEPT_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    kept = _buffers.__dict__.setdefault("by_stream", {})
    stream = getattr(torch, device.type).current_stream(device)
    if stream not in kept or kept[stream].numel() < size:
        kept.pop(stream, None)
        kept[stream] = torch.empty(size, dtype=torch.uint8, device=device)
    return kept[stream][:size].view(dtype).view(shape)


def _kernels(quant_type: QuantType, device: torch.device):
    """The module ``triton_kernels``, or None where it cannot be used."""
    if device.type not in _TRITON_DEVICES or device in _without_triton:
        return None
    kernels = _triton_kernels()
    return kernels if kernels and quant_type.name in kernels.FORMULAS else None


@functools.cache
def _triton_kernels():
    try:
        from . import triton_kernels
    except ImportError as error:
        logger.info("Triton is not installed (%s): torch dequantizes GGUF weights, which takes longer", error)
        return None
    return triton_kernels


def _launched(launch: Callable[[], None], device: torch.device) -> bool:
    """Whether a launch was possible. The first that is not, is the last on its device.

    Triton, its compilers and the driver each have exceptions of their own. A device whose memory is full is not one
    where Triton does not work: ComfyUI frees some and tries again.
    """
    try:
        launch()
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        _without_triton.add(device)
        logger.warning(
            "Triton %s does not work on %s: torch dequantizes GGUF weights there, which takes longer. %s: %s",
            _triton_kernels().triton.__version__,
            device,
            type(error).__name__,
            error,
        )
        return False
    return True


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes ``device`` the current one, on which Triton launches."""
    return getattr(torch, device.type).device(device) if device.type in ("cuda", "xpu") else contextlib.nullcontext()


def _is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is recorded, whose memory must be its own."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
