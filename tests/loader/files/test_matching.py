"""The general mechanism, on a made-up architecture that shares nothing with AuraFlow."""

import pickle

import pytest
from auraflow_gguf.loader.files.architecture import PREFIXES, Architecture, Row, Size, linear
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.matching import Source, TensorsError, annotations, match

WIDTH, INNER, CELLS = Size("width"), Size("inner"), Size("cells")

TOY = Architecture(
    name="toy",
    title="a toy transformer",
    advice="Pick a toy.",
    rows=(
        Row("grid", "embed.grid", (1, CELLS, WIDTH), bare=True),
        *linear("enter", "proj_in", (WIDTH, 4), bias=True),
        *linear("trunk.blocks.{}.up", "layers.{}.ff.0", (2 * INNER, WIDTH)),
        *linear("trunk.blocks.{}.down", "layers.{}.ff.1", (WIDTH, INNER)),
        *linear("tail.{}.mix", "tails.{}.mixer", (WIDTH, WIDTH)),
        *linear("leave.1", "proj_out", (2 * WIDTH, WIDTH), swap_halves=True),
    ),
    layers={"trunk.blocks": 1, "tail": 0},
    fixed={"width": 6},
    square=("cells",),
    annotations={"block_count": ("trunk.blocks", "tail"), "embedding_length": ("width",), "head_count": ("heads",)},
)


def toy(blocks=2, tails=0, width=6, inner=5, cells=9):
    shapes = {"grid": (1, cells, width), "enter.weight": (width, 4), "enter.bias": (width,)}
    for i in range(blocks):
        shapes[f"trunk.blocks.{i}.up.weight"] = (2 * inner, width)
        shapes[f"trunk.blocks.{i}.down.weight"] = (width, inner)
    for i in range(tails):
        shapes[f"tail.{i}.mix.weight"] = (width, width)
    return shapes | {"leave.1.weight": (2 * width, width)}


def read(shapes, metadata=None, fixed=None):
    return match(TOY, shapes, metadata=metadata or {}, path="folder/toy.gguf", fixed=fixed)


def refused(shapes, metadata=None):
    with pytest.raises(ModelFileError) as caught:
        read(shapes, metadata)
    return caught.value


def in_diffusers(shapes):
    return {TOY.spell(name, "diffusers"): shape for name, shape in shapes.items()}


def test_dimensions_come_from_the_shapes():
    result = read(toy(blocks=3, tails=1))
    assert (result.spelling, result.prefix, result.skipped) == ("native", "", ())
    assert result.dimensions == {"width": 6, "inner": 5, "cells": 9, "trunk.blocks": 3, "tail": 1}
    assert result.weights == {name: Source(name, shape, False) for name, shape in toy(blocks=3, tails=1).items()}


def test_the_names_of_compiled_modules():
    """torch.compile's addition at the front, after a prefix, and in the middle; it is no part of the model's names."""
    names = {}
    for number, name in enumerate(toy()):
        names[name] = ("_orig_mod.model." + name, "model._orig_mod." + name, "model." + name)[number % 3]
    names["trunk.blocks.1.up.weight"] = "model.trunk.blocks.1._orig_mod.up._orig_mod.weight"
    result = read({names[name]: shape for name, shape in toy().items()})
    assert (result.prefix, result.skipped) == ("model.", ())
    assert {name: source.name for name, source in result.weights.items()} == names
    error = refused({f"_orig_mod.{name}": shape for name, shape in toy().items()} | {"_orig_mod.extra": (1,)})
    assert error.tensors == ("_orig_mod.extra",)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_in_both_spellings(prefix):
    native = toy(tails=2)
    for spelling, shapes in (("native", native), ("diffusers", in_diffusers(native))):
        result = read({prefix + name: shape for name, shape in shapes.items()})
        assert (result.spelling, result.prefix) == (spelling, prefix)
        assert list(result.weights) == list(native)
        assert {name: source.shape for name, source in result.weights.items()} == native
        assert [source.name for source in result.weights.values()] == [prefix + name for name in shapes]


def test_halves_are_swapped_in_diffusers_only():
    biased = toy() | {"leave.1.bias": (12,)}
    assert not any(source.swap_halves for source in read(biased).weights.values())
    swapped = {name for name, source in read(in_diffusers(biased)).weights.items() if source.swap_halves}
    assert swapped == {"leave.1.weight", "leave.1.bias"}


