from dataclasses import replace

import pytest
import torch
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.quantizer import inspection
from auraflow_gguf.quantizer.convert import convert
from auraflow_gguf.quantizer.inspection import describe, verify
from safetensors.torch import save_file

from .small_model import FIXED, native_weights

WEIGHTS = native_weights()


@pytest.fixture
def model(tmp_path):
    save_file(WEIGHTS, tmp_path / "aura.safetensors")
    convert(tmp_path / "aura.safetensors", tmp_path / "aura.gguf", "Q4_K_M", fixed=FIXED)
    return tmp_path / "aura.gguf"


def damage(path, name, offset, data):
    """Write bytes at an offset from a tensor's first."""
    start = open_gguf(path).tensors[name].offset
    with open(path, "r+b") as file:
        file.seek(start + offset)
        file.write(data)


def test_describe(model):
    description = describe(model, fixed=FIXED)
    assert (description.model, description.spelling, description.prefix) == ("an AuraFlow transformer", "native", "")
    assert description.annotated
    assert description.metadata["general.name"] == "aura"
    assert description.texts["general.file_type"] == "15 (Q4_K_M)"
    assert replace(description, metadata={"general.file_type": 9999}).texts == {"general.file_type": "9999"}
    assert replace(description, metadata={}).texts == {}
    assert description.dimensions["single_layers"] == 2
    groups = {group.name: group for group in description.groups}
    assert groups["modulation"].types == {"Q4_K": 4, "Q8_0": 1}
    assert groups["modulation"].weights == (4 * 6 + 2) * 256 * 256
    assert 4.5 < groups["modulation"].bits_per_weight < 5
    assert description.memory["without_cache"] - description.memory["with_cache"] == groups["modulation"].nbytes
    assert groups["attention"].types == {"Q4_K": 8, "Q5_K": 8}
    assert groups["MLP"].types == {"Q5_K": 12}
    assert description.total.weights == sum(weight.numel() for weight in WEIGHTS.values())
    assert description.total.weights == sum(group.weights for group in description.groups[:-1])
    file = open_gguf(model)
    assert description.total.nbytes == sum(info.nbytes for info in file.tensors.values())


def test_a_sound_file_has_no_problems(model):
    seen = []
    assert verify(model, fixed=FIXED, progress=lambda done, total: seen.append((done, total))) == []
    total = sum(weight.numel() for weight in WEIGHTS.values())
    assert seen[-1] == (total, total)


def test_damaged_scales_are_counted(model, monkeypatch):
    monkeypatch.setattr(inspection, "TILE", 1 << 14)
    nan = torch.tensor([float("nan")], dtype=torch.float16).numpy().tobytes()
    infinity = torch.tensor([float("inf")], dtype=torch.float16).numpy().tobytes()
    damage(model, "single_layers.1.attn.w1q.weight", 0, nan)
    damage(model, "single_layers.1.attn.w1q.weight", 255 * 144, infinity)
    damage(
        model, "final_linear.weight", 100, torch.tensor([float("nan")], dtype=torch.bfloat16).view(torch.uint8).numpy()
    )
    assert sorted(verify(model, fixed=FIXED)) == [
        "final_linear.weight (BF16): 1 of 4096 numbers have NaN or infinity.",
        "single_layers.1.attn.w1q.weight (Q4_K): 2 of 256 blocks have NaN or infinity.",
    ]


def test_a_file_cut_off_and_contradicting_annotations_are_refused(model):
    content = model.read_bytes()
    value = content.index(b"native", content.index(b"aura.tensor_names"))
    model.write_bytes(content[:value] + b"nativx" + content[value + 6 :])
    with pytest.raises(ModelFileError, match=r"aura\.tensor_names = .?nativx"):
        verify(model, fixed=FIXED)
    model.write_bytes(content[:-5000])
    with pytest.raises(ModelFileError, match="The download is incomplete"):
        verify(model, fixed=FIXED)
