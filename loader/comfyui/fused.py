"""LoRAs of a fused projection: one module in the file whose rows are those of several weights, one after the other.

diffusers' ``fuse_projections`` joins the rows of q, k and v into ``to_qkv`` (of the added ones into ``to_added_qkv``),
and trainers that fuse write one module for the three. A change of the fused weight is a change of each weight by its
rows. So what has the weight's rows is cut, and the rest is the same for all:

    lora                 up (rows, rank)
    LoHa                 w1_a and w2_a (rows, rank)
    LoKr                 kron(w1, w2), see `_kronecker`
    diff, set_weight     (rows, columns), a bias' (rows,)
    DoRA                 the length of each row
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import gcd

import torch

Tensors = dict[str, torch.Tensor]
"""A module's tensors in a LoRA file, by what follows its name (``.lora_up.weight``)."""

# diffusers' fused modules, and what is joined in each
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}

_ROWS = re.compile(
    r"(\.lora_up(\.weight)?|\.lora_B(\.weight)?|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight|\.hada_w[12]_a"
    r"|\.diff(_b)?|\.set_weight|\.dora_scale|\.lora_magnitude_vector)$"
)
_SHARED = re.compile(
    r"(\.lora_down(\.weight)?|\.lora_A(\.weight)?|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight"
    r"|\.hada_w[12]_b|\.alpha)$"
)
_KRONECKER = re.compile(r"\.lokr_w[12](_[ab])?$")


class NotSeparable(ValueError):
    """Why a module cannot be cut; a phrase that goes on after "which"."""


def split(tensors: Mapping[str, torch.Tensor], weights: int, rows: int) -> list[list[Tensors]]:
    """A fused module as modules of the weights that are joined in it.

    Args:
        tensors: the fused module's.
        weights: how many are joined.
        rows: of each weight.

    Returns:
        for each weight the modules whose changes add up to its own; views wherever no row has to be left out.

    Raises:
        NotSeparable: its factors mix the rows of the weights, or are of another number of rows.
    """
    for suffix in tensors:
        if not (_ROWS.search(suffix) or _SHARED.search(suffix) or _KRONECKER.search(suffix)):
            raise NotSeparable(f"has {suffix.lstrip('.')}, which acts on all of its rows together")
    cut = {suffix: tensor for suffix, tensor in tensors.items() if _ROWS.search(suffix)}
    for suffix, tensor in cut.items():
        if len(tensor) != weights * rows:
            raise NotSeparable(f"has {len(tensor)} rows in {suffix.lstrip('.')}, not {weights} times {rows}")
    shared = {suffix: tensor for suffix, tensor in tensors.items() if _SHARED.search(suffix)}
    kronecker = {suffix: tensor for suffix, tensor in tensors.items() if _KRONECKER.search(suffix)}
    parts = []
    for start in range(0, weights * rows, rows):
        own = shared | {suffix: tensor[start : start + rows] for suffix, tensor in cut.items()}
        terms = _kronecker(kronecker, start, rows, weights * rows) if kronecker else [{}]
        if len(terms) > 1 and cut.keys() & {".dora_scale", ".lora_magnitude_vector"}:
            raise NotSeparable("is a LoKr with DoRA, whose blocks of rows reach from one of its weights into the next")
        parts.append([own | term for term in terms])
    return parts


def _kronecker(factors: Tensors, start: int, rows: int, rows_in_all: int) -> list[Tensors]:
    """LoKrs that add up to some of the rows of a LoKr.

    Row i·c + j of ``kron(w1, w2)`` is made of row i of w1 and row j of w2, which has c. Where the cut goes through the
    middle of such a block of c rows, w2 is cut into pieces of s rows, s the largest that fits both, and each piece is a
    LoKr of its own: its w1 has the rows that its places call for, and zeros at those of the other pieces.
    """
    w1, w2 = (f"{name}_a" if f"{name}_a" in factors else name for name in (".lokr_w1", ".lokr_w2"))
    if w1 not in factors or w2 not in factors or len(factors[w1]) * len(factors[w2]) != rows_in_all:
        raise NotSeparable(f"is a LoKr of another number of rows than {rows_in_all}")
    size = gcd(len(factors[w2]), rows)
    pieces = len(factors[w2]) // size
    places = torch.arange(start // size, (start + rows) // size)
    terms = []
    for piece in range(pieces):
        elsewhere = places % pieces != piece
        if elsewhere.all():
            continue
        rows_of_w1 = factors[w1][places // pieces]
        rows_of_w1[elsewhere] = 0
        terms.append(factors | {w1: rows_of_w1, w2: factors[w2][piece * size : (piece + 1) * size]})
    return terms
