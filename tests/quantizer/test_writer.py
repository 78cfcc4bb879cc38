"""The file is whole or not there."""

import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.quantizer import writer
from auraflow_gguf.quantizer.writer import TensorSpec, write_gguf

F32 = TensorSpec("bias", (3,), QUANT_TYPES["F32"])
Q8 = TensorSpec("weight", (2, 64), QUANT_TYPES["Q8_0"])


def fill(tensor):
    """The tensor's bytes, in two pieces."""
    data = bytes(i % 251 for i in range(tensor.nbytes))
    yield memoryview(data)[:5]
    yield memoryview(data)[5:]


def test_gguf_py_reads_what_was_written(tmp_path):
    target = tmp_path / "a.gguf"
    metadata = {
        "general.architecture": "aura",
        "a.count": 7,
        "a.large": 2**40,
        "a.flag": True,
        "a.ratio": 0.5,
        "a.names": ["ä", "b"],
        "a.none": [],
    }
    write_gguf(target, metadata, [F32, Q8], fill)

    reader = gguf.GGUFReader(target)
    assert reader.fields["GGUF.version"].contents() == 3
    assert {key: reader.fields[key].contents() for key in metadata if key != "a.none"} == {
        key: value for key, value in metadata.items() if key != "a.none"
    }
    assert reader.fields["a.count"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["a.large"].types == [gguf.GGUFValueType.UINT64]
    bias, weight = reader.tensors
    assert (bias.name, bias.shape.tolist(), bias.tensor_type) == ("bias", [3], gguf.GGMLQuantizationType.F32)
    assert (weight.name, weight.shape.tolist(), weight.tensor_type) == (
        "weight",
        [64, 2],
        gguf.GGMLQuantizationType.Q8_0,
    )
    assert bias.data.tobytes() == b"".join(fill(F32))
    assert weight.data.tobytes() == b"".join(fill(Q8))
    assert weight.data_offset % writer.ALIGNMENT == 0
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_an_existing_target_is_refused_and_kept(tmp_path):
    target = tmp_path / "a.gguf"
    target.write_text("precious")
    with pytest.raises(ModelFileError, match="--overwrite"):
        write_gguf(target, {}, [F32], fill)
    assert target.read_text() == "precious"
    write_gguf(target, {}, [F32], fill, overwrite=True)
    assert target.read_bytes()[:4] == b"GGUF"


def test_a_target_made_meanwhile_is_kept(tmp_path):
    target = tmp_path / "a.gguf"

    def data(tensor):
        target.write_text("of another program")
        yield from fill(tensor)

    with pytest.raises(ModelFileError, match="--overwrite"):
        write_gguf(target, {}, [F32], data)
    assert os.listdir(tmp_path) == ["a.gguf"]
    assert target.read_text() == "of another program"


def test_a_target_that_cannot_be_replaced_is_said_and_leaves_nothing_else(tmp_path):
    def meanwhile(tensor):
        (tmp_path / "a.gguf").mkdir()
        return fill(tensor)

    with pytest.raises(ModelFileError, match=r"a\.gguf: found that it cannot be replaced .* Unload the model"):
        write_gguf(tmp_path / "a.gguf", {}, [F32], meanwhile, overwrite=True)
    assert os.listdir(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_is_refused_before_anything_is_written(tmp_path, overwrite):
    (tmp_path / "a.gguf").mkdir()

    def never(tensor):
        raise AssertionError

    with pytest.raises(ModelFileError, match="found a folder, expected a file's name"):
        write_gguf(tmp_path / "a.gguf", {}, [F32], never, overwrite=overwrite)


def test_a_file_system_that_takes_no_file_of_this_size(tmp_path):
    def too_large(tensor):
        raise OSError(errno.EFBIG, "File too large")

    with pytest.raises(ModelFileError, match="found a file system that takes no file of this size"):
        write_gguf(tmp_path / "a.gguf", {}, [F32], too_large)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"no folder .*nowhere"):
        write_gguf(tmp_path / "nowhere" / "a.gguf", {}, [F32], fill)


def test_more_than_the_disk_holds_is_refused_before_writing(tmp_path):
    huge = TensorSpec("weight", (2**40, 2**20), QUANT_TYPES["F32"])
    with pytest.raises(ModelFileError, match="GB free in"):
        write_gguf(tmp_path / "a.gguf", {}, [huge], lambda tensor: pytest.fail("data were asked for"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path, error):
    target = tmp_path / "a.gguf"
    target.write_text("before")

    def broken(tensor):
        yield memoryview(b"12345")
        assert any(name.endswith(".partial") for name in os.listdir(tmp_path))
        raise error

    with pytest.raises(type(error)):
        write_gguf(target, {}, [F32], broken, overwrite=True)
    assert os.listdir(tmp_path) == ["a.gguf"]
    assert target.read_text() == "before"


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    def full(tensor):
        yield memoryview(b"1")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ModelFileError, match="disk that became full"):
        write_gguf(tmp_path / "a.gguf", {}, [F32], full)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [11, 13])
def test_data_of_another_size_than_announced_is_an_error(tmp_path, size):
    with pytest.raises(ValueError, match=f"{size} bytes of data, 12 announced"):
        write_gguf(tmp_path / "a.gguf", {}, [F32], lambda tensor: [memoryview(bytes(size))])
    assert os.listdir(tmp_path) == []


def test_header_is_padded_with_the_table_before_it(tmp_path):
    write_gguf(tmp_path / "a.gguf", {}, [F32], fill)
    content = (tmp_path / "a.gguf").read_bytes()
    table = struct.pack("<Q4sIQIQ", 4, b"bias", 1, 3, 0, 0)
    assert content == (
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + table).ljust(64, b"\0") + b"".join(fill(F32)).ljust(32, b"\0")
    )


SLOW_WRITER = """
import sys, time
sys.path.insert(0, {tests!r})
import conftest
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.quantizer.writer import TensorSpec, write_gguf
tensors = [TensorSpec(f"t{{i}}", (4, 256), QUANT_TYPES["F32"]) for i in range(30)]
def fill(tensor):
    for _ in range(4):
        yield memoryview(bytes(1024))
        print("piece", flush=True)
        time.sleep(0.001)
write_gguf({target!r}, {{}}, tensors, fill)
"""


@pytest.mark.parametrize("pieces", [1, 110])
def test_a_process_killed_after_some_of_120_pieces_leaves_no_target(tmp_path, pieces):
    target = tmp_path / "a.gguf"
    script = SLOW_WRITER.format(tests=str(Path(__file__).parents[1]), target=str(target))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for _ in range(pieces):
        assert process.stdout.readline() == "piece\n"
    process.kill()
    process.communicate()
    assert process.returncode != 0
    (left,) = os.listdir(tmp_path)
    assert left.startswith("a.gguf.")
    assert left.endswith(".partial")
