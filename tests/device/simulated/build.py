"""Compiles the simulated accelerator, once for each state of its sources, torch and compiler, into the cache folder."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from auraflow_gguf.devtools.cache import cache_folder, locked
from auraflow_gguf.devtools.cxx import compiler

FOLDER = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).resolve().parent
SOURCES = ("memory.cpp", "operators.cpp")
FLAGS = ("-std=c++20", "-O1", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
SECONDS = 300  # that the compiler may take


def build() -> Path:
    """The path of the library, which is made if it is lacking.

    Raises:
        NoCompiler: there is no compiler.
        RuntimeError: the compiler fails; its message is in it.
    """
    command = [compiler(), *FLAGS, f"-I{TORCH / 'include'}"]
    digest = hashlib.sha256(f"{torch.__version__} {command}".encode())
    for path in sorted(FOLDER.glob("*.[ch]*")):
        digest.update(path.read_bytes())
    target = cache_folder() / "tests" / f"simulated-{digest.hexdigest()[:16]}.so"
    with locked(target.with_suffix(".lock")):
        if not target.exists():
            with TemporaryDirectory(dir=target.parent) as folder:
                _compile(command, Path(folder), target)
    return target


def _compile(command: list[str], folder: Path, target: Path) -> None:
    objects = [folder / f"{source}.o" for source in SOURCES]
    runs = [
        [*command, "-c", str(FOLDER / source), "-o", str(made)] for source, made in zip(SOURCES, objects, strict=True)
    ]
    library = folder / target.name
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    runs.append([command[0], "-shared", *map(str, objects), "-o", str(library), *libraries])
    for run in runs:
        done = subprocess.run(run, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(run)} ended with {done.returncode}:\n{done.stderr}")
    library.replace(target)
