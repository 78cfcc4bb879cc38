"""Hypothesis strategies for GGUF files: true descriptions, and descriptions with one lie in them."""

from __future__ import annotations

import math

from auraflow_gguf.loader.quant_types import QUANT_TYPES
from hypothesis import strategies as st

from ..loader.files.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    gguf_fields,
)

INTEGERS = {U8: (0, 8), U16: (0, 16), U32: (0, 32), U64: (0, 64), I8: (1, 8), I16: (1, 16), I32: (1, 32), I64: (1, 64)}
TEXT = st.text(max_size=8)
KEYS = TEXT.map("test.{}".format)  # general.* and split.* have a meaning of their own


def _scalars(value_type: int) -> st.SearchStrategy:
    if value_type == BOOL:
        return st.booleans()
    if value_type in (F32, F64):
        return st.floats(width=32, allow_nan=False)
    if value_type == STRING:
        return TEXT
    signed, bits = INTEGERS[value_type]
    return st.integers(-(1 << bits - 1), (1 << bits - 1) - 1) if signed else st.integers(0, (1 << bits) - 1)


LEAF_TYPES = (*INTEGERS, BOOL, F32, F64, STRING)
LEAVES = st.sampled_from(LEAF_TYPES).flatmap(lambda kind: st.tuples(st.just(kind), _scalars(kind)))
FLAT_ARRAYS = st.sampled_from(LEAF_TYPES).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(_scalars(kind), max_size=5))
)
ARRAYS = FLAT_ARRAYS | st.tuples(st.just(ARRAY), st.lists(FLAT_ARRAYS, max_size=3))
VALUES = LEAVES | ARRAYS.map(lambda value: (ARRAY, value))


@st.composite
def _tensors(draw) -> Tensor:
    quant_type = draw(st.sampled_from(list(QUANT_TYPES.values())))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    sizes[0] *= quant_type.block_size
    nbytes = quant_type.row_bytes(sizes[0]) * math.prod(sizes[1:])
    return Tensor(draw(TEXT), tuple(sizes), quant_type.id, bytes([draw(st.integers(0, 255))]) * nbytes)


@st.composite
def descriptions(draw) -> dict:
    """Arguments of `gguf_fields` that make a valid file."""
    alignment = 1 << draw(st.integers(3, 9))
    values = draw(st.dictionaries(KEYS, VALUES, max_size=4))
    values["general.alignment"] = (U32, alignment)
    return {
        "metadata": [(key, *value) for key, value in values.items()],
        "tensors": draw(st.lists(_tensors(), max_size=4, unique_by=lambda tensor: tensor.name)),
        "version": draw(st.sampled_from((2, 3))),
        "alignment": alignment,
    }


@st.composite
def lies(draw) -> bytes:
    """A file of which one 4- or 8-byte number, or the length, is not what it should be."""
    fields = gguf_fields(**draw(descriptions()))
    if draw(st.booleans()):
        content = b"".join(fields)
        return content[: draw(st.integers(0, len(content)))]
    place = draw(st.sampled_from([i for i, field in enumerate(fields) if len(field) in (4, 8)]))
    width = len(fields[place])
    fields[place] = draw(st.integers(0, (1 << 8 * width) - 1)).to_bytes(width, "little")
    return b"".join(fields)
