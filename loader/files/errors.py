"""The one error that a person sees when a model file cannot be used, and how names of a file are shown in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice

SHOWN_NAMES = 5
SHOWN_CHARACTERS = 80


class ModelFileError(ValueError):
    """A model file that cannot be used, said in a sentence a person can act on.

    Args:
        path: the file; the message names its last component.
        found: what the file is or holds ("a Flux transformer", "byte 0x00 where …").
        expected: what was wanted there.
        advice: what the person can do, one or more full sentences.

    The message is ``<file name>: found <found>, expected <expected>. <advice>``.
    """

    def __init__(self, path: str | os.PathLike, *, found: str, expected: str, advice: str):
        self.path = os.fspath(path)
        self.found = found
        self.expected = expected
        self.advice = advice
        name = os.path.basename(os.path.normpath(self.path))
        super().__init__(f"{name}: found {found}, expected {expected}. {advice}")

    def __reduce__(self):
        return _rebuild, (self.path, self.found, self.expected, self.advice)


def _rebuild(path: str, found: str, expected: str, advice: str) -> ModelFileError:
    return ModelFileError(path, found=found, expected=expected, advice=advice)


def listed(names: Sequence[object]) -> str:
    """The first few names, made safe to print, and how many more there are."""
    first = ", ".join(shown(name) for name in islice(names, SHOWN_NAMES))
    more = len(names) - SHOWN_NAMES
    return f"{first} and {more} more" if more > 0 else first


def shown(name: object) -> str:
    """A name out of a file, made safe to print, and cut off where it is long."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
