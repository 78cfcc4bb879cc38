"""What is unfinished is removed when nobody works at it any more, and at no other time."""

import os
import time

import pytest
from auraflow_gguf.quantizer.unfinished import LOCK, YOUNG, open_unfinished, remove_leftovers, unfinished_folder


def test_leftovers_of_the_target_are_removed(tmp_path):
    """As a killed process leaves them: held by nobody."""
    target = tmp_path / "a[1].gguf"
    others = [tmp_path / name for name in ("a.gguf.01234567.partial", "a[1].gguf.partial", "a[1].gguf.0123.partial")]
    for path in (*others, tmp_path / "a[1].gguf.01234567.partial"):
        path.write_bytes(b"half")
    left = tmp_path / "a[1].gguf.89abcdef.partial"
    left.mkdir()
    for name in (LOCK, "copy.gguf"):
        (left / name).touch()
    remove_leftovers(target)
    assert sorted(tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("make", [open_unfinished, unfinished_folder])
def test_what_is_worked_at_stays(tmp_path, make):
    target = tmp_path / "a.gguf"
    with make(target) as first:
        with make(target) as second:
            remove_leftovers(target)
            assert len(os.listdir(tmp_path)) == 2
            for unfinished in (first, second):
                assert os.path.exists(
                    getattr(unfinished, "name", unfinished) if make is open_unfinished else unfinished
                )
        remove_leftovers(target)
        assert len(os.listdir(tmp_path)) == 1
    remove_leftovers(target)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_just_made_stays(tmp_path):
    folder = tmp_path / "a.gguf.01234567.partial"
    folder.mkdir()
    remove_leftovers(tmp_path / "a.gguf")
    assert folder.exists()
    os.utime(folder, (time.time() - 2 * YOUNG,) * 2)
    remove_leftovers(tmp_path / "a.gguf")
    assert not folder.exists()
