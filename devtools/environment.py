"""The virtual environment of the developers' commands: made once, shared by every clone. Standard library only."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from .cache import cache_folder, locked
from .hosts import Host

COMPLETE = "complete"
"""Name of the file that stands in an environment once everything is installed in it."""


class SetUpError(RuntimeError):
    """The environment cannot be made; the message says what the person can do."""


def torch_requirements() -> list[str]:
    """The torch trio. On Linux x86-64 PyPI's wheels must be of one CUDA build, on a CPU too; ``===`` keeps pip from
    taking a local ``+cpu`` build, which has no matching torchvision."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return ["torch===2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0"]
    return ["torch", "torchvision", "torchaudio"]


def ensure(root: Path, host: Host | None) -> Path:
    """Finds or makes the environment.

    Its folder is named by a hash of what goes into it, so a changed requirement gives a new environment, and a
    half-made one (its maker was interrupted) is made again.

    Args:
        root: the clone; its ``requirements-dev.txt`` is installed.
        host: the ComfyUI whose ``requirements.txt`` is installed too.

    Returns:
        the path of the environment's Python.

    Raises:
        SetUpError: when this Python cannot make environments, or pip fails.
    """
    lists = [root / "requirements-dev.txt"] + ([host.requirements] if host else [])
    content = [sys.implementation.cache_tag, platform.machine(), *torch_requirements()]
    content += [path.read_text(encoding="utf-8") for path in lists]
    key = hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]
    folder = cache_folder() / "environments" / f"{sys.implementation.cache_tag}-{key}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with locked(folder.with_suffix(".lock")):
        if not _works(folder, python):
            print(f"Making the environment {folder} (once; it takes some minutes and about 7 GB)", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)], "On Debian and Ubuntu, install python3-venv.")
            install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *torch_requirements()]
            for path in lists:
                install += ["-r", str(path)]
            _run(install, "pip says above what it misses.")
            (folder / COMPLETE).touch()
    return python


def _works(folder: Path, python: Path) -> bool:
    """Whether the environment is complete and the Python it was made from is still there."""
    return (folder / COMPLETE).is_file() and python.exists() and subprocess.call([str(python), "-c", ""]) == 0


def _run(command: list[str], advice: str) -> None:
    if code := subprocess.call(command):
        raise SetUpError(f"this command ended with exit code {code}: {' '.join(command)}\n{advice}")
