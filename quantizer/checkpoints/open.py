"""Which file a source means, and its reader."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...loader.files.errors import ModelFileError
from .checkpoint import Checkpoint
from .gguf import GGUFCheckpoint
from .safetensors import SafetensorsCheckpoint
from .scaled_fp8 import ScaledFP8Checkpoint
from .torch_file import TorchCheckpoint

# model-00001-of-00003.safetensors; of a variant model.fp16-00001-of-00003.safetensors (diffusers) or
# model-00001-of-00003.fp16.safetensors (older ones)
_SHARD = re.compile(
    r"(?P<model>.+?)(?P<variant>\.\w+)?-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<older>\.\w+)?\.safetensors"
)


def open_checkpoint(source: str | os.PathLike, part: str | None = None) -> Checkpoint:
    """Open a safetensors file, the index of a sharded one or one of its shards, a diffusers model folder (of which
    ``part``, the transformer by default, is taken), a ``.ckpt`` or ``.pt`` file, or a GGUF file.

    Raises:
        ModelFileError: ``source`` is none of these, is damaged, or a part of it is missing.
    """
    path = Path(source)
    if path.is_dir():
        path = _in_folder(path, part or "transformer")
    if not path.is_file():
        raise ModelFileError(
            source, found="no such file", expected="a checkpoint", advice="Check the path and its spelling."
        )
    name = path.name.lower()
    if name.endswith(".gguf"):
        return GGUFCheckpoint(str(path))
    if name.endswith((".ckpt", ".pt", ".pth", ".bin")):
        return ScaledFP8Checkpoint(TorchCheckpoint(str(path)))
    if name.endswith((".safetensors", ".sft")):
        path = _index_of_shard(path)
    elif not re.search(r"\.safetensors\.index(\.\w+)?\.json$", name):
        raise ModelFileError(
            path,
            found=f"the ending {path.suffix!r}",
            expected=".safetensors, .safetensors.index.json, .gguf, .ckpt, .pt, .pth, .bin, or a diffusers folder",
            advice="Give the file the ending of its format, or choose another file.",
        )
    return ScaledFP8Checkpoint(SafetensorsCheckpoint(str(path)))


def _in_folder(folder: Path, part: str) -> Path:
    """The one checkpoint of a diffusers model folder, or of the folder in it that is called like the part."""
    if (folder / part).is_dir():
        folder = folder / part
    for pattern in ("*.safetensors.index*.json", "*.safetensors", "*.bin"):
        candidates = sorted(folder.glob(pattern))
        # beside variants (diffusion_pytorch_model.fp16.safetensors), the plain one
        ending = pattern.replace("*", "")
        plain = [path for path in candidates if path.name in (f"diffusion_pytorch_model{ending}", f"model{ending}")]
        if len(candidates) == 1 or plain:
            return plain[0] if plain else candidates[0]
        if candidates:
            _index_of_shard(candidates[0])  # says so, if they are parts without their index
            raise ModelFileError(
                folder,
                found=f"several checkpoints: {', '.join(path.name for path in candidates)}",
                expected="one",
                advice="Name the file to be converted.",
            )
    raise ModelFileError(
        folder,
        found="a folder without a safetensors or .bin file",
        expected="a diffusers model folder, or its transformer or text_encoder folder",
        advice="Choose the folder that has model_index.json, or the checkpoint file itself.",
    )


def _index_of_shard(path: Path) -> Path:
    """The index of the checkpoint that a file is a part of; of a whole one the file itself."""
    shard = _SHARD.fullmatch(path.name)
    if not shard:
        return path
    model, variant = shard["model"], shard["variant"] or ""
    names = (
        f"{model}.safetensors.index{variant or shard['older'] or ''}.json",
        f"{model}{variant}.safetensors.index.json",  # a point in the model's own name
    )
    index = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if index is None and int(shard["count"]) == 1:
        return path
    if index is None:
        raise ModelFileError(
            path,
            found=f"part {int(shard['number'])} of {int(shard['count'])}, and no index of the parts",
            expected=f"{names[0]} beside it",
            advice="Download the index and all parts into one folder.",
        )
    return index
