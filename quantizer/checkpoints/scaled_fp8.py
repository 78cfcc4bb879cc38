"""Weights in fp8 with a scale, in a file of any format."""

from __future__ import annotations

import torch

from ...loader.files.errors import ModelFileError
from .checkpoint import Checkpoint

# A scaled fp8 weight is fp8 · scale. Both generations of ComfyUI's names: x.scale_weight and x.weight_scale.
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
# What else comes with such weights, and says nothing about their values.
FP8_COMPANIONS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
# What stands beside weights of other formats: nvfp4, int4 with two levels of scales, bitsandbytes.
OTHER_COMPANIONS = (".weight_scale_2", ".weight_s_channel", ".absmax")


class ScaledFP8Checkpoint(Checkpoint):
    """Another checkpoint, its scaled fp8 weights multiplied by their scales.

    A weight with a scale is read as float32, ``fp8 · scale``, with the scale of the whole tensor (ComfyUI's
    ``float8_e4m3fn`` and ``float8_e5m2`` formats). Scales and their companions are not among ``shapes``.
    """

    def __init__(self, inner: Checkpoint):
        self._inner = inner
        other = next((name for name in inner.shapes if name.endswith(OTHER_COMPANIONS)), None)
        if other:
            raise ModelFileError(
                inner.path,
                found=f"weights in another quantized format than fp8 ({other})",
                expected="bfloat16, float16, float32 or fp8 with one scale a weight",
                advice="Convert the original checkpoint instead.",
            )
        self.path, self.files, self.metadata = inner.path, inner.files, inner.metadata
        self._scales = {
            name.removesuffix(ending) + ".weight": name
            for name in inner.shapes
            for ending in WEIGHT_SCALES
            if name.endswith(ending)
        }
        hidden = {*self._scales.values(), *(name for name in inner.shapes if name.endswith(FP8_COMPANIONS))}
        self.shapes = {name: shape for name, shape in inner.shapes.items() if name not in hidden}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._scales else self._inner.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._inner.read(name)
        if not tensor.dtype.is_floating_point:
            raise ModelFileError(
                self.path,
                found=f"{name} as {tensor.dtype}",
                expected="floating-point weights",
                advice="Convert the original checkpoint (bfloat16, float16, float32 or fp8) instead.",
            )
        if name not in self._scales:
            return tensor
        scale = self._inner.read(self._scales[name]).float()
        if scale.numel() != 1:
            raise ModelFileError(
                self.path,
                found=f"{self._scales[name]} of shape {tuple(scale.shape)}",
                expected="one scale for the whole tensor",
                advice="Convert the original checkpoint (bfloat16, float16, float32 or plain fp8) instead.",
            )
        return tensor.float().mul_(scale.reshape(()))