def test_layer_numbers_are_not_order():
    shapes = dict(reversed(toy(blocks=12).items()))
    assert read(shapes).dimensions["trunk.blocks"] == 12
    assert list(read(shapes).weights) == list(shapes)


def test_other_parts_are_skipped():
    others = {"vae.decoder.conv_in.weight": (4, 4), "text_encoders.t5.enter.weight": (6, 4)}
    result = read({"model." + name: shape for name, shape in toy().items()} | others)
    assert result.prefix == "model."
    assert result.skipped == tuple(others)
    assert len(result.weights) == len(toy())


def test_an_optional_bias_is_there_when_the_file_has_it():
    assert "trunk.blocks.1.up.bias" not in read(toy()).weights
    biased = toy() | {"trunk.blocks.1.up.bias": (10,)}
    assert read(biased).weights["trunk.blocks.1.up.bias"] == Source("trunk.blocks.1.up.bias", (10,), False)


def test_fixed_dimensions_can_be_relaxed():
    assert refused(toy(width=8)).tensors[0] == "grid"
    assert read(toy(width=8), fixed={}).dimensions["width"] == 8
    assert read(toy(width=8), fixed={"heads": 2}).dimensions["heads"] == 2


@pytest.mark.parametrize("key", ["comfy.gguf.orig_shape.grid", "comfy.gguf.orig_shape.model.grid"])
def test_a_bare_parameter_of_another_shape(key):
    shapes = {f"model.{name}": shape for name, shape in toy().items()}
    assert read(shapes | {"model.grid": (9, 6)}).weights["grid"].shape == (1, 9, 6)
    assert read(shapes | {"model.grid": (3, 18)}, {key: [1, 9, 6]}).weights["grid"].shape == (1, 9, 6)
    assert read(shapes | {"model.grid": (3, 18)}, {key: [9, 6]}).weights["grid"].shape == (1, 9, 6)


def test_a_linear_with_its_leading_dimensions_rearranged():
    key = "comfy.gguf.orig_shape.enter.weight"
    assert read(toy() | {"enter.weight": (2, 3, 4)}, {key: (6, 4)}).weights["enter.weight"].shape == (6, 4)


AGAIN = "download it again, or convert the model again."
CONVERTED = (
    "The file is not a toy transformer of the known size, or was converted wrongly: "
    "use another file, or convert the model again."
)
REARRANGED = "The tensor was rearranged in a way that cannot be undone: convert the model again."
HOLES = "Layers were lost or removed: download the file again, or convert the model again."
VARIANT = "To leave them out would give wrong pictures. Use a file of the unmodified architecture."


def without(*names):
    return {name: shape for name, shape in toy().items() if name not in names}


