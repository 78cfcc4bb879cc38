import pytest
from auraflow_gguf.loader.quant_types import NOT_WEIGHT_TYPES, QUANT_TYPES, TYPES_BY_ID
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

NEWER_THAN_GGUF_PY = {"Q2_0"}  # test_dequantize compares with llama.cpp's library
ACTIVATIONS_AND_INTEGERS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64"}


@pytest.mark.parametrize("name", sorted(QUANT_TYPES.keys() - NEWER_THAN_GGUF_PY))
def test_id_and_sizes_are_ggmls(name):
    entry = QUANT_TYPES[name]
    assert entry.id == GGMLQuantizationType[entry.name]
    assert (entry.block_size, entry.type_size) == GGML_QUANT_SIZES[GGMLQuantizationType[entry.name]]


def test_every_weight_type_is_there():
    in_gguf_py = {entry.name for entry in GGMLQuantizationType}
    assert in_gguf_py | NEWER_THAN_GGUF_PY == QUANT_TYPES.keys() | ACTIVATIONS_AND_INTEGERS


def test_the_two_tables_hold_the_same():
    assert {entry.id: entry for entry in QUANT_TYPES.values()} == TYPES_BY_ID
    assert all(name == entry.name for name, entry in QUANT_TYPES.items())


def test_other_types_are_known_by_name():
    known = {name: id for id, name in NOT_WEIGHT_TYPES.items()}
    assert known.keys() >= ACTIVATIONS_AND_INTEGERS
    assert all(known[name] == GGMLQuantizationType[name] for name in ACTIVATIONS_AND_INTEGERS)
    assert NOT_WEIGHT_TYPES.keys().isdisjoint(TYPES_BY_ID)


def test_row_bytes():
    assert QUANT_TYPES["Q4_K"].row_bytes(3072) == 1728
    assert QUANT_TYPES["Q6_K"].bits_per_weight == 6.5625
    with pytest.raises(ValueError, match="3000 is not a whole number of Q4_K blocks of 256"):
        QUANT_TYPES["Q4_K"].row_bytes(3000)
