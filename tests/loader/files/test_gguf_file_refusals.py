"""Broken files, and what a person is told about each."""

import os
import re
import struct
import tracemalloc

import pytest
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import MAX_HEADER_BYTES, open_gguf
from auraflow_gguf.loader.quant_types import QUANT_TYPES

from .gguf_bytes import ARRAY, BOOL, F32, STRING, U8, U32, U64, Tensor, gguf_bytes

INCOMPLETE = "The download is incomplete: download it again."
DAMAGED = "The file is damaged: download it again."
BADLY_WRITTEN = "The file is damaged, or the program that wrote it is at fault: get it from another source."
OTHER_TYPE = f"Download the model in another type. These can be loaded: {', '.join(QUANT_TYPES)}."
UPDATE = "Update the AuraFlow GGUF pack if the file is new; else the file is damaged: download it again."


def tensor(name="w", sizes=(8,), type_id=0, nbytes=32, offset=None):
    return Tensor(name, sizes, type_id, bytes(nbytes), offset)


def nested(depth):
    value = (U8, [1])
    for _ in range(depth - 1):
        value = (ARRAY, [value])
    return value


def with_value(value_type, content, key="k"):
    """A file of one metadata entry whose value is ``content``, followed by room to spare."""
    return gguf_bytes([(key, U8, 0)])[:-5] + struct.pack("<I", value_type) + content + bytes(64)


