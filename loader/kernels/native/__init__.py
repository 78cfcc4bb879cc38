"""C for CPUs. ``python cli.py compile`` compiles it for the machine it is on; the nodes only load what that made.

Without it everything works as well, by libgguf or torch, only slower. ``AURAFLOW_GGUF_NATIVE=0`` in the environment
does without it too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent

_ADDRESS, _NUMBER = ctypes.c_void_p, ctypes.c_int64

# The address of what is read, that of what is written, and how many blocks, or groups, there are.
BLOCKS = (_ADDRESS, _ADDRESS, _NUMBER)
# The same, and the address of the type's grid.
BLOCKS_AND_GRID = (*BLOCKS, _ADDRESS)
# The address of float32 rows, that of their columns' moments or None, that of what is written, rows, columns.
ROWS = (_ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER)
# As int8_rows in int8.c has them.
INT8_ROWS = (
    *(_ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER),
    *(_ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER, _NUMBER),
)
# The addresses of int32 sums, of what is written, of the scales of tokens and of rows; tokens, rows, and how many
# numbers the tokens are apart in what is written.
INT8_SUMS = (_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _NUMBER)
# The address of keys or values, how many bytes they are apart, their number, words or columns of each, and the address
# of what is written.
LAID_OUT = (_ADDRESS, _NUMBER, _NUMBER, _NUMBER, _ADDRESS)
# As attention.c has them.
ATTENTION = (
    *(_ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER),
    *(ctypes.c_float, _ADDRESS, _NUMBER, _ADDRESS),
)
# As multiply.c has them.
PRODUCT = (
    *(_ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER),
    *(_NUMBER, _NUMBER, _ADDRESS, _NUMBER, _ADDRESS),
)

# What the functions of each file take.
SOURCES = {
    "attention.c": ATTENTION,
    "dequantize_iq.c": BLOCKS_AND_GRID,
    "dequantize_k.c": BLOCKS,
    "dequantize_q.c": BLOCKS,
    "dequantize_values.c": BLOCKS,
    "int8.c": INT8_ROWS,
    "int8_sums.c": INT8_SUMS,
    "lay_out.c": LAID_OUT,
    "multiply.c": PRODUCT,
    "quantize_iq4.c": ROWS,
    "quantize_k.c": ROWS,
    "quantize_q.c": ROWS,
}

Function = Callable[..., None]


def function(source: str, name: str) -> Function | None:
    """The function ``name`` of one of the `SOURCES`; None where that is not compiled, or not for this processor."""
    found = getattr(_library(source), name, None)
    if found is None:
        return None
    found.argtypes, found.restype = SOURCES[source], None
    return found


@functools.cache
def _library(source: str) -> ctypes.CDLL | None:
    path = library_path(source)
    if os.environ.get("AURAFLOW_GGUF_NATIVE") == "0" or not path.exists():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("%s does not load, and is left out: %s", path, error)
        return None


def library_path(source: str) -> Path:
    """Where one of the `SOURCES` goes when compiled: to this user's cache folder, by its text and the processor."""
    headers = sorted(FOLDER.glob("*.h"))
    parts = [path.read_bytes() for path in (*headers, FOLDER / "build.py", FOLDER / source)]
    key = hashlib.sha256(b"\0".join([*parts, _processor().encode()])).hexdigest()[:16]
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    folder = Path(base or Path.home() / ".cache", "auraflow-gguf", "native")
    return folder / f"{Path(source).stem}-{key}.{'dll' if sys.platform == 'win32' else 'so'}"


def _processor() -> str:
    """What tells processors apart that have not the same instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
