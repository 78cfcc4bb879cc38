"""Weights that ComfyUI's dynamic VRAM reads from their file by its own reader, as it does those of safetensors files.

What is only mapped comes into memory page by page, when it is copied. ComfyUI's reader reads a whole weight at once,
into page-locked memory or to the device. It takes tensors that are alone in their storage, on which it looks for a
``TensorFileSlice``: see ``comfy.utils.load_safetensors``. ComfyUI 0.16 has no such reader.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping

import comfy.memory_management
import torch

from ..files.errors import ModelFileError
from ..files.gguf_file import GGUFFile, TensorInfo
from ..files.matching import Match
from ..weights.layout import is_packed
from .ops import is_in_map


def readable(
    weights: Mapping[str, torch.Tensor], file: GGUFFile, matched: Match, disable_dynamic: bool
) -> dict[str, torch.Tensor]:
    """A file's weights, for ComfyUI's reader where it has one and dynamic VRAM is on; else as they are.

    Args:
        weights: what ``state_dict(file, matched, …)`` gives.
        disable_dynamic: whether the model that they are for does without.

    Raises:
        ModelFileError: the file has become smaller since it was opened.
    """
    dynamic = comfy.memory_management.aimdo_enabled and not disable_dynamic
    if not dynamic or not hasattr(comfy.memory_management, "TensorFileSlice"):
        return dict(weights)
    maps: dict[int, _Map] = {}
    result = {}
    for name, weight in weights.items():
        info = file.tensors[matched.weights[name].name]
        if is_in_map(weight):
            if info.part not in maps:
                maps[info.part] = _Map(*file.part(info))
            weight = maps[info.part].take(weight, info)
        result[name] = weight
    return result


class _Map:
    """A file, mapped by comfy-aimdo, which also holds it open."""

    def __init__(self, path: str, size: int):
        from comfy_aimdo.model_mmap import ModelMMAP

        self.map = ModelMMAP(path)
        if os.path.getsize(path) < size:
            raise ModelFileError(
                path,
                found="that it has become smaller",
                expected=f"the {size:,} bytes it had when it was opened",
                advice="Leave the file in place while the model is in use, and load it again.",
            )
        self.bytes = memoryview((ctypes.c_uint8 * size).from_address(self.map.get()))
        self.lock = threading.Lock()

    def take(self, weight: torch.Tensor, info: TensorInfo) -> torch.Tensor:
        """The weight in this map, alone in its storage."""
        piece = torch.frombuffer(self.bytes[info.offset : info.offset + info.nbytes], dtype=torch.uint8)
        storage = piece.untyped_storage()
        storage._comfy_tensor_file_slice = comfy.memory_management.TensorFileSlice(
            self.map.get_file_handle(), self.lock, info.offset, info.nbytes
        )
        storage._comfy_tensor_mmap_refs = self.map, self.bytes
        if is_packed(weight):
            return weight._copy_with(qdata=piece.view_as(weight._qdata))
        return piece.view(weight.dtype).view_as(weight)