BAD_TABLES = {
    "nothing": ({}, "no tensors, expected a toy transformer. Pick a toy."),
    "something else": (
        {"a": (1,), "b\n": (2, 2)},
        r"2 tensors of an unknown model (a, 'b\n'), expected a toy transformer. Pick a toy.",
    ),
    "more than half of the kinds are missing": (
        without("grid", "enter.bias", "trunk.blocks.0.up.weight", "trunk.blocks.1.up.weight"),
        "4 tensors of an unknown model (enter.weight, trunk.blocks.0.down.weight, trunk.blocks.1.down.weight, "
        "leave.1.weight), expected a toy transformer. Pick a toy.",
    ),
    "less than half of the kinds are missing": (
        without("grid", "trunk.blocks.0.up.weight", "trunk.blocks.1.up.weight"),
        "5 of the 8 tensors of a toy transformer, without grid, trunk.blocks.0.up.weight, trunk.blocks.1.up.weight, "
        f"expected all of them. The file is incomplete or its tensors were renamed: {AGAIN}",
    ),
    "a required bias is missing": (
        without("enter.bias"),
        "7 of the 8 tensors of a toy transformer, without enter.bias, expected all of them. "
        f"The file is incomplete or its tensors were renamed: {AGAIN}",
    ),
    "a tensor is renamed": (
        without("grid") | {"grids": (1, 9, 6)},
        "7 of the 8 tensors of a toy transformer, without grid, but with the unknown grids, expected all of them. "
        f"The file is incomplete or its tensors were renamed: {AGAIN}",
    ),
    "a tensor too many": (
        toy() | {"grid.scale": (1,)},
        "a toy transformer with unknown tensors in it: grid.scale, expected no other tensors than the model's. "
        + VARIANT,
    ),
    "a layer number with a leading zero": (
        toy() | {"trunk.blocks.02.up.weight": (10, 6)},
        "a toy transformer with unknown tensors in it: trunk.blocks.02.up.weight, "
        f"expected no other tensors than the model's. {VARIANT}",
    ),
    "a placeholder for a layer number": (
        toy() | {"trunk.blocks.{}.up.weight": (10, 6)},
        "a toy transformer with unknown tensors in it: trunk.blocks.{}.up.weight, "
        f"expected no other tensors than the model's. {VARIANT}",
    ),
    "a layer of a huge number": (
        toy() | {f"trunk.blocks.{'9' * 6000}.up.weight": (10, 6)},
        f"a toy transformer with unknown tensors in it: trunk.blocks.{'9' * 67}…, "
        f"expected no other tensors than the model's. {VARIANT}",
    ),
    "a hole in the layers": (
        without("trunk.blocks.0.up.weight", "trunk.blocks.0.down.weight") | {"trunk.blocks.3.up.weight": (10, 6)},
        f"trunk.blocks up to number 3 without 0, 2, expected layers numbered without holes. {HOLES}",
    ),
    "a hole and many layers": (
        toy() | {"tail.9999.mix.weight": (6, 6)},
        "tail up to number 9999 without 0, 1, 2, 3, 4 and 9994 more, expected layers numbered without holes. " + HOLES,
    ),
    "a wrong number of columns": (
        toy() | {"enter.weight": (6, 5)},
        f"enter.weight of shape (6, 5), expected (6, 4). {CONVERTED}",
    ),
    "another width": (
        toy(width=8),
        "grid of shape (1, 9, 8), one of 8 wrong shapes, expected (1, 9, 6). " + CONVERTED,
    ),
    "layers that differ": (
        toy() | {"trunk.blocks.1.down.weight": (6, 7)},
        f"trunk.blocks.1.down.weight of shape (6, 7), expected (6, 5). {CONVERTED}",
    ),
    "an odd number of rows": (
        toy(blocks=1) | {"trunk.blocks.0.up.weight": (9, 6), "trunk.blocks.0.down.weight": (6,)},
        f"trunk.blocks.0.up.weight of shape (9, 6), one of 2 wrong shapes, expected (2 × inner, 6). {CONVERTED}",
    ),
    "too many dimensions": (toy() | {"enter.bias": (1, 6)}, f"enter.bias of shape (1, 6), expected (6). {CONVERTED}"),
    "no cells": (toy(cells=0), f"grid of shape (1, 0, 6), expected (1, cells, 6). {CONVERTED}"),
    "cells that make no square": (
        toy(cells=8),
        "cells 8, expected a square number. "
        "The tensor was cut or rearranged: download the file again, or convert the model again.",
    ),
}


