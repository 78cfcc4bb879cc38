"""A checkpoint copied into a GGUF file as it is: the transformer runs on a file that is mapped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ...loader.files.auraflow import AURAFLOW
from ...loader.files.errors import ModelFileError
from ...loader.files.matching import match
from ..checkpoints import Checkpoint
from ..convert import convert_checkpoint, planned_size
from ..recipe import Recipe

NAME = "copy"  # of the model in it; the bytes are to depend on the weights alone


def copy_as_it_is(checkpoint: Checkpoint, target: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write ``target``, of the tensors of a transformer of any width, each in the type that holds it as it is.

    Args:
        checkpoint: the transformer's.
        target: the file; not there yet.
        progress: called with the number of weights written so far and in all.
    """
    convert_checkpoint(checkpoint, target, _recipe(checkpoint), name=NAME, progress=progress, fixed={})
    return target


def copy_size(checkpoint: Checkpoint) -> int:
    """Bytes of that file."""
    return planned_size(checkpoint, _recipe(checkpoint), name=NAME, fixed={})


def check_room(folder: str | os.PathLike, wanted: Mapping[str, int], advice: str) -> None:
    """Check the free space of a folder's disk.

    Args:
        folder: where something is to be written.
        wanted: bytes, by what they are for.
        advice: what to do if there is too little.
    """
    free = shutil.disk_usage(folder).free
    if free < sum(wanted.values()):
        raise ModelFileError(
            folder,
            found=f"{free / 1e9:.2f} GB free",
            expected=" and ".join(f"{size / 1e9:.2f} GB for {what}" for what, size in wanted.items()),
            advice=advice,
        )


def _recipe(checkpoint: Checkpoint) -> Recipe:
    found = match(AURAFLOW, checkpoint.shapes, metadata=checkpoint.metadata, path=checkpoint.path, fixed={})
    types = {native: checkpoint.exact_type(source.name) for native, source in found.weights.items()}
    return Recipe("copy", 0, tuple((native.removesuffix(".weight"), name) for native, name in types.items()))
