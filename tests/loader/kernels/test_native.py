"""The C for CPUs is compiled when asked for, once, and loaded where it was compiled."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from auraflow_gguf.loader.kernels import native
from auraflow_gguf.loader.kernels.native import build

ROOT = Path(__file__).resolve().parents[3]
NEEDS_COMPILER = pytest.mark.skipif(build._compiler() is None, reason="no C compiler here")
FUNCTIONS = {
    "dequantize_q.c": "dequantize_q5_1",
    "dequantize_k.c": "dequantize_q6_k_bf16",
    "quantize_k.c": "quantize_q4_k",
    "int8.c": "int8_rows",
}
CACHE = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where libraries are kept, as yet empty."""
    monkeypatch.setenv(CACHE, str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / "auraflow-gguf" / "native"
    native._library.cache_clear()


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[Path]:
    """What the command says that it has compiled, in a folder of caches of its own; without optimizing where
    a script can be the compiler, for it takes a fifth of the time."""
    folder = tmp_path_factory.mktemp("caches")
    variables = {}
    if os.name == "posix":
        hurried = folder / "cc"
        hurried.write_text(f'#!/bin/sh\nexec "{build._compiler()}" "$@" -O0\n')
        hurried.chmod(0o755)
        variables["CC"] = str(hurried)
    ran = compile_in(folder, **variables)
    assert ran.returncode == 0, ran.stderr
    return [Path(line) for line in ran.stdout.split()]


@pytest.fixture
def compiled(printed, monkeypatch) -> list[Path]:
    """The same, and this process looks for its libraries there."""
    monkeypatch.setenv(CACHE, str(printed[0].parents[2]))
    return printed


def compile_in(caches: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "cli.py"), "compile"]
    environment = os.environ | {CACHE: str(caches)} | variables
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_nothing_is_there_before(folder):
    assert all(native.function(source, name) is None for source, name in FUNCTIONS.items())
    assert not folder.exists()


@NEEDS_COMPILER
def test_it_compiles_once(compiled):
    assert sorted(compiled[0].parent.iterdir()) == sorted(compiled)
    compiled_at = [path.stat().st_mtime_ns for path in compiled]
    assert [path.stat().st_mtime_ns for path in build.build()] == compiled_at
    assert all(native.function(source, name) for source, name in FUNCTIONS.items())


@NEEDS_COMPILER
@pytest.mark.usefixtures("compiled")
def test_a_block_is_dequantized():
    block = bytes([0, 0x3C, 0, 0x40]) + (1 << 31 | 1).to_bytes(4, "little") + bytes([0x21] * 16)  # d 1, m 2
    packed, out = ctypes.create_string_buffer(block, 24), (ctypes.c_float * 32)()
    native.function("dequantize_q.c", "dequantize_q5_1")(ctypes.addressof(packed), ctypes.addressof(out), 1)
    assert list(out) == [19] + [3] * 15 + [4] * 15 + [20]


def test_another_source_or_processor_has_another_library(tmp_path, monkeypatch):
    paths = {native.library_path(source) for source in native.SOURCES}
    monkeypatch.setattr(native, "_processor", lambda: "another")
    paths |= {native.library_path(source) for source in native.SOURCES}
    for name in ("native.h", "dequantize.h", "quantize.h", "build.py", *native.SOURCES):
        (tmp_path / name).write_bytes((native.FOLDER / name).read_bytes())
    (tmp_path / "native.h").open("a").write("\n")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    paths |= {native.library_path(source) for source in native.SOURCES}
    assert len(paths) == 3 * len(native.SOURCES)


@NEEDS_COMPILER
@pytest.mark.usefixtures("compiled")
def test_the_environment_can_do_without(monkeypatch):
    assert native.function("dequantize_k.c", "dequantize_q6_k")
    native._library.cache_clear()
    monkeypatch.setenv("AURAFLOW_GGUF_NATIVE", "0")
    assert native.function("dequantize_k.c", "dequantize_q6_k") is None


def test_a_library_that_does_not_load_is_left_out(folder, caplog):
    folder.mkdir(parents=True)
    native.library_path("quantize_k.c").write_bytes(b"no library")
    assert native.function("quantize_k.c", "quantize_q4_k") is None
    assert "does not load" in caplog.text


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.BuildError, match="no C compiler here"):
        build.build()


def test_a_compiler_that_fails(folder, monkeypatch):
    monkeypatch.setenv("CC", sys.executable)  # Python does not know the options
    with pytest.raises(build.BuildError, match=r"(?i)unknown option"):
        build.build()
    assert not list(folder.iterdir())


@NEEDS_COMPILER
def test_a_folder_that_cannot_be_made(tmp_path):
    Path(tmp_path, "auraflow-gguf").write_text("a file in the way")
    with pytest.raises(build.BuildError, match="auraflow-gguf"):
        build.build()


@NEEDS_COMPILER
def test_the_command(printed, tmp_path):
    assert [path.exists() for path in printed] == [True] * len(native.SOURCES)
    failed = compile_in(tmp_path, PATH="", CC="")
    assert failed.returncode == 1
    assert "auraflow-gguf: There is no C compiler here." in failed.stderr
