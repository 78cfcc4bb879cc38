"""Where ComfyUI finds GGUF files, and which file a node's input means."""

from __future__ import annotations

import glob
import os
import re

import folder_paths

MODEL_FOLDER = "unet_gguf"
TEXT_ENCODER_FOLDER = "clip_gguf"

# The keys that GGUF packs agree on, over ComfyUI's own folders.
_GGUF_FOLDERS = {MODEL_FOLDER: "diffusion_models", TEXT_ENCODER_FOLDER: "text_encoders"}


def register_gguf_folders() -> None:
    """Make ``.gguf`` files of ComfyUI's model folders known, keeping what other packs and
    extra_model_paths.yaml have registered under the same keys."""
    for key, folder in _GGUF_FOLDERS.items():
        known, extensions = folder_paths.folder_names_and_paths.get(key, ([], set()))
        paths = list(dict.fromkeys([*known, *folder_paths.get_folder_paths(folder)]))
        folder_paths.folder_names_and_paths[key] = (paths, {*extensions, ".gguf"})


def fingerprint(folder: str, name: str) -> str:
    """Path, size and modification time of a file, and of all parts of a split one: what changes when it is replaced."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        return f"{name}: missing"
    pattern = re.sub(r"-\d{5}(-of-\d{5}\.\w+)$", r"-[0-9][0-9][0-9][0-9][0-9]\1", glob.escape(path))
    stats = {part: os.stat(part) for part in sorted({path, *glob.glob(pattern)})}
    return " ".join(f"{part} {stat.st_size} {stat.st_mtime_ns}" for part, stat in stats.items())
