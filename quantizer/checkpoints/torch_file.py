"""Files of ``torch.save``, mapped by torch's own reader."""

from __future__ import annotations

import pickle

import torch

from ...loader.files.errors import ModelFileError
from .checkpoint import Checkpoint


class TorchCheckpoint(Checkpoint):
    """A ``torch.save`` file, its state dict plain or under ``state_dict`` or ``model``; no code in it is run."""

    def __init__(self, path: str):
        self.path = path
        self.files = (path,)
        self.metadata = {}
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ModelFileError(
                path,
                found=f"what torch.load refuses ({str(error).splitlines()[0]})",
                expected="a torch.save file of tensors alone, complete, written by torch 1.6 or newer",
                advice="Download it again, or get it as safetensors.",
            ) from error
        except ValueError as error:  # an empty file cannot be mapped
            raise ModelFileError(
                path, found="an empty file", expected="a torch.save file", advice="Download it again."
            ) from error
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        tensors = content.items() if isinstance(content, dict) else ()
        self._tensors = {name: t for name, t in tensors if isinstance(name, str) and isinstance(t, torch.Tensor)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()
