"""The Triton kernels as machine code of cards that are not here: no register is spilled, and roundings are exact.

``AURAFLOW_GGUF_EVERY_CARD=1`` compiles every kernel for every card; without it, a part that has found what was wrong.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
from auraflow_gguf.benchmarks.gpu import cards
from auraflow_gguf.loader.quant_types import QUANT_TYPES

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: its kernels are not compiled here"
    ),
    pytest.mark.usefixtures("_no_cache"),
]

QUANTIZED = [name for name, entry in QUANT_TYPES.items() if entry.block_size > 1]
SOME = ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ2_S"]
COMMON = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0"]
NVIDIA = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
AMD = ["gfx90a", "gfx942", "gfx1100", "gfx1201"]
DTYPES = ["*bf16", "*fp16", "*fp32"]
ROTATED = ["*i8", "smoothed", "maxima"]  # the rotating kernel: to int8, smoothed besides, and on its way to scales

if os.environ.get("AURAFLOW_GGUF_EVERY_CARD") == "1":
    CASES = [
        (card, name, dtype, rows)
        for card in NVIDIA + AMD
        for name in QUANTIZED
        for dtype in DTYPES
        for rows in (0, 1, 2, 4, 8, 16)
    ]
    CASES += [(card, name, dtype, 0) for card in NVIDIA + AMD for name in QUANTIZED for dtype in ROTATED]
else:
    CASES = [
        *(("sm_90", name, "*bf16", 0) for name in QUANTIZED),  # which moves most bytes while it computes
        *(("gfx1100", name, "*bf16", 16) for name in SOME),  # the fewest registers for the largest tile
        *(("sm_90", name, "*bf16", 1) for name in SOME),
        *(("gfx942", name, "*fp16", 8) for name in SOME),
        *(
            (card, "Q4_K", "*fp16", 0)
            for card in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx90a", "gfx1201")
        ),
        *((card, "IQ3_S", "*fp32", 0) for card in ("sm_75", "sm_120", "gfx1100")),
        *((card, "Q4_K", "*i8", 0) for card in ("sm_75", "sm_86", "sm_120", "gfx90a", "gfx1100")),
        *((card, "Q4_K", "smoothed", 0) for card in ("sm_86", "sm_120", "gfx1100")),
        *((card, "Q5_1", "*fp32", 8) for card in ("sm_120", "gfx1201")),
        ("sm_90", "IQ2_S", "*i8", 0),
        ("sm_89", "Q6_K", "maxima", 0),
    ]


@pytest.fixture
def _no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("card", "name", "dtype", "rows"), CASES)
def test_machine_code(card, name, dtype, rows):
    from .machine_code import compiled

    code = compiled(card, name, dtype, rows, bias=rows == 8)
    assert code.spilled == 0
    assert 16 <= code.registers <= 255
    assert ".ftz" not in code.text  # keeps subnormals
    if not rows and dtype != "maxima":
        assert code.widest("store") == 16
    if dtype == "*bf16" and card in NVIDIA[1:]:
        assert "cvt.rn.bf16" in code.text  # rounds to nearest even
    if (card, dtype, rows) == ("sm_90", "*bf16", 0):
        check_bound(code, card, name)


def check_bound(code, card, name):
    """The least time of an H100 to compute over the least to move the bytes, which `cards` says how to take."""
    share, pipe = cards.bound(cards.CARDS["H100 SXM"], name, cards.figures(code, card, name))
    assert share < (0.5 if name in COMMON else 1.0), pipe


@pytest.mark.parametrize(("card", "rows"), [("gfx1100", 16), ("sm_86", 16)])
def test_a_spill_is_found(card, rows, monkeypatch):
    """As it was with sixteen rows of the weight for sixteen rows of input."""
    from auraflow_gguf.loader.kernels import triton_kernels

    from .machine_code import compiled

    monkeypatch.setattr(triton_kernels, "SUMS", 512)
    assert compiled(card, "Q4_K", "*bf16", rows).spilled > 0
