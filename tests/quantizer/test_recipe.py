import gguf
import pytest
import torch
from auraflow_gguf.devtools.random_models import full_size
from auraflow_gguf.loader.quant_types import QUANT_TYPES
from auraflow_gguf.quantizer.recipe import RECIPES, recipe_for

from .small_model import native_shapes

SHAPES = native_shapes()
EMBEDDERS = ("t_embedder.mlp.0", "t_embedder.mlp.2", "cond_seq_linear", "modF.1")
KEPT = {"t_embedder.mlp.0", "t_embedder.mlp.2", "init_x_linear", "cond_seq_linear", "final_linear", "modF.1"}


def types(recipe, dtype=torch.bfloat16):
    return {name: recipe.type_of(name, shape, dtype).name for name, shape in SHAPES.items()}


def in_layers(name):
    return "_layers." in name


@pytest.mark.parametrize("name", sorted(set(RECIPES) & set(QUANT_TYPES) - {"F32", "F16", "BF16"}))
def test_a_plain_type_goes_to_every_weight_of_the_layers(name):
    chosen = types(RECIPES[name])
    if name != "Q2_K":
        assert {chosen[weight] for weight in SHAPES if in_layers(weight)} == {name}
        assert {chosen[f"{module}.weight"] for module in KEPT} == {"BF16"}


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_a_float_type_goes_to_every_weight(name):
    chosen = types(RECIPES[name])
    assert {chosen[weight] for weight in SHAPES if weight.endswith(".weight")} == {name}
    # diffusers takes other tensors in bfloat16 for their bytes
    assert chosen["positional_encoding"] == ("F32" if name == "BF16" else name)
    assert chosen["init_x_linear.bias"] == "F32"


@pytest.mark.parametrize(
    ("dtype", "weight", "bare"),
    [
        (torch.float32, "BF16", "F32"),
        (torch.float16, "F16", "F16"),
        (torch.bfloat16, "BF16", "F32"),
        (torch.float8_e4m3fn, "BF16", "F32"),
    ],
)
def test_what_is_kept_depends_on_the_source(dtype, weight, bare):
    chosen = types(RECIPES["Q4_K_S"], dtype)
    assert {chosen[f"{module}.weight"] for module in KEPT} == {weight}
    assert {chosen[name] for name in ("positional_encoding", "register_tokens")} == {bare}
    assert {chosen[name] for name in SHAPES if name.endswith(".bias")} == {"F32"}


@pytest.mark.parametrize(
    ("name", "modulation", "queries", "mlp", "projections"),
    [
        ("Q5_K_M", "Q5_K", "Q5_K", "Q6_K", "Q6_K"),
        ("Q4_K_M", "Q4_K", "Q4_K", "Q5_K", "Q5_K"),
        ("Q3_K_L", "Q3_K", "Q4_K", "Q4_K", "Q5_K"),
        ("Q3_K_M", "Q3_K", "Q3_K", "Q4_K", "Q4_K"),
        ("Q2_K", "Q2_K", "Q2_K", "Q3_K", "Q3_K"),
    ],
)
def test_mixtures(name, modulation, queries, mlp, projections):
    chosen = types(RECIPES[name])
    for weight in filter(in_layers, SHAPES):
        if ".mlp" in weight:
            assert chosen[weight] == mlp, weight
        elif weight.endswith(("1v.weight", "2v.weight", "1o.weight", "2o.weight")):
            assert chosen[weight] == projections, weight
        elif ".mod" in weight:
            assert chosen[weight] == modulation, weight
        else:
            assert chosen[weight] == queries, weight
    assert {chosen[f"{module}.weight"] for module in EMBEDDERS} == {"Q8_0"}
    assert {chosen[name] for name in ("init_x_linear.weight", "final_linear.weight")} == {"BF16"}
    assert {chosen[name] for name in SHAPES if name.endswith(".bias")} == {"F32"}


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("Q5_K_M", 5.39), ("Q4_K_M", 4.51), ("Q3_K_L", 3.86), ("Q3_K_M", 3.64), ("Q2_K", 2.82)]
)
def test_a_mixture_of_the_full_size_is_no_larger_than_it_was(name, gigabytes):
    _, tensors = full_size(name)
    assert 0.95 * gigabytes < sum(tensor.nbytes for tensor in tensors) / 1e9 < gigabytes


def test_file_types_are_llama_cpps():
    for recipe in RECIPES.values():
        name = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(recipe.name, f"MOSTLY_{recipe.name}")
        if recipe.name in ("Q5_K", "Q4_K", "Q3_K"):
            name += "_S"
        assert gguf.LlamaFileType(recipe.file_type).name == name


def test_overrides_come_first_and_in_their_order():
    chosen = types(
        recipe_for("q4_k_m", ["single_layers.0.*.c_proj.weight=q8_0", "single_layers.*.mlp.*=Q6_K", "modF.*=Q5_0"])
    )
    assert chosen["single_layers.0.mlp.c_proj.weight"] == "Q8_0"
    assert chosen["single_layers.1.mlp.c_proj.weight"] == "Q6_K"
    assert chosen["single_layers.1.mlp.c_fc1.weight"] == "Q6_K"
    assert chosen["double_layers.0.mlpX.c_proj.weight"] == "Q5_K"
    assert chosen["double_layers.0.modX.1.weight"] == "Q4_K"
    assert chosen["modF.1.weight"] == "Q5_0"


def test_rows_that_are_no_whole_blocks_and_biases_are_kept():
    chosen = types(recipe_for("Q8_0", ["init_x_linear*=Q8_0", "t_embedder.*=Q8_0", "cond_seq_linear=Q4_K"]))
    assert chosen["init_x_linear.weight"] == "BF16"
    assert chosen["init_x_linear.bias"] == "F32"
    assert chosen["t_embedder.mlp.0.weight"] == "Q8_0"
    assert chosen["t_embedder.mlp.0.bias"] == "F32"
    assert chosen["cond_seq_linear.weight"] == "BF16"


def test_a_rule_that_fits_nothing_is_told():
    recipe = recipe_for("Q8_0", ["single_layers.*.mlp.c_proj=Q6_K", "single_blocks.*=Q4_0"])
    assert recipe.unused_rules(SHAPES) == ["single_blocks.*"]


@pytest.mark.parametrize(
    ("type_name", "overrides", "message"),
    [
        ("Q4_K_XL", [], "Q4_K_XL is not a type that can be written. These are: F32, F16,"),
        ("IQ2_XXS", [], "IQ2_XXS cannot be made without an importance matrix"),
        ("Q8_0", ["*.c_proj=IQ1_S"], "IQ1_S cannot be made without an importance matrix"),
        ("Q8_0", ["*.c_proj"], "is not of the form PATTERN=TYPE"),
        ("Q8_0", ["=Q8_0"], "is not of the form PATTERN=TYPE"),
        ("Q8_0", ["*=Q4_K_M"], "Q4_K_M is not the type of a tensor. These are: F32, F16, BF16, Q8_0"),
        ("Q8_0", ["*=Q8_1"], "Q8_1 is not the type of a tensor"),
    ],
)
def test_what_cannot_be_used_is_said_in_plain_words(type_name, overrides, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        recipe_for(type_name, overrides)
