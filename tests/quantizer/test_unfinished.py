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


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", range(5))
def test_a_removal_that_is_killed_is_gone_on_with(tmp_path, monkeypatch, calls):
    """Whatever it was about to remove; only a folder that is empty may as well have been made just now."""
    left = tmp_path / "a.gguf.89abcdef.partial"
    (left / "folder").mkdir(parents=True)
    for name in (LOCK, "copy.gguf", "folder/file"):
        (left / name).touch()
    done = []

    def until_killed(remove):
        def removing(*args, **kwargs):
            if len(done) == calls:
                raise Killed
            remove(*args, **kwargs)
            done.append(args)

        return removing

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", until_killed(os.unlink))
        patch.setattr(os, "rmdir", until_killed(os.rmdir))
        with pytest.raises(Killed):
            remove_leftovers(tmp_path / "a.gguf")
    if os.name == "nt":  # where the lock goes first, as whether it can tells whether it is held
        os.utime(left, (time.time() - 2 * YOUNG,) * 2)
    remove_leftovers(tmp_path / "a.gguf")
    assert not left.exists() or not os.listdir(left)


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
