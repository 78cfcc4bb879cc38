"""The reader on valid files: written byte by byte, and by gguf-py."""

import gc
import os

import gguf
import numpy as np
import pytest
import torch
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import LazyArray, TensorInfo, open_gguf
from auraflow_gguf.loader.quant_types import QUANT_TYPES

from .gguf_bytes import ARRAY, BOOL, F32, STRING, U8, U16, U32, U64, Tensor, gguf_bytes

F32_TYPE = QUANT_TYPES["F32"].id


def write(path, *args, **kwargs):
    path.write_bytes(gguf_bytes(*args, **kwargs))
    return path


def block_tensor(name, quant_type, rows=3):
    """A tensor of two blocks a row, filled with bytes that differ between tensors."""
    size = rows * 2 * quant_type.type_size
    data = bytes((len(name) + 7 * i) % 256 for i in range(size))
    return Tensor(name, (2 * quant_type.block_size, rows), quant_type.id, data)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 64, 65536])
def test_every_type_is_described_and_mapped(tmp_path, version, alignment):
    tensors = [block_tensor(f"weight.{name}", quant_type) for name, quant_type in QUANT_TYPES.items()]
    metadata = [("general.alignment", U32, alignment)]
    path = write(tmp_path / "all.gguf", metadata, tensors, version=version, alignment=alignment)

    file = open_gguf(path)

    assert file.version == version
    assert file.path == str(path)
    assert list(file.tensors) == [tensor.name for tensor in tensors]
    content = path.read_bytes()
    for tensor, quant_type in zip(tensors, QUANT_TYPES.values(), strict=True):
        info = file.tensors[tensor.name]
        assert info == TensorInfo(
            tensor.name, (3, 2 * quant_type.block_size), quant_type, 0, info.offset, len(tensor.data)
        )
        assert info.offset % alignment == 0
        assert content[info.offset : info.offset + info.nbytes] == tensor.data
        packed = file.packed(tensor.name)
        assert (packed.dtype, packed.shape) == (torch.uint8, (len(tensor.data),))
        assert packed.numpy().tobytes() == tensor.data


def test_shapes_are_in_torch_order(tmp_path):
    tensors = [Tensor(f"t{len(sizes)}", sizes, F32_TYPE, bytes(4 * 120)) for sizes in [(120,), (30, 4), (5, 4, 3, 2)]]
    file = open_gguf(write(tmp_path / "shapes.gguf", [], tensors))
    assert [info.shape for info in file.tensors.values()] == [(120,), (4, 30), (2, 3, 4, 5)]


def test_packed_shares_one_private_map(tmp_path):
    tensors = [Tensor("a", (8,), F32_TYPE, bytes(32)), Tensor("b", (8,), F32_TYPE, bytes(32))]
    path = write(tmp_path / "model.gguf", [], tensors)
    before = path.read_bytes()
    file = open_gguf(path)
    a, b = file.packed("a"), file.packed("b")
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    a.fill_(7)
    assert file.packed("a").tolist() == [7] * 32
    assert path.read_bytes() == before


def test_the_map_ends_with_its_tensors_and_no_file_stays_open(tmp_path):
    path = write(tmp_path / "model.gguf", [], [Tensor("a", (8,), F32_TYPE, bytes(32))])
    file = open_gguf(path)
    if os.path.exists("/proc/self/fd"):
        assert str(path) not in {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        assert not is_mapped(path)
    packed = file.packed("a")
    del file
    gc.collect()
    assert packed.tolist() == [0] * 32
    if os.path.exists("/proc/self/maps"):
        assert is_mapped(path)
    del packed
    gc.collect()
    if os.path.exists("/proc/self/maps"):
        assert not is_mapped(path)
    path.unlink()  # refused by Windows as long as the file is open or mapped


def is_mapped(path):
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return str(path) in maps.read()


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    path = write(tmp_path / "model.gguf", [], [Tensor("a", (8,), F32_TYPE, bytes(32))])
    file = open_gguf(path)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ModelFileError) as error:
        file.packed("a")
    assert str(error.value) == (
        f"model.gguf: found that it cannot be mapped into memory any more, expected the {size} bytes it had when it "
        "was opened. Leave the file in place while the model is in use, and load it again."
    )


def test_unknown_tensor_is_a_key_error(tmp_path):
    file = open_gguf(write(tmp_path / "model.gguf"))
    with pytest.raises(KeyError):
        file.packed("a")


def test_data_may_have_gaps_and_bytes_after_the_end(tmp_path):
    tensors = [Tensor("late", (8,), F32_TYPE, bytes(96), offset=64), Tensor("early", (8,), F32_TYPE, b"", offset=0)]
    path = tmp_path / "gaps.gguf"
    path.write_bytes(gguf_bytes([], tensors) + bytes(1000))
    file = open_gguf(path)
    assert list(file.tensors) == ["late", "early"]
    assert file.tensors["late"].offset == file.tensors["early"].offset + 64


