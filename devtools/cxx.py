"""The C++ compiler that the simulated accelerator of tests/device is built with."""

from __future__ import annotations

import os
import shutil
import sys


class NoCompiler(Exception):
    """There is nothing here to compile C++ with; the message says what would do."""


def compiler() -> str:
    """The path of the C++ compiler.

    Raises:
        NoCompiler: there is none, or this is Windows, where PyTorch's libraries want another one.
    """
    if sys.platform == "win32":
        raise NoCompiler("the simulated accelerator is not built on Windows")
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if found := next(filter(None, (shutil.which(name) for name in names if name)), None):
        return found
    raise NoCompiler("no C++ compiler was found to build the simulated accelerator; install g++, or name one as CXX")
