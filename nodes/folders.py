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
    extra_model_paths.yaml have registered under the same keys.

    Folders may be added at any time: the functions below see to it that those of now are known.
    """
    for key, folder in _GGUF_FOLDERS.items():
        known, extensions = folder_paths.folder_names_and_paths.get(key, ([], set()))
        paths = list(dict.fromkeys([*known, *folder_paths.get_folder_paths(folder)]))
        folder_paths.folder_names_and_paths[key] = (paths, {*extensions, ".gguf"})


def file_names(folder: str) -> list[str]:
    """The files in a folder of models, by ComfyUI's key of it, subfolders included."""
    register_gguf_folders()
    return folder_paths.get_filename_list(folder)


def full_path(folder: str, name: str) -> str:
    """Where the file is that the value of an input means.

    Raises:
        FileNotFoundError: it is in none of the folder's paths.
    """
    register_gguf_folders()
    return folder_paths.get_full_path_or_raise(folder, name)


def fingerprint(folder: str, name: str) -> str:
    """Path, size and modification time of a file, and of all parts of a split one: what changes when it is replaced."""
    try:
        path = full_path(folder, name)
    except FileNotFoundError:
        return f"{name}: missing"
    pattern = re.sub(r"-\d{5}(-of-\d{5}\.\w+)$", r"-[0-9][0-9][0-9][0-9][0-9]\1", glob.escape(path))
    stats = {part: os.stat(part) for part in sorted({path, *glob.glob(pattern)})}
    return " ".join(f"{part} {stat.st_size} {stat.st_mtime_ns}" for part, stat in stats.items())