BAD_FILES = {
    "empty": (b"", f"found an empty file (0 bytes), expected at least 24 bytes, for the header. {INCOMPLETE}"),
    "only a magic": (b"GGUF", f"found 4 bytes, expected at least 24 bytes, for the header. {INCOMPLETE}"),
    "unknown magic": (
        b"\x93\x00\xfe\x01" + bytes(100),
        "found the bytes 93 00 fe 01 at its beginning, expected a GGUF file, which begins with 47 47 55 46. "
        "This is not a GGUF file: check what you downloaded.",
    ),
    "GGJT": (
        gguf_bytes(magic=b"tjgg"),
        "found the GGJT format, which came before GGUF, expected a GGUF file. Download the model as GGUF.",
    ),
    "version 0": (
        gguf_bytes(version=0),
        "found GGUF version 0, expected version 2 or 3. Download a newer file of this model, or convert it again.",
    ),
    "version 1": (
        gguf_bytes(version=1),
        "found GGUF version 1, expected version 2 or 3. Download a newer file of this model, or convert it again.",
    ),
    "version 4": (gguf_bytes(version=4), f"found GGUF version 4, expected version 2 or 3. {UPDATE}"),
    "big endian": (
        gguf_bytes(version=3 << 24),
        "found a big-endian GGUF file of version 3, expected a little-endian one. "
        "Download the file for little-endian machines, or convert the model again.",
    ),
    "too many tensors": (
        gguf_bytes(tensor_count=2**40),
        f"found a table of 1,099,511,627,776 tensors, expected at most 32,768. {DAMAGED}",
    ),
    "too many keys": (
        gguf_bytes(key_value_count=2**64 - 1),
        f"found 18,446,744,073,709,551,615 metadata entries, expected at most 65,536. {DAMAGED}",
    ),
    "counts beyond the file": (
        gguf_bytes(tensor_count=2, key_value_count=3),
        f"found 24 bytes, expected at least 127 bytes, for 3 metadata entries and 2 tensors. {INCOMPLETE}",
    ),
    "key too long": (
        gguf_bytes([("k" * 65536, U8, 0)]),
        f"found a string of 65,536 bytes in metadata entry 1 of 1, expected at most 65,535. {DAMAGED}",
    ),
    "key not UTF-8": (
        gguf_bytes([(b"k\xc3(", U8, 0)]),
        f"found byte 0xc3 in metadata entry 1 of 1, which is not UTF-8, expected UTF-8 text. {DAMAGED}",
    ),
    "key twice": (
        gguf_bytes([("k", U8, 0), ("k", U8, 1)]),
        f"found the metadata key 'k' twice, expected each key once. {BADLY_WRITTEN}",
    ),
    "unknown value type": (
        with_value(13, b""),
        f"found value type 13 in the metadata key 'k', expected one of GGUF's value types, 0 to 12. {DAMAGED}",
    ),
    "unknown element type": (
        with_value(ARRAY, struct.pack("<IQ", 99, 1)),
        f"found value type 99 in the metadata key 'k', expected one of GGUF's value types, 0 to 12. {DAMAGED}",
    ),
    "string not UTF-8": (
        gguf_bytes([("k", STRING, b"\xed\xa0\x80")]),
        f"found byte 0xed in the metadata key 'k', which is not UTF-8, expected UTF-8 text. {DAMAGED}",
    ),
    "string of 2^64 - 1 bytes": (
        with_value(STRING, b"\xff" * 8),
        "found a string of 18,446,744,073,709,551,615 bytes in the metadata key 'k', expected at most 8,388,608. "
        f"{DAMAGED}",
    ),
    "string beyond the file": (
        with_value(STRING, struct.pack("<Q", 1000)),
        f"found 109 bytes, expected at least 1,045 bytes, for the metadata key 'k'. {INCOMPLETE}",
    ),
    "too much text": (
        gguf_bytes([(f"k{i}", STRING, "x" * 3_000_000) for i in range(3)]),
        f"found 9,000,006 bytes of text up to the metadata key 'k2', expected at most 8,388,608 in all. {DAMAGED}",
    ),
    "array of 2^61 numbers": (
        with_value(ARRAY, struct.pack("<IQ", U64, 2**61)),
        "found the metadata key 'k' reaching to byte 18,446,744,073,709,551,665, expected all metadata and names "
        f"within the first 33,554,432 bytes. {DAMAGED}",
    ),
    "array beyond the file": (
        with_value(ARRAY, struct.pack("<IQ", F32, 1000)),
        f"found 113 bytes, expected at least 4,049 bytes, for the metadata key 'k'. {INCOMPLETE}",
    ),
    "strings beyond the file": (
        with_value(ARRAY, struct.pack("<IQQ", STRING, 2, 1000)),
        f"found 121 bytes, expected at least 1,065 bytes, for the metadata key 'k'. {INCOMPLETE}",
    ),
    "string in an array of 2^64 - 1 bytes": (
        with_value(ARRAY, struct.pack("<IQ", STRING, 1) + b"\xff" * 8),
        "found the metadata key 'k' reaching to byte 18,446,744,073,709,551,672, expected all metadata and names "
        f"within the first 33,554,432 bytes. {DAMAGED}",
    ),
    "array of 1000 strings beyond the file": (
        with_value(ARRAY, struct.pack("<IQ", STRING, 1000)),
        f"found 113 bytes, expected at least 8,049 bytes, for the metadata key 'k'. {INCOMPLETE}",
    ),
    "array of 1000 arrays beyond the file": (
        with_value(ARRAY, struct.pack("<IQ", ARRAY, 1000)),
        f"found 113 bytes, expected at least 12,049 bytes, for the metadata key 'k'. {INCOMPLETE}",
    ),
    "arrays too deep": (
        gguf_bytes([("k", ARRAY, nested(5))]),
        f"found arrays nested more than 4 deep in the metadata key 'k', expected at most 4 levels. {DAMAGED}",
    ),
    "too many arrays": (
        gguf_bytes([("k", ARRAY, (ARRAY, [(U8, [])] * 4096))]),
        f"found more than 4,096 arrays up to the metadata key 'k', expected fewer. {DAMAGED}",
    ),
    "alignment a string": (
        gguf_bytes([("general.alignment", STRING, "32")]),
        f"found a general.alignment that is no integer, expected an integer. {BADLY_WRITTEN}",
    ),
    "alignment a bool": (
        gguf_bytes([("general.alignment", BOOL, True)]),
        f"found a general.alignment that is no integer, expected an integer. {BADLY_WRITTEN}",
    ),
    "alignment 0": (
        gguf_bytes([("general.alignment", U32, 0)]),
        f"found general.alignment = 0, expected a power of two from 8 to 65,536. {BADLY_WRITTEN}",
    ),
    "alignment 4": (
        gguf_bytes([("general.alignment", U32, 4)], alignment=4),
        f"found general.alignment = 4, expected a power of two from 8 to 65,536. {BADLY_WRITTEN}",
    ),
    "alignment 48": (
        gguf_bytes([("general.alignment", U32, 48)]),
        f"found general.alignment = 48, expected a power of two from 8 to 65,536. {BADLY_WRITTEN}",
    ),
    "alignment 128 Ki": (
        gguf_bytes([("general.alignment", U32, 131072)]),
        f"found general.alignment = 131072, expected a power of two from 8 to 65,536. {BADLY_WRITTEN}",
    ),
    "split count a string": (
        gguf_bytes([("split.count", STRING, "3")]),
        f"found a split.count that is no integer, expected an integer. {BADLY_WRITTEN}",
    ),
    "name too long": (
        gguf_bytes([], [tensor("w" * 1025)]),
        f"found a string of 1,025 bytes in entry 1 of 1 in the tensor table, expected at most 1,024. {DAMAGED}",
    ),
    "name not UTF-8": (
        gguf_bytes([], [tensor(b"\x80")]),
        f"found byte 0x80 in entry 1 of 1 in the tensor table, which is not UTF-8, expected UTF-8 text. {DAMAGED}",
    ),
    "name twice": (
        gguf_bytes([], [tensor(), tensor()]),
        f"found two tensors named 'w', expected each name once. {BADLY_WRITTEN}",
    ),
    "no dimensions": (
        gguf_bytes([], [tensor(sizes=())]) + bytes(64),
        f"found 0 dimensions in the table's entry for tensor 'w', expected 1 to 4. {DAMAGED}",
    ),
    "5 dimensions": (
        gguf_bytes([], [tensor(sizes=(1, 1, 1, 1, 1))]),
        f"found 5 dimensions in the table's entry for tensor 'w', expected 1 to 4. {DAMAGED}",
    ),
    "size 0": (
        gguf_bytes([], [tensor(sizes=(8, 0))]),
        f"found tensor 'w' of sizes 8 × 0, expected sizes above 0. {BADLY_WRITTEN}",
    ),
    "removed type": (
        gguf_bytes([], [tensor(type_id=4)]),
        "found tensor 'w' of type Q4_2, which is no type for weights, expected a quantization type that ggml still "
        f"has. {OTHER_TYPE}",
    ),
    "unknown type": (
        gguf_bytes([], [tensor(type_id=2**32 - 1)]),
        f"found tensor 'w' of type 4294967295, expected a quantization type that ggml still has. {OTHER_TYPE}",
    ),
    "Q8_K": (
        gguf_bytes([], [tensor(type_id=15)]),
        "found tensor 'w' of type Q8_K, which is no type for weights, expected a quantization type that ggml still "
        f"has. {OTHER_TYPE}",
    ),
    "I32": (
        gguf_bytes([], [tensor(type_id=26)]),
        "found tensor 'w' of type I32, which is no type for weights, expected a quantization type that ggml still "
        f"has. {OTHER_TYPE}",
    ),
    "row of half a block": (
        gguf_bytes([], [tensor(sizes=(128, 2), type_id=12)]),
        f"found tensor 'w' of sizes 128 × 2 in Q4_K, expected a first size that is a multiple of 256. {BADLY_WRITTEN}",
    ),
    "offset not aligned": (
        gguf_bytes([], [tensor(offset=16)]),
        f"found tensor 'w' at offset 16, expected a multiple of the alignment, 32. {BADLY_WRITTEN}",
    ),
    "tensors that overlap": (
        gguf_bytes([], [tensor("a", sizes=(16,), nbytes=64), tensor("b", offset=32)]),
        f"found tensors 'a' and 'b' in the same bytes, expected each in its own. {BADLY_WRITTEN}",
    ),
    "tensor beyond the file": (
        gguf_bytes([], [tensor(sizes=(8, 2))]),
        f"found 128 bytes, expected 160 bytes, where tensor 'w' ends. {INCOMPLETE}",
    ),
    "offset beyond the file": (
        gguf_bytes([], [tensor(offset=2**64 - 32)]),
        f"found 96 bytes, expected 18,446,744,073,709,551,680 bytes, where tensor 'w' ends. {INCOMPLETE}",
    ),
    "sizes beyond 64 bits": (
        gguf_bytes([], [tensor(sizes=(2**63, 2**63, 2**63, 2**63))]),
        f"found 128 bytes, expected {2**254 + 96:,} bytes, where tensor 'w' ends. {INCOMPLETE}",
    ),
}


