"""A fused module cut into those of its weights: ComfyUI's own change of the fused weight, row by row."""

from __future__ import annotations

import comfy.lora
import pytest
import torch
from auraflow_gguf.loader.comfyui.fused import NotSeparable, split

WEIGHTS, ROWS, COLUMNS = 3, 16, 20
ALL = WEIGHTS * ROWS
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


LORA = {".lora_up.weight": random(ALL, 4), ".lora_down.weight": random(4, COLUMNS)}
PEFT = {".lora_B.weight": random(ALL, 4), ".lora_A.weight": random(4, COLUMNS)}
OLD_DIFFUSERS = {"_lora.up.weight": random(ALL, 4), "_lora.down.weight": random(4, COLUMNS)}
LENGTHS = {".dora_scale": random(ALL, 1).abs()}
ALPHA = {".alpha": torch.tensor(2.0)}
LOHA = {".hada_w1_a": random(ALL, 3), ".hada_w1_b": random(3, COLUMNS)}
LOHA |= {".hada_w2_a": random(ALL, 3), ".hada_w2_b": random(3, COLUMNS)}
LOKR = {".lokr_w1": random(6, 5), ".lokr_w2": random(8, 4)}  # each weight has two blocks of eight rows
LOKR_ACROSS = {".lokr_w1": random(4, 5), ".lokr_w2": random(12, 4)}  # one and a third of a block of twelve
LOKR_RANKS = {".lokr_w1_a": random(4, 2), ".lokr_w1_b": random(2, 5)}
LOKR_RANKS |= {".lokr_w2_a": random(12, 3), ".lokr_w2_b": random(3, 4)}
LOKR_ONE = {".lokr_w1": random(1, 1), ".lokr_w2": random(ALL, COLUMNS)}

KINDS = {
    "lora": (LORA, 1),
    "lora with alpha": (LORA | ALPHA, 1),
    "lora of PEFT": (PEFT, 1),
    "lora of older diffusers": (OLD_DIFFUSERS, 1),
    "DoRA": (LORA | LENGTHS | ALPHA, 1),
    "LoHa": (LOHA | ALPHA, 1),
    "LoHa with DoRA": (LOHA | LENGTHS, 1),
    "LoKr": (LOKR | ALPHA, 1),
    "LoKr with DoRA": (LOKR | LENGTHS, 1),
    "LoKr whose blocks reach across": (LOKR_ACROSS, 3),
    "LoKr in ranks whose blocks reach across": (LOKR_RANKS | ALPHA, 3),
    "LoKr of one block, with DoRA": (LOKR_ONE | LENGTHS, 1),
    "difference": ({".diff": random(ALL, COLUMNS)}, 1),
    "whole weight": ({".set_weight": random(ALL, COLUMNS)}, 1),
}


def changed(weight: torch.Tensor, modules: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The weight with ComfyUI's patches of modules that are all for it."""
    patches = []
    for tensors in modules:
        state = {f"module{suffix}": tensor for suffix, tensor in tensors.items()}
        (patch,) = comfy.lora.load_lora(state, {"module": "weight"}).values()
        patches.append((0.7, patch, 1.0, None, None))
    return comfy.lora.calculate_weight(patches, weight.clone(), "weight")


@pytest.mark.parametrize("kind", KINDS)
def test_the_changes_of_the_parts_are_that_of_the_whole(kind):
    tensors, terms = KINDS[kind]
    weight = random(ALL, COLUMNS)
    expected = changed(weight, [tensors]).split(ROWS)
    parts = split(tensors, WEIGHTS, ROWS)
    assert [len(part) for part in parts] == [terms] * WEIGHTS
    for own, part, whole in zip(weight.split(ROWS), parts, expected, strict=True):
        torch.testing.assert_close(changed(own, part), whole)
        assert not torch.allclose(own, whole)


def test_a_bias_is_cut():
    parts = split({".diff_b": torch.arange(ALL)}, WEIGHTS, ROWS)
    assert [part[0][".diff_b"].tolist() for part in parts] == [list(range(t, t + ROWS)) for t in (0, 16, 32)]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({".oft_blocks": random(4, 12, 12)}, "has oft_blocks, which acts on all of its rows together"),
        ({".a1.weight": random(4, 4)}, "has a1.weight"),
        (LORA | {".lora_mid.weight": random(4, 4)}, "has lora_mid.weight"),
        (LORA | {".dora_scale": random(1, COLUMNS)}, "has 1 rows in dora_scale, not 3 times 16"),
        ({**LORA, ".lora_up.weight": random(ALL - 1, 4)}, "has 47 rows in lora_up.weight, not 3 times 16"),
        (LOKR_ACROSS | LENGTHS, "is a LoKr with DoRA, whose blocks of rows reach"),
        ({".lokr_w1": random(5, 5), ".lokr_w2": random(8, 4)}, "is a LoKr of another number of rows than 48"),
    ],
)
def test_what_cannot_be_cut_is_refused(tensors, reason):
    with pytest.raises(NotSeparable, match=reason):
        split(tensors, WEIGHTS, ROWS)
