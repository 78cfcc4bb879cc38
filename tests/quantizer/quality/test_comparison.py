import pytest
import torch
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.quantizer.convert import convert
from auraflow_gguf.quantizer.quality import comparison
from auraflow_gguf.quantizer.quality.comparison import compare
from safetensors.torch import save_file

from ..small_model import FIXED, diffusers_weights, native_weights

WEIGHTS = native_weights()
CHANGED = "single_layers.1.attn.w1k.weight"


@pytest.fixture
def source(tmp_path):
    save_file(WEIGHTS, tmp_path / "aura.safetensors")
    return tmp_path / "aura.safetensors"


def test_a_file_in_another_spelling_and_format_is_the_same(source, tmp_path):
    save_file(diffusers_weights(WEIGHTS), tmp_path / "diffusers.safetensors")
    convert(tmp_path / "diffusers.safetensors", tmp_path / "a.gguf", "F32", fixed=FIXED)
    for other in (tmp_path / "diffusers.safetensors", tmp_path / "a.gguf"):
        everything, differences = compare(source, other, fixed=FIXED)
        assert (everything.relative_error, everything.cosine) == (0, 1)
        assert {entry.name for entry in differences} == set(WEIGHTS)
        assert {entry.relative_error for entry in differences} == {0}


def test_a_changed_weight_is_the_worst(source, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "TILE", 1000)
    noise = torch.randn(WEIGHTS[CHANGED].shape, generator=torch.Generator().manual_seed(0))
    changed = (WEIGHTS[CHANGED].float() + 0.02 * noise).to(torch.bfloat16)
    save_file(WEIGHTS | {CHANGED: changed}, tmp_path / "b.safetensors")
    seen = []
    everything, differences = compare(
        source, tmp_path / "b.safetensors", fixed=FIXED, progress=lambda *pair: seen.append(pair)
    )
    a, b = (weight.double().flatten() for weight in (WEIGHTS[CHANGED], changed))
    worst = differences[0]
    assert worst.name == CHANGED
    assert worst.relative_error == pytest.approx(((b - a).norm() / a.norm()).item())
    assert worst.cosine == pytest.approx(torch.cosine_similarity(a, b, dim=0).item())
    assert differences[1].relative_error == 0
    whole = torch.cat([weight.double().flatten() for weight in WEIGHTS.values()])
    assert everything.relative_error == pytest.approx(((b - a).norm() / whole.norm()).item())
    total = sum(weight.numel() for weight in WEIGHTS.values())
    assert seen[-1] == (total, total)


def test_a_weight_that_vanished_and_one_that_appeared(source, tmp_path):
    zeros = torch.zeros_like(WEIGHTS[CHANGED])
    save_file(WEIGHTS | {CHANGED: zeros}, tmp_path / "b.safetensors")
    vanished = compare(source, tmp_path / "b.safetensors", fixed=FIXED)[1][0]
    assert (vanished.relative_error, vanished.cosine) == (1, 0)
    appeared = compare(tmp_path / "b.safetensors", source, fixed=FIXED)[1][0]
    assert (appeared.relative_error, appeared.cosine) == (float("inf"), 0)


def test_a_weight_with_nan_is_named_first(source, tmp_path):
    damaged = WEIGHTS[CHANGED].clone()
    damaged[3, 5] = float("nan")
    save_file(WEIGHTS | {CHANGED: damaged, "modF.1.weight": WEIGHTS["modF.1.weight"] * 2}, tmp_path / "b.safetensors")
    differences = compare(source, tmp_path / "b.safetensors", fixed=FIXED)[1]
    assert [entry.name for entry in differences[:2]] == [CHANGED, "modF.1.weight"]


def test_a_finer_type_is_closer(source, tmp_path):
    errors = []
    for type_name in ("Q8_0", "Q6_K", "Q4_K_M", "Q2_K"):
        convert(source, tmp_path / f"{type_name}.gguf", type_name, fixed=FIXED)
        errors.append(compare(source, tmp_path / f"{type_name}.gguf", fixed=FIXED)[0].relative_error)
    assert errors == sorted(errors)
    assert errors[0] < 0.01 < errors[-1]


@pytest.mark.parametrize(
    "other",
    [
        WEIGHTS | {"modF.1.bias": torch.zeros(512)},
        WEIGHTS | {"positional_encoding": torch.zeros(1, 16, 256)},
        {name: weight for name, weight in WEIGHTS.items() if not name.startswith("single_layers.1.")},
    ],
)
def test_models_of_different_tensors_are_refused(source, tmp_path, other):
    save_file(other, tmp_path / "b.safetensors")
    with pytest.raises(ModelFileError, match=r"b.safetensors: .* that only one file has: .*the tensors of aura"):
        compare(source, tmp_path / "b.safetensors", fixed=FIXED)
