"""The Triton kernels without a GPU: bits in the interpreter, machine code for several GPUs; and life without Triton."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

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


def compiled_for(target, kernel, name, dtype, **constants):
    """What Triton makes of a kernel for ``("cuda", 80, 32)``, or another (backend, architecture, threads of a warp)."""
    import triton
    from auraflow_gguf.loader.kernels import triton_kernels
    from triton.backends.compiler import GPUTarget

    formula = triton_kernels.FORMULAS[name]
    types = {"out": dtype, "input": dtype, "packed": "*u8", "table": "*i8"}
    constants |= {
        "WEIGHTS": formula.weights,
        "BLOCK_SIZE": QUANT_TYPES[name].block_size,
        "TYPE_SIZE": QUANT_TYPES[name].type_size,
    }
    if formula.grid is None:
        constants["table"] = None
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(*target)).asm


def dequantize_kernel_for(target, name, dtype="*bf16"):
    from auraflow_gguf.loader.kernels import triton_kernels

    blocks = triton_kernels.DEQUANTIZED_AT_ONCE // QUANT_TYPES[name].block_size
    return compiled_for(target, triton_kernels.dequantize_kernel, name, dtype, BLOCKS=blocks)


@pytest.fixture
def _no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


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


NVIDIA = ("cuda", 80, 32)
QUANTIZED = [name for name, entry in QUANT_TYPES.items() if entry.block_size > 1]


@needs_triton
@pytest.mark.usefixtures("_no_cache")
@pytest.mark.parametrize("name", QUANTIZED)
def test_machine_code_for_nvidia(name):
    ptx = dequantize_kernel_for(NVIDIA, name)["ptx"]
    assert "cvt.rn.bf16" in ptx  # rounds to nearest even
    assert "st.global.v4.b32" in ptx  # 16 bytes of the weight by each thread
    assert ".ftz" not in ptx  # keeps subnormals
    assert ".local" not in ptx  # spills no registers


@needs_triton
@pytest.mark.usefixtures("_no_cache")
@pytest.mark.parametrize("target", [("cuda", 75, 32), ("cuda", 120, 32), ("hip", "gfx942", 64), ("hip", "gfx1100", 32)])
def test_machine_code_for_other_gpus(target):
    for name, dtype in (("Q4_K", "*bf16"), ("IQ4_NL", "*fp16"), ("IQ3_S", "*fp32")):
        assert dequantize_kernel_for(target, name, dtype)


@needs_triton
@pytest.mark.usefixtures("_no_cache")
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ2_S"])
@pytest.mark.parametrize(("input_rows", "dtype"), [(1, "*bf16"), (8, "*fp32")])
def test_machine_code_of_the_product(name, input_rows, dtype):
    from auraflow_gguf.loader.kernels import triton_kernels

    tile = {
        "BLOCKS": triton_kernels.WEIGHT_COLUMNS // QUANT_TYPES[name].block_size,
        "INPUT_ROWS": input_rows,
        "WEIGHT_ROWS": triton_kernels.WEIGHT_ROWS,
        "bias": None,
    }
    assert ".ftz" not in compiled_for(NVIDIA, triton_kernels.linear_kernel, name, dtype, **tile)["ptx"]


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
