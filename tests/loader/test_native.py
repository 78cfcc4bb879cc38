"""The C for CPUs is compiled once, kept, and done without where that fails."""

import ctypes
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
from auraflow_gguf.loader import native

NEEDS_COMPILER = pytest.mark.skipif(native._compiler() is None, reason="no C compiler here")
FUNCTIONS = {"dequantize.c": "dequantize_q6_k", "quantize.c": "quantize_q4_k"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where libraries are kept, as yet empty."""
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / "auraflow-gguf" / "native"
    native._library.cache_clear()


@NEEDS_COMPILER
@pytest.mark.parametrize("file", FUNCTIONS)
def test_it_compiles_once(folder, file):
    assert native.function(file, FUNCTIONS[file])
    (library,) = folder.iterdir()
    compiled_at = library.stat().st_mtime_ns
    native._library.cache_clear()
    assert native.function(file, FUNCTIONS[file])
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [compiled_at]


@NEEDS_COMPILER
def test_a_block_is_dequantized(folder):
    function = native.function("dequantize.c", "dequantize_q5_1")
    block = bytes([0, 0x3C, 0, 0x40]) + (1 << 31 | 1).to_bytes(4, "little") + bytes([0x21] * 16)  # d 1, m 2
    packed, out = ctypes.create_string_buffer(block, 24), (ctypes.c_float * 32)()
    function(ctypes.addressof(packed), ctypes.addressof(out), 1)
    assert list(out) == [19] + [3] * 15 + [4] * 15 + [20]


@NEEDS_COMPILER
def test_another_source_is_compiled_anew(folder, tmp_path, monkeypatch):
    native.function("dequantize.c", "dequantize_q6_k")
    copies = tmp_path / "copies"
    shutil.copytree(native.HEADER.parent, copies)
    (copies / "dequantize.c").write_text((copies / "dequantize.c").read_text("utf-8") + "\n", "utf-8")
    monkeypatch.setattr(native, "HEADER", copies / "native.h")
    native._library.cache_clear()
    assert native.function("dequantize.c", "dequantize_q6_k")
    assert len(list(folder.iterdir())) == 2


def test_the_environment_can_do_without(folder, monkeypatch):
    monkeypatch.setenv("AURAFLOW_GGUF_NATIVE", "0")
    assert native.function("dequantize.c", "dequantize_q6_k") is None
    assert not folder.exists()


def test_no_compiler(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.INFO):
        assert native.function("dequantize.c", "dequantize_q6_k") is None
    assert "no C compiler" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="the compiler here is a shell script")
def test_a_compiler_that_fails(folder, tmp_path, monkeypatch, caplog):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.INFO):
        assert native.function("quantize.c", "quantize_q4_k") is None
    assert "out of order" in caplog.text
    assert not list(folder.glob("*"))


@NEEDS_COMPILER
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    Path(tmp_path, "auraflow-gguf").write_text("a file in the way")
    with caplog.at_level(logging.INFO):
        assert native.function("dequantize.c", "dequantize_q6_k") is None
    assert "dequantize.c" in caplog.text
