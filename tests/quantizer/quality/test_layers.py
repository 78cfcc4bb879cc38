"""What a file says of its layers, and what of it a person reads."""

from dataclasses import replace

import pytest
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.parts import PARTS
from auraflow_gguf.quantizer.checkpoints import open_checkpoint
from auraflow_gguf.quantizer.convert import convert_checkpoint
from auraflow_gguf.quantizer.quality.groups import KINDS
from auraflow_gguf.quantizer.quality.layers import ERRORS_KEY, GROUPS_KEY, layer_report, layers_of
from auraflow_gguf.quantizer.recipe import recipe_for
from safetensors.torch import save_file

from ..small_model import FIXED, native_weights

TYPES = ("*.attn.w1q=Q8_0", "single_layers.1.mlp.c_proj=Q5_0", "modF.1=Q4_0")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes the small model in `TYPES` and Q4_0, with further metadata."""
    monkeypatch.setitem(PARTS, "transformer", replace(AURAFLOW, fixed={}))
    save_file(native_weights(), tmp_path / "aura.safetensors")

    def write(extra):
        checkpoint, target = open_checkpoint(tmp_path / "aura.safetensors"), tmp_path / "a.gguf"
        recipe = recipe_for("Q4_0", TYPES)
        convert_checkpoint(checkpoint, target, recipe, name="a", fixed=FIXED, extra=extra, overwrite=True)
        return layers_of(target, fixed=FIXED)

    return write


def test_types_bits_and_errors_stand_at_their_places(written):
    layers = written({GROUPS_KEY: ["single_layers.1 MLP out", "modF.1"], ERRORS_KEY: [0.25, 0.5]})
    assert layers.names == ("double_layers.0 text", "double_layers.0 image", "single_layers.0", "single_layers.1")
    assert list(layers.cells) == list(KINDS)
    for kind, cells in layers.cells.items():
        assert [cell.group for cell in cells] == [f"{name} {kind}" for name in layers.names]
    queries = layers.cells["q, k"]
    assert [cell.types for cell in queries] == [("Q8_0", "Q4_0"), ("Q4_0",), ("Q8_0", "Q4_0"), ("Q8_0", "Q4_0")]
    assert [cell.bits for cell in queries] == [6.5, 4.5, 6.5, 6.5]
    assert [(cell.types, cell.error) for cell in layers.cells["MLP out"]] == [(("Q4_0",), None)] * 3 + [
        (("Q5_0",), 0.25)
    ]
    others = {cell.group: cell for cell in layers.others}
    assert others["modF.1"].error == 0.5
    assert others["final_linear"].types == ("BF16",)
    assert others.keys() == {
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "init_x_linear",
        "cond_seq_linear",
        "modF.1",
        "final_linear",
    }


def test_layers_that_are_alike_are_one_line(written):
    lines = layer_report(written({})).splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [
        "by layer",
        "double_layers.0 text",
        "double_layers.0 image",
        "single_layers.0",
        "single_layers.1",
    ]
    assert lines[3].split()[1:] == ["Q8_0/Q4_0", *["Q4_0"] * 5]
    layers = written({GROUPS_KEY: ["modF.1"], ERRORS_KEY: [0.5]})
    alike = replace(layers, cells={kind: (*cells[:2], cells[3], cells[3]) for kind, cells in layers.cells.items()})
    shown = layer_report(alike)
    assert shown.splitlines()[3].split()[:2] == ["single_layers.0-1", "Q8_0/Q4_0"]
    assert "modF.1 Q4_0 0.50000" in shown.splitlines()[-1]


@pytest.mark.parametrize(
    "extra",
    [
        {GROUPS_KEY: ["modF.1"], ERRORS_KEY: [0.1, 0.2]},
        {GROUPS_KEY: ["modF.1"], ERRORS_KEY: [-1.0]},
        {GROUPS_KEY: ["modF.1"], ERRORS_KEY: [float("nan")]},
        {GROUPS_KEY: [7], ERRORS_KEY: [0.1]},
        {GROUPS_KEY: "modF.1", ERRORS_KEY: [0.1] * 6},
        {GROUPS_KEY: ["modF.1"]},
    ],
)
def test_a_table_of_errors_that_is_none_is_left_aside(written, extra):
    layers = written(extra)
    assert [cell.error for cell in layers.others] == [None] * 6
