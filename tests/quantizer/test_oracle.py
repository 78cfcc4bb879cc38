"""The packed bytes of every type that can be written are ggml's own, with an importance matrix and without."""

import numpy as np
import pytest
import torch
from auraflow_gguf.loader.kernels import native
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.quantizer import convert as module
from auraflow_gguf.quantizer.convert import convert
from auraflow_gguf.quantizer.imatrix import ImportanceMatrix, write_imatrix
from auraflow_gguf.quantizer.quantize import IN_C, quantize
from auraflow_gguf.quantizer.recipe import NEEDS_IMATRIX, RECIPES
from safetensors.torch import save_file

from .. import ggml
from ..compiled import build_or_skip
from .small_model import FIXED, native_weights

WRITABLE = [name for name in RECIPES if name in QUANT_TYPES]
ROWS, COLUMNS = 12, 512


@pytest.fixture(scope="module")
def oracle() -> ggml.Ggml:
    return ggml.load_or_skip()


def weights() -> np.ndarray:
    """Rows ``(ROWS, COLUMNS) float32`` : normal, heavy-tailed, constant, one-sided, tiny, large, sparse."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.02)
    rows[1] = random.standard_t(2, COLUMNS) * 0.02
    rows[2] = 0
    rows[3] = 0.25
    rows[4] = np.abs(rows[4])
    rows[5] = -np.abs(rows[5])
    rows[6] *= 1e-6
    rows[7] *= 1e5
    rows[8, 1:] *= 1e-4
    rows[9, random.random(COLUMNS) < 0.95] = 0
    rows[10] = np.round(rows[10] * 100) / 100  # ties
    rows[11] = np.linspace(-1, 1, COLUMNS)
    return rows


def moments() -> np.ndarray:
    values = np.exp(2 * np.random.default_rng(1).standard_normal(COLUMNS, np.float32))
    values[::37] = 0
    return values


def sparse_moments() -> np.ndarray:
    """Of two sub-blocks of three none but one column counts, or two."""
    values = np.zeros(3 * 32, np.float32)
    values[[5, 32, 63, *range(64, 96)]] = 0.25, 3, 1e-3, *moments()[1:33]
    return values


# the types that ggml makes with moments only are not among those without
CASES = [(name, None) for name in WRITABLE if name not in NEEDS_IMATRIX] + [(name, moments()) for name in WRITABLE]


@pytest.mark.parametrize(("type_name", "importance"), CASES)
def test_packed_bytes_are_ggmls(type_name, importance):
    # Since that change ggml adds up IQ1_M's sums in another order, which libgguf does not have yet.
    oracle = ggml.load_or_skip(ggml.BEFORE_FASTER_IQ1_M if type_name == "IQ1_M" else ggml.NEWEST)
    quant_type = QUANT_TYPES[type_name]
    every = 11 if type_name.startswith(("IQ1", "IQ2")) else 1  # those take ten thousand weights a second
    for rows in (weights(), np.ascontiguousarray(hard_rows()[::every])):
        columns = None if importance is None else np.resize(importance, rows.shape[1])
        ours = quantize(torch.from_numpy(rows), quant_type, columns)
        np.testing.assert_array_equal(ours, oracle.quantize(rows, quant_type, columns))


def hard_rows() -> np.ndarray:
    """``(n, 768) float32``: what the search for scales meets at its edges, in rows of an odd number of blocks."""
    random = np.random.default_rng(2)
    normal = random.standard_normal((16, 768), np.float32)
    sub_blocks = normal.reshape(-1, 32)
    flat, faint, nearly_flat = sub_blocks.copy(), sub_blocks.copy(), sub_blocks.copy()
    flat[::3] = flat[::3, :1]
    faint[::5] *= 1e-6
    nearly_flat[::2] = 1 + nearly_flat[::2] * np.float32(1e-7)
    bits = random.integers(0, 2**32, normal.shape, dtype=np.uint32).view(np.float32)
    any_bits = np.where(np.abs(bits) < 60000, bits, 0)  # NaN too becomes 0
    denormal = normal * np.float32(1e-40)
    bfloat16 = (normal.view(np.uint32) & 0xFFFF0000).view(np.float32)
    rows = [flat, faint, nearly_flat, any_bits, denormal, bfloat16, np.abs(normal), -np.abs(normal), normal * 1e4]
    signed_zeros = np.where(normal > 0.5, normal, np.copysign(np.float32(0), normal))
    rows += [np.round(normal), signed_zeros, -signed_zeros]  # ties, of both signs too
    return np.concatenate([part.reshape(-1, 768) for part in rows]).astype(np.float32)


@pytest.mark.parametrize("in_c", [True, False], ids=["c", "libgguf"])
@pytest.mark.parametrize("importance", [None, moments(), sparse_moments()], ids=["plain", "imatrix", "sparse"])
@pytest.mark.parametrize("type_name", IN_C)
def test_packed_bytes_of_hard_rows(oracle, type_name, importance, in_c, monkeypatch):
    if not in_c:
        monkeypatch.setattr(native, "function", lambda source, name: None)
    else:
        build_or_skip()
        assert native.function(IN_C[type_name], f"quantize_{type_name.lower()}")
    quant_type = QUANT_TYPES[type_name]
    every, size = hard_rows(), quant_type.block_size
    for rows in (every, every[:5, : 3 * size], every[:1, :size]):
        rows = np.ascontiguousarray(rows)
        columns = None if importance is None else np.resize(importance, rows.shape[1])
        ours = quantize(torch.from_numpy(rows), quant_type, columns)
        np.testing.assert_array_equal(ours, oracle.quantize(rows, quant_type, columns))


@pytest.mark.parametrize("with_moments", [False, True], ids=["plain", "imatrix"])
def test_a_converted_files_bytes_are_ggmls(oracle, tmp_path, with_moments, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100_000)
    model = native_weights()
    save_file(model, tmp_path / "aura.safetensors")
    matrix = ImportanceMatrix()
    if with_moments:
        generator = torch.Generator().manual_seed(2)
        for name, weight in model.items():
            matrix.add(name, torch.randn(3, weight.shape[-1], generator=generator))
        write_imatrix(tmp_path / "imatrix.gguf", matrix)
    imatrix = tmp_path / "imatrix.gguf" if with_moments else None
    convert(tmp_path / "aura.safetensors", tmp_path / "aura.gguf", "Q4_K_M", imatrix=imatrix, fixed=FIXED)
    file = module.open_checkpoint(tmp_path / "aura.gguf")
    checked = 0
    for name, weight in model.items():
        if stored := file.packed(name):
            quant_type, rows = stored
            expected = oracle.quantize(weight.float().numpy(), quant_type, matrix.moments(name))
            np.testing.assert_array_equal(rows.numpy(), expected)
            checked += 1
    embedders = ("t_embedder.mlp.0", "t_embedder.mlp.2", "cond_seq_linear", "modF.1")
    assert checked == sum("_layers." in name for name in model) + len(embedders)
