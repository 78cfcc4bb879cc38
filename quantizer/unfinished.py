"""Unfinished files and folders beside a target: ``<its name>.<8 hex digits>.partial``.

A process holds what it has not finished locked as long as it lives. So what a killed one has left can be told from what
another is writing at this moment; the next that makes the same target removes it.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

DIGITS = 8
LOCK = "lock"  # the file in a folder that is held for it
YOUNG = 60  # seconds in which a folder without that file may be getting it


def open_unfinished(target: str | os.PathLike) -> BinaryIO:
    """A new, empty file under a temporary name beside ``target``, held until it is closed; leftovers are removed."""
    remove_leftovers(target)
    while True:
        file = open(_name(target), "xb")  # noqa: SIM115 (the caller closes it)
        if _hold(file):
            return file
        file.close()


@contextmanager
def unfinished_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A new folder under a temporary name beside ``target``, removed when the context ends; leftovers are too."""
    remove_leftovers(target)
    while True:
        folder = Path(_name(target))
        folder.mkdir()
        lock = open(folder / LOCK, "xb")  # noqa: SIM115 (closed at the end of the context)
        if _hold(lock):
            break
        lock.close()
    try:
        yield folder
    finally:
        lock.close()  # Windows removes nothing that is open
        _remove(folder)


def remove_leftovers(target: str | os.PathLike) -> None:
    """Remove what processes that live no longer have left unfinished of ``target``."""
    for name in glob.glob(f"{glob.escape(os.path.abspath(target))}.{'[0-9a-f]' * DIGITS}.partial"):
        path = Path(name)
        held = path / LOCK if path.is_dir() else path
        try:
            with open(held, "r+b") as file:
                left = _lock(file)
                if left and os.name != "nt":
                    _remove(path)
            if left and os.name == "nt":
                held.unlink()  # which Windows refuses as long as it is open elsewhere
                _remove(path)
        except FileNotFoundError:
            with suppress(FileNotFoundError):
                if path.is_dir() and time.time() - path.stat().st_mtime > YOUNG:
                    _remove(path)
        except OSError:  # in use, or another user's
            continue


def _name(target: str | os.PathLike) -> str:
    return f"{os.path.abspath(target)}.{secrets.token_hex(DIGITS // 2)}.partial"


def _remove(path: Path) -> None:
    """Remove a file or folder, or what can be removed of it."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
        return
    with suppress(OSError):
        for name in os.listdir(path):
            if name != LOCK:  # which goes last: with it, the next can tell that this is left, if this one is killed
                _remove(path / name)
    shutil.rmtree(path, ignore_errors=True)


def _hold(file: BinaryIO) -> bool:
    """Lock a file that was just made; False when another process has taken it for a leftover meanwhile."""
    try:
        _lock(file)
    except BlockingIOError:
        return False
    return os.path.exists(file.name)


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed; False where files cannot be locked, so that nothing is a leftover there.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if os.name == "nt":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
