"""Which type each tensor of the file gets: a table, read from top to bottom, the first pattern that fits deciding.

Every recipe keeps the same tensors out of quantization, 1 % of the model together:

- biases, and the text encoder's norms and relative position biases, in float32, which every reader of GGUF files takes,
- `positional_encoding` and `register_tokens` in float16 when the source is float16, in float32 otherwise: diffusers
  takes a bfloat16 parameter that is no linear's weight for its bytes,
- the embedders, the final projection and its modulation (`modF`) in 16 bit: float16 when the source is float16, which
  then loses nothing, bfloat16 otherwise, whose range is float32's. The K mixtures have `t_embedder`, `cond_seq_linear`
  and `modF` in Q8_0.

The weights of the transformer blocks get the recipe's type. A plain type (`Q4_K`, `Q8_0`, `IQ4_XS`, …) gives it to all
of them; `F32`, `F16` and `BF16` go to the kept weights too. The K mixtures are chosen by measurement, on a small model
with trained weights (docs/recipes.md): the MLP and the attention's value and output projections one step higher in `_M`
and in `Q2_K`; queries and keys, and modulation, a third of AuraFlow's parameters, in the base type. `_L` has the
attention one step higher than `_M`. `_S` is the plain type. `--tensor-type` overrides any of it; `fit` measures what a
checkpoint itself needs.

In the text encoder the MLP's down projection (`wo`), the attention's `v` and `o` and the embedding (`shared`), with
which the residual stream begins, are one step higher in `_M` and in `Q2_K`, two in `_L`: by structure, not by
measurement. Embeddings have no moments in an importance matrix, so they get Q2_K where the recipe's type cannot be made
without one.

A weight whose rows are not a whole number of the type's blocks (`init_x_linear` has 16 columns) is kept like the
embedders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from ..loader.quant_types import QUANT_TYPES
from ..loader.quant_types.base import QuantType

MLP = "*_layers.*.mlp*"
QUERIES = "*_layers.*.attn.w[12][qk]"
VALUE = "*_layers.*.attn.w[12]v"
OUTPUT = "*_layers.*.attn.w[12]o"
EMBEDDERS = ("t_embedder.*", "cond_seq_linear", "modF.1")

TEXT_LAYERS = "encoder.block.*"
TEXT_DOWN = "encoder.block.*.DenseReluDense.wo"
TEXT_VALUE = "encoder.block.*.SelfAttention.v"
TEXT_OUTPUT = "encoder.block.*.SelfAttention.o"
EMBEDDING = "shared"

ALWAYS_FLOAT32 = ("*.bias", "*layer_norm.weight", "*.relative_attention_bias.weight")


# ggml's quantizers refuse these without an importance matrix.
NEEDS_IMATRIX = ("IQ2_XXS", "IQ2_XS", "IQ1_S")


@dataclass(frozen=True)
class Recipe:
    """Types by module name.

    Attributes:
        name: what the user asks for.
        file_type: llama.cpp's ``enum llama_ftype`` number, for ``general.file_type``.
        rules: pairs of a pattern (``fnmatch``, over native names without ``.weight``) and the name of a type; the
            first pattern that fits a tensor decides, and none at all keeps it.
        overrides: the user's rules, which go before.
    """

    name: str
    file_type: int
    rules: tuple[tuple[str, str], ...]
    overrides: tuple[tuple[str, str], ...] = ()

    def type_of(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> QuantType:
        """The type that a tensor is written in, given its native name, its shape and its dtype in the source."""
        if any(fnmatchcase(name, pattern) for pattern in ALWAYS_FLOAT32):
            return QUANT_TYPES["F32"]
        module = name.removesuffix(".weight")
        rules = (*self.overrides, *self.rules)
        chosen = next((QUANT_TYPES[type_name] for pattern, type_name in rules if fnmatchcase(module, pattern)), None)
        if chosen is None or shape[-1] % chosen.block_size or (chosen.name == "BF16" and not name.endswith(".weight")):
            return kept_type(name, dtype)
        return chosen

    def unused_rules(self, names: Iterable[str]) -> list[str]:
        """The patterns of the user's rules that fit no tensor among native ``names``."""
        modules = [name.removesuffix(".weight") for name in names]
        return [pattern for pattern, _ in self.overrides if not any(fnmatchcase(module, pattern) for module in modules)]


def kept_type(name: str, dtype: torch.dtype) -> QuantType:
    """The type of a tensor that is not quantized, given its native name and its dtype in the source."""
    if dtype == torch.float16:
        return QUANT_TYPES["F16"]
    return QUANT_TYPES["BF16" if name.endswith(".weight") else "F32"]