def message(path):
    with pytest.raises(ModelFileError) as error:
        open_gguf(path)
    return str(error.value)


@pytest.mark.parametrize(("content", "expected"), BAD_FILES.values(), ids=BAD_FILES)
def test_message(tmp_path, content, expected):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert message(path) == f"model.gguf: {expected}"


def test_what_the_limits_allow(tmp_path):
    """The largest values that the table's rows go beyond."""
    path = tmp_path / "model.gguf"
    metadata = [("k" * 65535, U8, 0), ("deep", ARRAY, nested(4)), ("many", ARRAY, (ARRAY, [(U8, [])] * 4091))]
    path.write_bytes(gguf_bytes(metadata, [tensor("w" * 1024, sizes=(8, 1, 1, 1)), tensor("v")]))
    file = open_gguf(path)
    assert len(file.metadata["many"]) == 4091
    assert file.tensors["w" * 1024].shape == (1, 1, 1, 8)


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ([(f"key {i}", U64, 2**64 - 1 - i) for i in range(65536)], []),
        ([("k", STRING, "x" * 8_388_000 + "𝄞")], []),
        ([("k", ARRAY, (STRING, [""] * 200_000))], []),
        ([], [tensor(f"{i}𝄞".ljust(200), sizes=(8, 1, 1, 1)) for i in range(32768)]),
    ],
    ids=["keys", "text", "strings", "tensors"],
)
def test_files_at_the_limits_take_little_memory(tmp_path, metadata, tensors):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors))
    tracemalloc.start()
    try:
        open_gguf(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size + (64 << 20)


def test_long_and_unprintable_names_are_shown_safely(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([], [tensor("\x1b[31m\n" + "w" * 100, type_id=4)]))
    assert f"found tensor '\\x1b[31m\\n{'w' * 73}…' of type Q4_2" in message(path)


def test_a_recognised_file_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"<!DOCTYPE html><html><head><title>404</title></head></html>")
    assert "found a web page" in message(path)


