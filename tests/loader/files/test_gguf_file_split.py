"""Files split into parts."""

import gguf
import numpy as np
import pytest
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf

from .gguf_bytes import I32, STRING, U16, Tensor, gguf_bytes


def part(number, count=3, *, names=None, tensor_count=3, metadata=()):
    names = [f"t{number}"] if names is None else names
    split = [("split.no", U16, number), ("split.count", U16, count), ("split.tensors.count", I32, tensor_count)]
    return gguf_bytes([*metadata, *split], [Tensor(name, (8,), 0, bytes([number]) * 32) for name in names])


def write_parts(folder, parts, count=3):
    paths = [folder / f"model-{number + 1:05d}-of-{count:05d}.gguf" for number in range(len(parts))]
    for path, content in zip(paths, parts, strict=True):
        if content is not None:
            path.write_bytes(content)
    return paths


def message(path):
    with pytest.raises(ModelFileError) as error:
        open_gguf(path)
    return str(error.value)


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_any_part_opens_all(tmp_path, opened):
    first = part(0, metadata=[("general.architecture", STRING, "aura")])
    paths = write_parts(tmp_path, [first, part(1), part(2)])
    file = open_gguf(paths[opened])
    assert file.path == str(paths[opened])
    assert file.metadata["general.architecture"] == "aura"
    assert [(info.name, info.part) for info in file.tensors.values()] == [("t0", 0), ("t1", 1), ("t2", 2)]
    for number in range(3):
        assert file.packed(f"t{number}").tolist() == [number] * 32


def test_a_first_part_without_tensors(tmp_path):
    paths = write_parts(tmp_path, [part(0, names=[]), part(1, names=["a", "b"]), part(2)])
    assert list(open_gguf(paths[0]).tensors) == ["a", "b", "t2"]


def test_files_split_by_gguf_py(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "aura", split_max_tensors=2)
    for number in range(5):
        writer.add_tensor(f"t{number}", np.full((2, 32), number, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "model-00001-of-00003.gguf")
    assert [info.part for info in file.tensors.values()] == [0, 0, 1, 1, 2]
    for number in range(5):
        assert file.packed(f"t{number}").numpy().view(np.float32).tolist() == [number] * 64


def test_a_merged_file_says_zero_parts(tmp_path):
    path = tmp_path / "merged.gguf"
    path.write_bytes(part(0, count=0, names=["a", "b", "c"]))
    assert list(open_gguf(path).tensors) == ["a", "b", "c"]


def test_a_whole_file_may_be_named_like_a_part(tmp_path):
    path = tmp_path / "model-00001-of-00003.gguf"
    path.write_bytes(gguf_bytes([], [Tensor("a", (8,), 0, bytes(32))]))
    assert list(open_gguf(path).tensors) == ["a"]


def test_missing_part_is_named(tmp_path):
    paths = write_parts(tmp_path, [part(0), None, part(2)])
    assert message(paths[0]) == (
        "model-00001-of-00003.gguf: found part 1 of 3, with 3 tensors in all, expected model-00002-of-00003.gguf "
        "beside it. Download the missing parts into the same folder."
    )


def test_many_missing_parts_are_counted(tmp_path):
    paths = write_parts(tmp_path, [part(0, count=7)], count=7)
    assert (
        "expected model-00002-of-00007.gguf, model-00003-of-00007.gguf, model-00004-of-00007.gguf and 3 more beside it."
        in message(paths[0])
    )


def test_renamed_part(tmp_path):
    path = tmp_path / "renamed.gguf"
    path.write_bytes(part(0))
    assert message(path) == (
        "renamed.gguf: found part 1 of 3, with 3 tensors in all, expected a name that ends in -00001-of-00003.gguf. "
        "Give all parts the names they were downloaded with, and keep them in one folder."
    )


FOREIGN = {
    "other number": (
        [part(0), part(2), part(2)],
        "model-00002-of-00003.gguf: found part 3 of 3, with 3 tensors in all, expected part 2 of 3, with 3 tensors in "
        "all. ",
    ),
    "other count": (
        [part(0), part(1, count=4), part(2)],
        "model-00002-of-00003.gguf: found part 2 of 4, with 3 tensors in all, expected part 2 of 3, with 3 tensors in "
        "all. ",
    ),
    "other model": (
        [part(0), part(1), part(2, tensor_count=331)],
        "model-00003-of-00003.gguf: found part 3 of 3, with 331 tensors in all, expected part 3 of 3, with 3 tensors "
        "in all. ",
    ),
    "whole file": (
        [part(0), part(1), gguf_bytes()],
        "model-00003-of-00003.gguf: found part 1 of 1, with 0 tensors in all, expected part 3 of 3, with 3 tensors in "
        "all. ",
    ),
    "same tensor": (
        [part(0), part(1), part(2, names=["t0"])],
        "model-00003-of-00003.gguf: found tensor 't0', which an earlier part has too, expected each tensor in one "
        "part. ",
    ),
    "tensor too few": (
        [part(0), part(1), part(2, names=[])],
        "model-00001-of-00003.gguf: found 2 tensors in all parts together, expected 3. ",
    ),
}


@pytest.mark.parametrize(("parts", "expected"), FOREIGN.values(), ids=FOREIGN)
def test_parts_that_do_not_belong_together(tmp_path, parts, expected):
    paths = write_parts(tmp_path, parts)
    assert message(paths[0]) == expected + "Download all parts of one model again, into a folder of their own."


def test_a_broken_part_is_the_one_named(tmp_path):
    paths = write_parts(tmp_path, [part(0), part(1), part(2)[:-1]])
    assert message(paths[0]).startswith("model-00003-of-00003.gguf: found ")


@pytest.mark.parametrize(
    ("number", "count", "expected"),
    [
        (3, 3, "found split.no = 3 in a file split in 3, expected a number from 0 to 2."),
        (0, 1001, "found a file split in 1,001, expected at most 1,000 parts."),
    ],
)
def test_impossible_parts(tmp_path, number, count, expected):
    path = tmp_path / "model.gguf"
    path.write_bytes(part(number, count=count))
    assert expected in message(path)