def recipe_for(type_name: str, overrides: Iterable[str] = (), *, imatrix: bool = False) -> Recipe:
    """The recipe called ``type_name`` (in any case), the user's own rules ``PATTERN=TYPE`` before its own.

    Args:
        type_name: a name among `RECIPES`.
        overrides: the user's rules.
        imatrix: whether there is an importance matrix.

    Raises:
        ValueError: in a sentence for the user: an unknown name, a rule that is not ``PATTERN=TYPE``, a type that
            needs an importance matrix without one.
    """
    recipe = RECIPES.get(type_name.upper())
    if recipe is None:
        raise ValueError(f"{type_name} is not a type that can be written. These are: {', '.join(RECIPES)}.")
    recipe = replace(recipe, overrides=tuple(map(parse_rule, overrides)))
    for _, chosen in (*recipe.overrides, *recipe.rules):
        if chosen in NEEDS_IMATRIX and not imatrix:
            raise ValueError(
                f"{chosen} cannot be made without an importance matrix, which says what weights matter: give one "
                "(--imatrix), or choose a type that can, such as IQ2_S or IQ3_XXS."
            )
    return recipe


def parse_rule(text: str) -> tuple[str, str]:
    """The pattern, without ``.weight``, and the type of a rule ``PATTERN=TYPE``.

    Raises:
        ValueError: in a sentence for the user: it is not of that form, or no tensor's type.
    """
    pattern, _, type_name = text.rpartition("=")
    type_name = type_name.strip().upper()
    if not pattern.strip():
        raise ValueError(f"{text!r} is not of the form PATTERN=TYPE, such as 'single_layers.*.mlp.c_proj=Q6_K'.")
    if type_name not in RECIPES or type_name not in QUANT_TYPES:
        plain = ", ".join(name for name in RECIPES if name in QUANT_TYPES)
        raise ValueError(f"{text!r}: {type_name} is not the type of a tensor. These are: {plain}.")
    return pattern.strip().removesuffix(".weight"), type_name


def _plain(name: str, file_type: int, type_name: str = "") -> Recipe:
    chosen = type_name or name
    embedding = "Q2_K" if chosen in NEEDS_IMATRIX else chosen
    return Recipe(name, file_type, (("*_layers.*", chosen), (TEXT_LAYERS, chosen), (EMBEDDING, embedding)))


def _mixture(
    name: str, file_type: int, base: str, *, mlp: str, projections: str, text: str, queries: str = ""
) -> Recipe:
    """A base type, and those of the MLP, of the attention's ``v`` and ``o``, of ``q`` and ``k`` where that is not the
    base, and of what writes into the text encoder's residual stream."""
    rules = {MLP: mlp, VALUE: projections, OUTPUT: projections, QUERIES: queries or base}
    rules |= dict.fromkeys((TEXT_DOWN, TEXT_VALUE, TEXT_OUTPUT, EMBEDDING), text) | dict.fromkeys(EMBEDDERS, "Q8_0")
    rules |= dict.fromkeys(("*_layers.*", TEXT_LAYERS), base)
    return Recipe(name, file_type, tuple(rules.items()))


# llama_ftype has numbers of its own for the mixtures alone; the plain K types share those of `_S`.
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("F32", 0, (("*", "F32"),)),
        Recipe("F16", 1, (("*", "F16"),)),
        Recipe("BF16", 32, (("*", "BF16"),)),
        _plain("Q8_0", 7),
        _plain("Q6_K", 18),
        _mixture("Q5_K_M", 17, "Q5_K", mlp="Q6_K", projections="Q6_K", text="Q6_K"),
        _plain("Q5_K", 16),
        _plain("Q5_K_S", 16, "Q5_K"),
        _plain("Q5_1", 9),
        _plain("Q5_0", 8),
        _mixture("Q4_K_M", 15, "Q4_K", mlp="Q5_K", projections="Q5_K", text="Q5_K"),
        _plain("Q4_K", 14),
        _plain("Q4_K_S", 14, "Q4_K"),
        _plain("Q4_1", 3),
        _plain("Q4_0", 2),
        _mixture("Q3_K_L", 13, "Q3_K", mlp="Q4_K", queries="Q4_K", projections="Q5_K", text="Q5_K"),
        _mixture("Q3_K_M", 12, "Q3_K", mlp="Q4_K", projections="Q4_K", text="Q4_K"),
        _plain("Q3_K", 11),
        _plain("Q3_K_S", 11, "Q3_K"),
        _mixture("Q2_K", 10, "Q2_K", mlp="Q3_K", projections="Q3_K", text="Q3_K"),
        _plain("IQ4_NL", 25),
        _plain("IQ4_XS", 30),
        _plain("IQ3_S", 26),
        _plain("IQ3_XXS", 23),
        _plain("IQ2_S", 28),
        _plain("IQ2_XS", 20),
        _plain("IQ2_XXS", 19),
        _plain("IQ1_M", 31),
        _plain("IQ1_S", 24),
        _plain("MXFP4", 38),
        _plain("NVFP4", 39),
        _plain("TQ1_0", 36),
        _plain("TQ2_0", 37),
        _plain("Q1_0", 40),
    )
}