def test_arrays_are_decoded_on_demand(tmp_path):
    words = ["", "a", "ä", "▁the", "\0", "𝄞"]
    metadata = [
        ("words", ARRAY, (STRING, words)),
        ("scores", ARRAY, (F32, [0.5, -1.0, 2.0])),
        ("flags", ARRAY, (BOOL, [True, False])),
        ("empty", ARRAY, (U16, [])),
        ("nested", ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["x"]), (ARRAY, [(U64, [2**64 - 1])])])),
        ("after", STRING, "still in step"),
    ]
    values = open_gguf(write(tmp_path / "arrays.gguf", metadata)).metadata
    assert isinstance(values["words"], LazyArray)
    assert len(values["words"]) == 6
    assert list(values["words"]) == words
    assert values["words"][-1] == "𝄞"
    assert values["words"][1:4:2] == ["a", "▁the"]
    assert list(values["scores"]) == [0.5, -1.0, 2.0]
    assert list(values["flags"]) == [True, False]
    assert list(values["empty"]) == []
    first, second, third = values["nested"]
    assert [list(first), list(second), list(third[0])] == [[1, 2], ["x"], [2**64 - 1]]
    assert values["after"] == "still in step"
    with pytest.raises(IndexError):
        values["words"][6]


def test_a_vocabulary_longer_than_a_read_keeps_its_strings(tmp_path):
    words = [f"token {i} " + "x" * (i % 50) for i in range(30_000)]
    metadata = [("tokens", ARRAY, (STRING, words)), ("after", U32, 5)]
    path = write(tmp_path / "vocabulary.gguf", metadata, [Tensor("a", (8,), F32_TYPE, bytes(32))])
    file = open_gguf(path)
    assert list(file.metadata["tokens"]) == words
    assert file.metadata["after"] == 5
    assert file.packed("a").tolist() == [0] * 32


def test_only_the_read_string_of_an_array_must_be_utf8(tmp_path):
    path = write(tmp_path / "words.gguf", [("words", ARRAY, (STRING, ["good", b"b\xff"]))])
    words = open_gguf(path).metadata["words"]
    assert words[0] == "good"
    with pytest.raises(ModelFileError) as error:
        words[1]
    assert str(error.value) == (
        "words.gguf: found byte 0xff in the metadata key 'words', which is not UTF-8, expected UTF-8 text. "
        "The file is damaged: download it again."
    )


@pytest.mark.parametrize("alignment", [32, 64, 256])
def test_files_of_gguf_py_are_read(tmp_path, alignment):
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "aura")
    writer.add_custom_alignment(alignment)
    scalars = {
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -32768,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "f32": 0.25,
        "bool": True,
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f64": 1e300,
        "string": "Grüße",
    }
    add = {"u8": "uint8", "i8": "int8", "u16": "uint16", "i16": "int16", "u32": "uint32", "i32": "int32"}
    add |= {"f32": "float32", "u64": "uint64", "i64": "int64", "f64": "float64"}
    for name, value in scalars.items():
        getattr(writer, f"add_{add.get(name, name)}")(name, value)
    writer.add_array("strings", ["a", "bc", ""])
    writer.add_array("integers", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("nested", [[1, 2], [3]])
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((4, 256), dtype=np.float32)
    packed = {name: gguf.quants.quantize(dense, gguf.GGMLQuantizationType[name]) for name in ["Q8_0", "Q4_0", "BF16"]}
    writer.add_tensor("dense", dense)
    writer.add_tensor("half", dense.astype(np.float16).reshape(1, 4, 16, 16))
    for name, data in packed.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_gguf(path)

    assert file.metadata["general.architecture"] == "aura"
    assert file.metadata["general.alignment"] == alignment
    assert {name: file.metadata[name] for name in scalars} == scalars
    assert list(file.metadata["strings"]) == ["a", "bc", ""]
    assert list(file.metadata["integers"]) == [1, -2, 3]
    assert list(file.metadata["floats"]) == [0.5, 1.5]
    assert [list(inner) for inner in file.metadata["nested"]] == [[1, 2], [3]]
    assert file.tensors["half"].shape == (1, 4, 16, 16)
    assert file.packed("dense").numpy().tobytes() == dense.tobytes()
    for name, data in packed.items():
        assert file.tensors[name].type is QUANT_TYPES[name]
        assert file.tensors[name].shape == (4, 256)
        assert file.packed(name).numpy().tobytes() == data.tobytes()
