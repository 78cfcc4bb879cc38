"""The C for CPUs, for tests that want it."""

from __future__ import annotations

import pytest
from auraflow_gguf.loader.kernels import native
from auraflow_gguf.loader.kernels.native import build


def build_or_skip() -> None:
    """Compiles it if it is not yet, and has it looked for anew; skips the test where there is no compiler, of which the
    C is optional for users."""
    if build._compiler() is None:
        pytest.skip("no C compiler here, without which the C for CPUs is not tested")
    build.build()
    native._library.cache_clear()
