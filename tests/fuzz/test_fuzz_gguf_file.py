"""The reader against 7,000 broken and valid files: it gives a right result or its own error. `dev.py fuzz` has more."""

import pytest
from auraflow_gguf.loader.files.gguf_file import open_gguf
from hypothesis import given, settings

from ..loader.files.gguf_bytes import ARRAY, gguf_bytes
from .gguf_mutator import PART_NAMES, Report, check, fuzz, traced_memory
from .gguf_structured import descriptions, lies

MUTATED = 6_000
STRUCTURED = 400


def test_mutated_files(tmp_path):
    report = fuzz(MUTATED, seed=0, folder=tmp_path)
    assert report.opened > MUTATED / 50
    assert report.refused > MUTATED / 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / PART_NAMES[0]


@settings(max_examples=STRUCTURED, derandomize=True, deadline=None, database=None)
@given(description=descriptions())
def test_described_files_are_read_as_described(path, description):
    path.write_bytes(gguf_bytes(**description))
    file = open_gguf(path)
    assert file.version == description["version"]
    assert {key: as_lists(value) for key, value in file.metadata.items()} == {
        key: elements(kind, value) for key, kind, value in description["metadata"]
    }
    assert list(file.tensors) == [tensor.name for tensor in description["tensors"]]
    for tensor in description["tensors"]:
        info = file.tensors[tensor.name]
        assert info.shape == tensor.sizes[::-1]
        assert info.type.id == tensor.type_id
        assert file.packed(tensor.name).numpy().tobytes() == tensor.data


@settings(max_examples=STRUCTURED, derandomize=True, deadline=None, database=None)
@given(content=lies())
def test_files_with_a_lie(path, content):
    path.write_bytes(content)
    with traced_memory():
        check(path, Report())


def as_lists(value):
    return value if isinstance(value, (int, float, str)) else [as_lists(element) for element in value]


def elements(kind, value):
    if kind != ARRAY:
        return value
    element_kind, values = value
    return [elements(element_kind, element) for element in values]
