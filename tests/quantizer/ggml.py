"""ggml's own quantizer: the prebuilt library in an npm package, fetched once into the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from auraflow_gguf.devtools.cache import cache_folder, locked
from auraflow_gguf.loader.quant_types import QuantType

PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
SHA256 = "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0"
LIBRARY = "package/bins/linux-x64/libggml-base.so"


class Unavailable(Exception):
    """ggml's library cannot be had here; the message says what is absent."""


class Ggml:
    """``ggml_quantize_chunk`` of a ggml library."""

    def __init__(self, library: Path):
        self._quantize_chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self._quantize_chunk.restype = ctypes.c_size_t
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        # type, source, target, first weight, rows, columns, importance
        self._quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]

    def quantize(self, rows: np.ndarray, quant_type: QuantType, moments: np.ndarray | None = None) -> np.ndarray:
        """``(rows, columns) float32`` → ``(rows, row_bytes) uint8``; ``moments`` is ``(columns,) float32`` or None."""
        n_rows, columns = rows.shape
        packed = np.empty((n_rows, quant_type.row_bytes(columns)), np.uint8)
        importance = None if moments is None else moments.ctypes.data
        size = self._quantize_chunk(quant_type.id, rows.ctypes.data, packed.ctypes.data, 0, n_rows, columns, importance)
        assert size == packed.nbytes
        return packed


def load() -> Ggml:
    """The library, fetched with npm if it is not in the cache folder yet.

    Raises:
        Unavailable: there is no such library for this platform, no npm, or npm cannot fetch it.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"{PACKAGE} has ggml for Linux on x86-64, not for {platform.platform()}")
    folder = cache_folder() / "ggml" / VERSION
    with locked(folder.with_name(f"{VERSION}.lock")):
        if not (folder / LIBRARY).exists():
            _fetch(folder)
    return Ggml(folder / LIBRARY)


def _fetch(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed, which fetches ggml's library")
    with TemporaryDirectory(dir=folder.parent) as temporary:
        command = [
            npm,
            "pack",
            "--silent",
            "--fetch-retries",
            "1",
            "--pack-destination",
            temporary,
            f"{PACKAGE}@{VERSION}",
        ]
        result = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        if result.returncode:
            raise Unavailable(f"npm could not fetch {PACKAGE} {VERSION}: {result.stderr.strip()}")
        (archive,) = Path(temporary).glob("*.tgz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            raise RuntimeError(f"{PACKAGE} {VERSION} is not the package that it was")
        with tarfile.open(archive) as tar:
            tar.extract(LIBRARY, Path(temporary) / "unpacked")
        (Path(temporary) / "unpacked").replace(folder)
