"""The C for CPUs, for tests that want it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from auraflow_gguf.loader.kernels import native
from auraflow_gguf.loader.kernels.native import build


def build_or_skip() -> None:
    """Compiles it if it is not yet, and has it looked for anew; skips the test where there is no compiler, of which the
    C is optional for users."""
    if build._compiler() is None:
        pytest.skip("no C compiler here, without which the C for CPUs is not tested")
    build.build()
    native._library.cache_clear()


def function_or_skip(source: str, name: str) -> native.Function:
    """``native.function``, compiled if it is not yet; skips the test where the processor has not what it is made of."""
    build_or_skip()
    function = native.function(source, name)
    if function is None:
        needed = "AVX-512 BF16" if name.endswith("_bf16") else "AVX2"
        pytest.skip(f"this processor has no {needed}, of which {name} in {source} is made")
    return function


def clang_or_skip() -> str:
    """The path of clang, by which what gcc compiles is compiled once more; skips the test where there is none."""
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("no clang here, by which the C is compiled once more where there is one")
    return clang


def built_with(compiler: str, options: list[str], folder: Path) -> Callable[[str, str], native.Function]:
    """``native.function``, of libraries that are compiled otherwise, into a folder, when they are first asked for."""
    libraries: dict[str, ctypes.CDLL] = {}
    lock = threading.Lock()  # the threads of a product ask at the same time

    def function(source: str, name: str) -> native.Function:
        with lock:
            if source not in libraries:
                target = folder / f"{source}.so"
                flags = [flag for flag in build.FLAGS if not flag.startswith("-O")]
                subprocess.run([compiler, "-O1", *options, *flags, native.FOLDER / source, "-o", target], check=True)
                libraries[source] = ctypes.CDLL(str(target))
        found = getattr(libraries[source], name)
        found.argtypes, found.restype = native.SOURCES[source], None
        return found

    return function