def test_no_file(tmp_path):
    assert message(tmp_path / "model.gguf") == (
        "model.gguf: found that it cannot be read (No such file or directory), expected a GGUF file. "
        "Check that the file is there and that you may read it."
    )


def test_a_folder(tmp_path):
    assert message(tmp_path).startswith(f"{tmp_path.name}: found that it cannot be read (")


@pytest.fixture(scope="module")
def long_file():
    """More than 4 KiB of header, one tensor of each type, and where each tensor ends."""
    metadata = [
        ("general.architecture", STRING, "aura"),
        ("tokens", ARRAY, (STRING, [f"token {i}" for i in range(50)])),
        ("nested", ARRAY, (ARRAY, [(F32, [0.5, 1.0]), (STRING, ["a", "b"])])),
        ("scores", ARRAY, (F32, [0.5] * 500)),
        ("note", STRING, "n" * 500),
    ]
    tensors = [
        tensor(f"weight.{name}", (quant_type.block_size, 2), quant_type.id, 2 * quant_type.type_size)
        for name, quant_type in QUANT_TYPES.items()
    ]
    content = gguf_bytes(metadata, tensors)
    assert len(content) > 4096
    return content


def test_truncated_at_any_byte_of_the_first_4_kib(tmp_path, long_file):
    path = tmp_path / "model.gguf"
    path.write_bytes(long_file)
    for size in reversed(range(4096)):
        os.truncate(path, size)
        text = message(path)
        found = f"{size:,} bytes" if size else "an empty file (0 bytes)"
        assert text.startswith(f"model.gguf: found {found}, expected ")
        assert text.endswith(f". {INCOMPLETE}")
        expected = int(re.search(r"expected (?:at least )?([\d,]+) bytes, ", text)[1].replace(",", ""))
        assert size < expected <= len(long_file)


def test_truncated_at_each_tensors_end(tmp_path, long_file):
    path = tmp_path / "model.gguf"
    path.write_bytes(long_file)
    infos = list(open_gguf(path).tensors.values())
    ends = [info.offset + info.nbytes for info in infos]
    assert ends[-1] == len(long_file)
    for end in ends:
        for size in {end, end - 1} - {len(long_file)}:
            path.write_bytes(long_file[:size])
            assert message(path) == (
                f"model.gguf: found {size:,} bytes, expected {ends[-1]:,} bytes, where tensor '{infos[-1].name}' ends. "
                f"{INCOMPLETE}"
            )


def test_a_header_longer_than_the_limit_is_not_read(tmp_path):
    path = tmp_path / "model.gguf"
    length = MAX_HEADER_BYTES
    path.write_bytes(with_value(ARRAY, struct.pack("<IQ", U8, length)))
    os.truncate(path, 2 * length)
    assert message(path) == (
        "model.gguf: found the metadata key 'k' reaching to byte 33,554,481, expected all metadata and names within "
        f"the first 33,554,432 bytes. {DAMAGED}"
    )
