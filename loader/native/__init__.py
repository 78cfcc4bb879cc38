"""C for CPUs, compiled once for this machine where there is a compiler, and kept in the user's cache folder.

Without a compiler everything works as well, by libgguf or torch, only slower. ``AURAFLOW_GGUF_NATIVE=0`` in the
environment does without it too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

HEADER = Path(__file__).with_name("native.h")
FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
SECONDS = 120  # that a compiler may take

# The address of what is read, that of what is written, and how many blocks there are.
Function = Callable[[int, int, int], None]


def function(file: str, name: str) -> Function | None:
    """The function ``name`` of ``file``, which lies beside this one; None where it cannot be had."""
    library = _library(file)
    if library is None:
        return None
    found = getattr(library, name)
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
    return found


@functools.cache
def _library(file: str) -> ctypes.CDLL | None:
    if os.environ.get("AURAFLOW_GGUF_NATIVE") == "0" or sys.byteorder != "little":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("no C compiler: %s is left out", file)
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, HEADER.with_name(file))))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("%s cannot make a library of %s: %s", compiler, file, getattr(error, "stderr", None) or error)
        return None


def _compiler() -> str | None:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def _compiled(compiler: str, source: Path) -> Path:
    """The library's path; compiled unless the same source was before, by the same compiler for the same processor."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    command = [compiler, *FLAGS, "-mcpu=native" if arm else "-march=native"]
    # What a compiler defines tells its version and the instructions that it may use.
    defined = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    parts = (*command, defined, HEADER.read_text("utf-8"), source.read_text("utf-8"))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = _folder()
    target = folder / f"{source.stem}-{key}.{'dll' if sys.platform == 'win32' else 'so'}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary, target.name)
            _run([*command, str(source), "-o", str(built), "-lm"])
            os.replace(built, target)
    return target


def _run(command: list[str]) -> str:
    process = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
    )
    return process.stdout


def _folder() -> Path:
    """A folder of this user's alone."""
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    folder = Path(base or Path.home() / ".cache", "auraflow-gguf", "native")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
