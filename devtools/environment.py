"""The virtual environment of the developers' commands: made once, shared by every clone. Standard library only."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .cache import cache_folder, locked
from .hosts import Host

COMPLETE = "complete"
"""Name of the file that stands in an environment once everything is installed in it, with what that is."""

DEVELOPERS = "requirements-dev.txt"


class SetUpError(RuntimeError):
    """The environment cannot be made; the message says what the person can do."""


NEWEST_FOR = 7 * 24 * 3600  # seconds that an environment of newest releases counts as one


def torch_requirements(newest: bool = False) -> list[str]:
    """The torch trio. On Linux x86-64 PyPI's wheels must be of one CUDA build, on a CPU too; ``===`` keeps pip from
    taking a local ``+cpu`` build, which has no matching torchvision."""
    if not newest and sys.platform == "linux" and platform.machine() == "x86_64":
        return ["torch===2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0"]
    return ["torch", "torchvision", "torchaudio"]


def requirements(root: Path, host: Host | None, newest: bool = False) -> list[str]:
    """What goes into an environment, each package's requirement as pip takes it.

    Args:
        root: the clone, with its ``requirements-dev.txt``.
        host: the ComfyUI whose ``requirements.txt`` is meant too.
        newest: without the versions that ComfyUI pins.
    """
    ours, theirs = (_lines(path) if path else [] for path in (root / DEVELOPERS, host and host.requirements))
    if newest:
        theirs = [re.sub(r"\s*(==|~=|<=?).*", "", line) for line in theirs]
    return [*torch_requirements(newest), *ours, *theirs]


def _lines(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def ensure(root: Path, host: Host | None, *, newest: bool = False) -> Path:
    """Finds or makes the environment.

    Its folder is named by a hash of what goes into it, so a changed requirement gives a new environment, and a
    half-made one (its maker was interrupted) is made again.

    Args:
        root, host, newest: as in `requirements`. One of newest releases is made anew when it is a week old.

    Returns:
        the path of the environment's Python.

    Raises:
        SetUpError: when this Python cannot make environments, or pip fails.
    """
    wanted = requirements(root, host, newest)
    key = hashlib.sha256("\n".join([platform.machine(), *sorted(set(wanted))]).encode()).hexdigest()[:16]
    name = "newest" if newest else key
    folder = cache_folder() / "environments" / f"{sys.implementation.cache_tag}-{name}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with locked(folder.with_suffix(".lock")):
        if not _works(folder, python, key) or (newest and _age(folder) > NEWEST_FOR):
            print(f"Making the environment {folder} (once; it takes some minutes and about 7 GB)", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)], "On Debian and Ubuntu, install python3-venv.")
            install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *wanted]
            _run(install, "pip says above what it misses.")
            (folder / COMPLETE).write_text(key)
    return python


def _works(folder: Path, python: Path, key: str) -> bool:
    """Whether the environment is complete, of these packages, and the Python it was made from is still there."""
    complete = folder / COMPLETE
    if not complete.is_file() or complete.read_text() != key or not python.exists():
        return False
    return subprocess.call([str(python), "-c", ""]) == 0


def _age(folder: Path) -> float:
    """Seconds since the environment was complete."""
    return time.time() - (folder / COMPLETE).stat().st_mtime


def _run(command: list[str], advice: str) -> None:
    if code := subprocess.call(command):
        raise SetUpError(f"this command ended with exit code {code}: {' '.join(command)}\n{advice}")
