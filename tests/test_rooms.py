"""Which room may import what, read from the imports: a file's way leads from room to room, and never back."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

PACK = "auraflow_gguf"
TYPES, FILES, KERNELS, WEIGHTS = "loader/quant_types", "loader/files", "loader/kernels", "loader/weights"
COMFYUI, DIFFUSERS, CHECKPOINTS = "loader/comfyui", "loader/diffusers", "quantizer/checkpoints"
QUANTIZER, QUALITY = "quantizer", "quantizer/quality"

# A room → the rooms that it may import besides itself. A module is in the innermost room whose folder it is in.
ROOMS = {
    TYPES: (),
    FILES: (TYPES,),
    KERNELS: (TYPES,),
    WEIGHTS: (TYPES, FILES, KERNELS),
    COMFYUI: (TYPES, FILES, KERNELS, WEIGHTS),
    DIFFUSERS: (TYPES, FILES, KERNELS, WEIGHTS),
    CHECKPOINTS: (TYPES, FILES),
    QUANTIZER: (TYPES, FILES, KERNELS, CHECKPOINTS),
    QUALITY: (TYPES, FILES, KERNELS, WEIGHTS, DIFFUSERS, CHECKPOINTS, QUANTIZER),
    "nodes": (TYPES, FILES, WEIGHTS, COMFYUI, CHECKPOINTS, QUANTIZER, QUALITY, "migration.py"),
    "group_nodes.py": (),
    "migration.py": (FILES, "group_nodes.py"),
    "cli.py": (FILES, "loader/kernels/native", CHECKPOINTS, QUANTIZER, QUALITY, "migration.py"),
    "__init__.py": ("nodes", DIFFUSERS),
    "loader": (),
}

# What is not ours → the rooms that may import it; the host's own modules count as comfy.
PACKAGES = {
    "comfy": (COMFYUI, "nodes"),
    "comfy_aimdo": (COMFYUI,),
    "comfy_kitchen": (WEIGHTS, DIFFUSERS),
    "diffusers": (DIFFUSERS,),
    "transformers": (DIFFUSERS,),
    "libgguf": (KERNELS, QUANTIZER),
    "triton": (KERNELS,),
    "gguf": (TYPES, QUANTIZER),
    "numpy": (KERNELS, QUANTIZER, QUALITY),
    "safetensors": (COMFYUI,),
    "sentencepiece": (QUANTIZER,),
    "threadpoolctl": (KERNELS,),
    "torch": (TYPES, FILES, KERNELS, WEIGHTS, COMFYUI, DIFFUSERS, CHECKPOINTS, QUANTIZER, QUALITY, "nodes", "cli.py"),
}
HOST = {"comfy", "comfy_api", "comfy_execution", "execution", "folder_paths", "latent_preview", "nodes", "server"}


def modules() -> list[str]:
    """The package's modules, as paths from its root."""
    folders = ("loader", "quantizer", "nodes")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    alone = ("cli.py", "group_nodes.py", "migration.py", "__init__.py")
    return [*sorted(path.relative_to(ROOT).as_posix() for path in paths), *alone]


def is_in(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}/")


def room_of(path: str) -> str:
    return max((room for room in ROOMS if is_in(path, room)), key=len, default="")


def imports(module: str, text: str) -> Iterator[tuple[str, bool]]:
    """What a module imports, and whether that is ours: ours by its path, another package by its name."""
    package = PurePosixPath(module).parent
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            named = (node.module or "").split(".")
            if not node.level and named[0] != PACK:
                yield named[0], False
                continue
            base = [*package.parts[: len(package.parts) - node.level + 1], *named] if node.level else named[1:]
            inside = "/".join(base).rstrip("/")
            for alias in node.names:
                paths = (f"{inside}/{alias.name}".lstrip("/"), inside)
                found = (path + end for path in paths for end in ("", ".py") if (ROOT / (path + end)).exists())
                yield next(found, f"no {inside}"), True


def wrong(module: str, text: str) -> list[str]:
    """The imports that a module's room may not have."""
    room = room_of(module)
    refused = []
    for name, ours in imports(module, text):
        if ours:
            allowed = room_of(name) == room or any(is_in(name, place) for place in ROOMS[room])
        else:
            known = "comfy" if name in HOST else name
            allowed = name in sys.stdlib_module_names or room in PACKAGES.get(known, ())
        if not allowed:
            refused.append(name)
    return refused


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_what_its_room_may(module):
    assert wrong(module, (ROOT / module).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", ["benchmarks", "devtools", "examples", "tests"])
def test_what_is_imported_is_there(folder):
    for path in (ROOT / folder).rglob("*.py"):
        module = path.relative_to(ROOT).as_posix()
        missing = [name for name, _ in imports(module, path.read_text(encoding="utf-8")) if name.startswith("no ")]
        assert missing == [], module


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("loader/files/gguf_file.py", "import comfy.model_management"),
        ("loader/weights/layout.py", "from comfy.ops import manual_cast"),
        ("loader/quant_types/k_quants.py", "from ..files.errors import ModelFileError"),
        ("loader/kernels/cpu.py", "from ..weights.layout import pack"),
        ("loader/comfyui/model.py", "from ..diffusers.transformer import load_diffusers_transformer"),
        ("loader/comfyui/ops.py", "import triton"),
        ("loader/files/parts.py", "from . import gguf_file\nfrom ... import cli"),
        ("quantizer/convert.py", "def later():\n    import diffusers"),
        ("quantizer/convert.py", "import folder_paths"),
        ("nodes/save.py", "from ..devtools.cache import cache_folder"),
        ("migration.py", "import torch"),
    ],
)
def test_a_wrong_import_is_found(module, line):
    text = (ROOT / module).read_text(encoding="utf-8")
    assert len(wrong(module, f"{text}\n{line}\n")) == 1
