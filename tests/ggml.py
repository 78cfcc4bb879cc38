"""ggml itself: the prebuilt library in an npm package, fetched once into the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from auraflow_gguf.devtools.cache import cache_folder, locked
from auraflow_gguf.loader.quant_types import QuantType

PACKAGE = "@node-llama-cpp/linux-x64"
NEWEST = "3.22.1"  # with ggml 0.25.1
BEFORE_FASTER_IQ1_M = "3.21.1"  # with ggml 0.23.0, the last before https://github.com/ggml-org/llama.cpp/pull/28706
SHA256 = {
    NEWEST: "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0",
    BEFORE_FASTER_IQ1_M: "4b5b65a8b2611d8af94349b02d815c0f424a30a0a19aef2be5db25ecfef6730f",
}
LIBRARY = "package/bins/linux-x64/libggml-base.so"


_ARRAY = 9
_GETTERS = {  # by enum gguf_type
    4: ("gguf_get_val_u32", ctypes.c_uint32),
    6: ("gguf_get_val_f32", ctypes.c_float),
    7: ("gguf_get_val_bool", ctypes.c_bool),
    8: ("gguf_get_val_str", ctypes.c_char_p),
}


@dataclass(frozen=True)
class Contents:
    """What llama.cpp finds in a GGUF file.

    Attributes:
        metadata: values by key; of an array, the number of its elements.
        tensors: shape, outermost first, and type by name.
    """

    metadata: dict[str, object]
    tensors: dict[str, tuple[tuple[int, ...], int]]


class Unavailable(Exception):
    """ggml's library cannot be had here; the message says what is absent."""


class _InitParams(ctypes.Structure):
    """``struct gguf_init_params``."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.POINTER(ctypes.c_void_p)))


class _Tensor(ctypes.Structure):
    """The beginning of ``struct ggml_tensor``."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("sizes", ctypes.c_int64 * 4))


class Ggml:
    """``ggml_quantize_chunk``, ``dequantize_row_*`` and ``gguf_init_from_file`` of a ggml library."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._quantize_chunk = self._library.ggml_quantize_chunk
        self._quantize_chunk.restype = ctypes.c_size_t
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        # type, source, target, first weight, rows, columns, importance
        self._quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]

    def quantize(
        self,
        rows: np.ndarray,
        quant_type: QuantType,
        moments: np.ndarray | None = None,
        packed: np.ndarray | None = None,
    ) -> np.ndarray:
        """``(rows, columns) float32`` → ``(rows, row_bytes) uint8``, in ``packed`` where it is given; ``moments`` is
        ``(columns,) float32`` or None."""
        n_rows, columns = rows.shape
        packed = np.empty((n_rows, quant_type.row_bytes(columns)), np.uint8) if packed is None else packed
        importance = None if moments is None else moments.ctypes.data
        size = self._quantize_chunk(quant_type.id, rows.ctypes.data, packed.ctypes.data, 0, n_rows, columns, importance)
        assert size == packed.nbytes
        return packed

    def dequantize(self, packed: np.ndarray, quant_type: QuantType) -> np.ndarray:
        """``(…, columns in blocks) uint8`` → ``(…, columns) float32``, by ``dequantize_row_*``."""
        columns = quant_type.columns(packed.shape[-1])
        weights = np.empty((*packed.shape[:-1], columns), np.float32)
        source, target = (ctypes.c_void_p(array.ctypes.data) for array in (packed, weights))
        self._call(f"dequantize_row_{quant_type.name.lower()}", source, target, weights.size, returns=None)
        return weights

    def read(self, path: Path) -> Contents:
        """What llama.cpp finds in a GGUF file.

        Raises:
            ValueError: it refuses the file.
        """
        tensors = ctypes.c_void_p()
        params = _InitParams(no_alloc=True, context=ctypes.pointer(tensors))
        file = ctypes.c_void_p(self._call("gguf_init_from_file", str(path).encode(), params, returns=ctypes.c_void_p))
        if not file:
            raise ValueError(f"llama.cpp cannot read {path}")
        try:
            return Contents(
                metadata=dict(self._key_value(file, index) for index in range(self._call("gguf_get_n_kv", file))),
                tensors=dict(self._tensor(file, tensors, i) for i in range(self._call("gguf_get_n_tensors", file))),
            )
        finally:
            self._call("gguf_free", file)
            self._call("ggml_free", tensors)

    def _key_value(self, file: ctypes.c_void_p, index: int) -> tuple[str, object]:
        """A key with its value; of an array, the number of its elements."""
        key = self._call("gguf_get_key", file, index, returns=ctypes.c_char_p).decode()
        kind = self._call("gguf_get_kv_type", file, index, returns=ctypes.c_int)
        if kind == _ARRAY:
            return key, self._call("gguf_get_arr_n", file, index, returns=ctypes.c_size_t)
        getter, returns = _GETTERS[kind]
        value = self._call(getter, file, index, returns=returns)
        return key, value.decode() if isinstance(value, bytes) else value

    def _tensor(self, file: ctypes.c_void_p, tensors: ctypes.c_void_p, index: int) -> tuple[str, tuple]:
        name = self._call("gguf_get_tensor_name", file, index, returns=ctypes.c_char_p)
        tensor = self._call("ggml_get_tensor", tensors, name, returns=ctypes.POINTER(_Tensor))
        dimensions = self._call("ggml_n_dims", tensor, returns=ctypes.c_int)
        return name.decode(), (tuple(tensor.contents.sizes[:dimensions][::-1]), tensor.contents.type)

    def _call(self, function: str, *arguments, returns: type = ctypes.c_int64):
        function = getattr(self._library, function)
        function.restype = returns
        return function(*(ctypes.c_int64(item) if isinstance(item, int) else item for item in arguments))


def load(version: str = NEWEST) -> Ggml:
    """The library of a version of the package, fetched with npm if it is not in the cache folder yet.

    Raises:
        Unavailable: there is no such library for this platform, no npm, or npm cannot fetch it.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"{PACKAGE} has ggml for Linux on x86-64, not for {platform.platform()}")
    folder = cache_folder() / "ggml" / version
    with locked(folder.with_name(f"{version}.lock")):
        if not (folder / LIBRARY).exists():
            _fetch(version, folder)
    return Ggml(folder / LIBRARY)


def load_or_skip(version: str = NEWEST) -> Ggml:
    """The library, for a test, which is skipped with the reason where it cannot be had."""
    import pytest  # benchmarks, which load the library too, do without

    try:
        return load(version)
    except Unavailable as reason:
        pytest.skip(str(reason))


def _fetch(version: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed, which fetches ggml's library")
    with TemporaryDirectory(dir=folder.parent) as temporary:
        options = ["--silent", "--fetch-retries", "1", "--pack-destination", temporary]
        command = [npm, "pack", *options, f"{PACKAGE}@{version}"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        if result.returncode:
            raise Unavailable(f"npm could not fetch {PACKAGE} {version}: {result.stderr.strip()}")
        (archive,) = Path(temporary).glob("*.tgz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256[version]:
            raise RuntimeError(f"{PACKAGE} {version} is not the package that it was")
        with tarfile.open(archive) as tar:
            tar.extract(LIBRARY, Path(temporary) / "unpacked")
        (Path(temporary) / "unpacked").replace(folder)
