"""Random blocks of every quantization type, with scales that are finite unless asked for."""

import numpy as np
from auraflow_gguf.loader.quant_types import QUANT_TYPES

FLOATS = ("F32", "F16", "BF16", "F64")
QUANTIZED = [name for name in QUANT_TYPES if name not in FLOATS]

# Where a block keeps its 16-bit float scales.
SCALES = {
    "Q1_0": (0,),
    "Q2_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
SPECIAL_SCALES = (0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF)
NON_FINITE_SCALES = (0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0xFFFF)


def put_scales(name, blocks, scales):
    """Write ``scales``, float16 bits, ``(2, n_blocks) uint16``, into ``blocks``, ``(n_blocks, type_size) uint8``."""
    if name == "IQ1_M":
        words = blocks[:, 48:56].view(np.uint16)
        nibbles = scales[0][:, None] >> np.array([0, 4, 8, 12], dtype=np.uint16) & 15
        words[:] = words & 0x0FFF | nibbles << 12
    for offset, values in zip(SCALES.get(name, ()), scales, strict=False):
        blocks[:, offset : offset + 2] = values[:, None].view(np.uint8)


def random_blocks(name, n, *, special=SPECIAL_SCALES, seed=0):
    """Random bytes; the scales are random finite float16 bits, and ``special`` in the first blocks."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (n, QUANT_TYPES[name].type_size), dtype=np.uint8)
    scales = random.integers(0, 0x10000, (2, n), dtype=np.uint16)
    scales[(scales & 0x7C00) == 0x7C00] ^= 0x4000
    repeated = np.array(special, dtype=np.uint16)[:n]
    scales[0, : len(repeated)] = repeated
    scales[1, : len(repeated)] = random.permutation(repeated)
    put_scales(name, blocks, scales)
    return blocks
