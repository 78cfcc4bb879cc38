"""Compiling the C. Only the command line does this, when its user asks: no node and no loader imports this module."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import FOLDER, SOURCES, library_path

# Strict arithmetic: no contraction into multiply-adds, no reassociation.
FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
SECONDS = 120  # that the compiler may take


class BuildError(Exception):
    """The C cannot be compiled here; the message says why and what to do."""


def build() -> list[Path]:
    """Compile what is not compiled yet.

    Returns:
        The path of each library, new or not.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    paths = [library_path(source) for source in SOURCES]
    for source, path in zip(SOURCES, paths, strict=True):
        if not path.exists():
            _compile(FOLDER / source, path)
    return paths


def _compile(source: Path, target: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise BuildError("There is no C compiler here. Install gcc or clang, or name one in the environment as CC.")
    arm = platform.machine().lower() in ("arm64", "aarch64")
    command = [compiler, *FLAGS, "-mcpu=native" if arm else "-march=native", str(source), "-o"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder, target.name)
            libraries = [] if sys.platform == "win32" else ["-lm"]
            subprocess.run(
                [*command, str(built), *libraries],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=SECONDS,
            )
            os.replace(built, target)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise BuildError(f"{compiler} cannot make {target} of {source}: {reason}") from error


def _compiler() -> str | None:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)
