"""The Triton kernels without a GPU: their bits, in Triton's interpreter; and life without Triton."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from auraflow_gguf.loader import kernels
from auraflow_gguf.loader.kernels import gpu
from auraflow_gguf.loader.quant_types import QUANT_TYPES

from ..quant_types.blocks import random_blocks

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its kernels are not tested here"
)
ROOT = Path(__file__).resolve().parents[3]


@needs_triton
def test_in_the_interpreter():
    # Triton decides when it is imported whether it interprets; torch may have imported it here already.
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/loader/kernels/in_interpreter.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(child.stdout[-20_000:], child.stderr[-5_000:])
    assert child.returncode == 0
    assert "skipped" not in child.stdout


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S"])
def test_torch_dequantizes_some_rows_at_a_time(monkeypatch, name):
    packed = torch.from_numpy(random_blocks(name, 7 * 3)).view(7, -1)
    expected = QUANT_TYPES[name].dequantize(packed, torch.bfloat16)
    for weights in (1, 256 * 3 * 2, 1 << 24):
        monkeypatch.setattr(gpu, "WEIGHTS_IN_TORCH", weights)
        assert torch.equal(gpu._dense_in_torch(packed, QUANT_TYPES[name], torch.bfloat16), expected)


def test_a_full_device_does_not_end_triton_there(monkeypatch):
    monkeypatch.setattr(gpu, "_without_triton", set())

    def full():
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        gpu._launched(full, torch.device("cpu"))
    assert not gpu._without_triton


@needs_triton
@pytest.mark.parametrize("hip", [None, "7.0"])
def test_a_kernel_that_spills_is_launched_with_all_registers(hip, monkeypatch):
    from auraflow_gguf.loader.kernels import triton_kernels

    class Compiled:
        """As Triton gives one that is launched: this spills wherever its registers are the compiler's to choose."""

        __name__ = "compiled"

        def __getitem__(self, grid):
            return self.launch

        def launch(self, out, *, KIND, num_warps, maxnreg=None):
            launches.append((out.dtype, KIND, maxnreg))
            return SimpleNamespace(n_spills=2 if maxnreg is None and KIND == "spilling" else 0)

    launches, expected = [], []
    monkeypatch.setattr(triton_kernels, "_spilling", set())
    monkeypatch.setattr(torch.version, "hip", hip)
    for turn in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            for variant in ("spilling", "other"):
                out = torch.empty(4, dtype=dtype)
                triton_kernels._launch(Compiled(), 1, (out,), (variant,), {"num_warps": 4}, KIND=variant)
                spills = variant == "spilling" and not hip
                expected += [(dtype, variant, None)] * (turn == 0 or not spills) + [(dtype, variant, 255)] * spills
    assert launches == expected


@pytest.fixture
def _fresh(monkeypatch):
    """Triton as if it had not been tried."""
    monkeypatch.setattr(gpu, "_without_triton", set())
    gpu._triton_kernels.cache_clear()
    yield
    gpu._triton_kernels.cache_clear()


def random_weight(name):
    return torch.randint(0, 256, (6, QUANT_TYPES[name].row_bytes(512)), dtype=torch.uint8).bitwise_and_(0x3B)


def check_linear(name, rows):
    input, packed = torch.randn(rows, 512), random_weight(name)
    expected = torch.nn.functional.linear(input, QUANT_TYPES[name].dequantize(packed))
    assert torch.equal(gpu.linear(input, packed, QUANT_TYPES[name], None), expected)


@needs_triton
@pytest.mark.usefixtures("_fresh")
def test_where_triton_does_not_work(caplog):
    # As on a CPU, which is none of its devices.
    with caplog.at_level(logging.INFO, logger=gpu.logger.name):
        for name in ("Q4_K", "Q8_0"):
            check_linear(name, 3)
            check_linear(name, 30)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "does not work on cpu" in record.getMessage()


@pytest.mark.usefixtures("_fresh")
def test_where_triton_is_missing(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("triton_kernels", "triton_formulas"):
        monkeypatch.delitem(sys.modules, f"{kernels.__name__}.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    with caplog.at_level(logging.INFO, logger=gpu.logger.name):
        check_linear("Q4_K", 3)
        check_linear("Q6_K", 30)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "Triton is not installed" in record.getMessage()