@pytest.mark.parametrize(("shapes", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_tables(shapes, message):
    assert str(refused(shapes)) == f"toy.gguf: found {message}"


GRID, ENTER = "comfy.gguf.orig_shape.grid", "comfy.gguf.orig_shape.enter.weight"
ALTERED = (
    "expected metadata that agree with the tensors. "
    "The file was altered or wrongly converted: download it again, or convert the model again."
)

BAD_METADATA = {
    "another number of elements": (
        {GRID: [1, 9, 7]},
        f"{GRID} = [1, 9, 7] for a tensor of shape (1, 9, 6), expected a shape of 54 elements. {REARRANGED}",
    ),
    "negative sizes": (
        {GRID: [-9, -6]},
        f"{GRID} = [-9, -6] for a tensor of shape (1, 9, 6), expected a shape of 54 elements. {REARRANGED}",
    ),
    "no sizes": (
        {GRID: "1x9x6"},
        f"{GRID} = '1x9x6' for a tensor of shape (1, 9, 6), expected a shape of 54 elements. {REARRANGED}",
    ),
    "sizes of another type": (
        {GRID: [1.0, 9.0, 6.0]},
        f"{GRID} = [1.0, 9.0, 6.0] for a tensor of shape (1, 9, 6), expected a shape of 54 elements. {REARRANGED}",
    ),
    "many sizes": (
        {GRID: [54] + 1000 * [1]},
        f"{GRID} = [54, 1, 1, 1, 1 and 996 more] for a tensor of shape (1, 9, 6), "
        f"expected a shape of 54 elements. {REARRANGED}",
    ),
    "rows of another length": (
        {ENTER: [4, 6]},
        f"{ENTER} = [4, 6] for a tensor of shape (6, 4), expected a shape of 24 elements in rows of 4. {REARRANGED}",
    ),
    "an annotation contradicts": (
        {"toy.block_count": 3},
        f"toy.block_count = 3 in its metadata, but 2 by its tensors, {ALTERED}",
    ),
    "an annotation of another type": (
        {"toy.embedding_length": "6"},
        f"toy.embedding_length = '6' in its metadata, but 6 by its tensors, {ALTERED}",
    ),
    "other biases": (
        {"toy.bias": ["leave.1"]},
        f"toy.bias = [leave.1] in its metadata, but [enter] by its tensors, {ALTERED}",
    ),
    "a bias is not in the tensors": (
        {"toy.bias": ["enter", "leave.1"]},
        f"toy.bias = [enter, leave.1] in its metadata, but [enter] by its tensors, {ALTERED}",
    ),
    "a bias is named twice": (
        {"toy.bias": ["enter", "enter"]},
        f"toy.bias = [enter, enter] in its metadata, but [enter] by its tensors, {ALTERED}",
    ),
    "biases are no array": (
        {"toy.bias": "enter"},
        f"toy.bias = 'enter' in its metadata, but [enter] by its tensors, {ALTERED}",
    ),
    "the other spelling": (
        {"toy.tensor_names": "diffusers"},
        f"toy.tensor_names = 'diffusers' in its metadata, but 'native' by its tensors, {ALTERED}",
    ),
    "the name of another model": (
        {"general.architecture": "flux"},
        f"general.architecture = 'flux' in its metadata, but 'toy' by its tensors, {ALTERED}",
    ),
}


@pytest.mark.parametrize(("metadata", "message"), BAD_METADATA.values(), ids=BAD_METADATA)
def test_bad_metadata(metadata, message):
    assert str(refused(toy(), metadata)) == f"toy.gguf: found {message}"


def test_the_error_holds_the_full_list():
    shapes = {name: shape for name, shape in toy(blocks=40).items() if not name.endswith("up.weight")}
    error = refused(shapes)
    assert error.tensors == tuple(f"trunk.blocks.{i}.up.weight" for i in range(40))
    assert str(error).startswith(
        "toy.gguf: found 44 of the 84 tensors of a toy transformer, without trunk.blocks.0.up.weight, "
        "trunk.blocks.1.up.weight, trunk.blocks.2.up.weight, trunk.blocks.3.up.weight, trunk.blocks.4.up.weight "
        "and 35 more, expected all of them."
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.tensors) == (TensorsError, str(error), error.tensors)


def test_missing_tensors_are_named_as_the_file_would_name_them():
    shapes = {f"transformer.{name}": shape for name, shape in in_diffusers(toy()).items()}
    del shapes["transformer.layers.1.ff.0.weight"]
    assert refused(shapes).tensors == ("transformer.layers.1.ff.0.weight",)


def test_annotations_describe_the_file_and_are_accepted():
    shapes = in_diffusers(toy(blocks=2, tails=1) | {"leave.1.bias": (12,)})
    written = annotations(read(shapes))
    assert written == {
        "general.architecture": "toy",
        "toy.block_count": 3,
        "toy.embedding_length": 6,
        "toy.bias": ["enter", "leave.1"],
        "toy.tensor_names": "diffusers",
    }
    assert annotations(read(shapes, written | {"toy.bias": ["leave.1", "enter"]})) == written
    assert annotations(read(shapes, fixed={"heads": 2}))["toy.head_count"] == 2


@pytest.mark.parametrize("name", [None, "", "pig", "cow", 7, ["flux"]])
def test_a_name_of_no_model_is_ignored(name):
    assert read(toy(), {"general.architecture": name}).dimensions["cells"] == 9


def test_spell_both_ways():
    assert TOY.spell("trunk.blocks.12.up.bias", "diffusers") == "layers.12.ff.0.bias"
    assert TOY.spell("layers.12.ff.0.bias", "native") == "trunk.blocks.12.up.bias"
    assert TOY.spell("leave.1.weight", "diffusers") == "proj_out.weight"
    with pytest.raises(ValueError, match="grid is not among the diffusers names of a toy transformer"):
        TOY.spell("grid", "native")
