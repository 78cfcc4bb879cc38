"""The cache folder outside the project, and a lock between processes that fill it. Standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Where environments, models and cloned hosts are kept: ``AURAFLOW_GGUF_CACHE`` or the platform's cache folder."""
    if chosen := os.environ.get("AURAFLOW_GGUF_CACHE"):
        return Path(chosen).expanduser().absolute()
    home = Path.home()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "auraflow-gguf"


def bytecode_variables() -> dict[str, str]:
    """Has Python keep bytecode in the cache folder, out of the host's; also where it is told to keep none, since to
    compile torch and transformers anew takes each process 15 seconds."""
    return {"PYTHONPYCACHEPREFIX": str(cache_folder() / "pycache"), "PYTHONDONTWRITEBYTECODE": ""}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds ``path`` (made if need be) locked against other processes; waits for its turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                except OSError:
                    time.sleep(1)
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            yield
