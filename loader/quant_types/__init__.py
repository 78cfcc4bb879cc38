"""ggml's quantization types: their blocks, and how to unpack them.

From the simple to the intricate: ``floats``, ``legacy``, ``k_quants``, ``ternary``, ``fp4``, ``iq4``, ``iq3``, ``iq2``,
``iq1``. Each module states the packed bytes and the formula; ``bits``, ``signs``, ``grids`` and ``constants`` are what
they share. Everything is torch on the device of the packed bytes: no branch on data, and no synchronization after the
first use has put a type's constants there.

**Exactness.** A scale has at most 11 significant bits, and its product with the small integers of a block at most 24:
no multiplication rounds in float32, in whatever order. Only the last addition of Q4_1, Q5_1, Q2_K, Q4_K and Q5_K
rounds, once, whether fused or not. So the result equals ggml's bit by bit, the sign of a zero included. Where a scale
is infinite or NaN, a NaN is in the same places; its sign and payload are not promised. MXFP4 has subnormal results,
which ``torch.set_flush_denormal`` would lose.
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import QuantType
from .floats import STORED_DTYPES, dequantize_bf16, dequantize_f16, dequantize_f32, dequantize_f64
from .fp4 import dequantize_mxfp4, dequantize_nvfp4
from .iq1 import dequantize_iq1_m, dequantize_iq1_s
from .iq2 import dequantize_iq2_s, dequantize_iq2_xs, dequantize_iq2_xxs
from .iq3 import dequantize_iq3_s, dequantize_iq3_xxs
from .iq4 import dequantize_iq4_nl, dequantize_iq4_xs
from .k_quants import dequantize_q2_k, dequantize_q3_k, dequantize_q4_k, dequantize_q5_k, dequantize_q6_k
from .legacy import (
    dequantize_q1_0,
    dequantize_q2_0,
    dequantize_q4_0,
    dequantize_q4_1,
    dequantize_q5_0,
    dequantize_q5_1,
    dequantize_q8_0,
)
from .ternary import dequantize_tq1_0, dequantize_tq2_0

__all__ = ["NOT_WEIGHT_TYPES", "QUANT_TYPES", "STORED_DTYPES", "TYPES_BY_ID", "QuantType"]

TYPES_BY_ID: Mapping[int, QuantType] = {
    entry.id: entry
    for entry in (
        # name, id, weights in a block, bytes of a block
        QuantType("F32", 0, 1, 4, dequantize_f32),
        QuantType("F16", 1, 1, 2, dequantize_f16),
        QuantType("Q4_0", 2, 32, 18, dequantize_q4_0),
        QuantType("Q4_1", 3, 32, 20, dequantize_q4_1),
        QuantType("Q5_0", 6, 32, 22, dequantize_q5_0),
        QuantType("Q5_1", 7, 32, 24, dequantize_q5_1),
        QuantType("Q8_0", 8, 32, 34, dequantize_q8_0),
        QuantType("Q2_K", 10, 256, 84, dequantize_q2_k),
        QuantType("Q3_K", 11, 256, 110, dequantize_q3_k),
        QuantType("Q4_K", 12, 256, 144, dequantize_q4_k),
        QuantType("Q5_K", 13, 256, 176, dequantize_q5_k),
        QuantType("Q6_K", 14, 256, 210, dequantize_q6_k),
        QuantType("IQ2_XXS", 16, 256, 66, dequantize_iq2_xxs),
        QuantType("IQ2_XS", 17, 256, 74, dequantize_iq2_xs),
        QuantType("IQ3_XXS", 18, 256, 98, dequantize_iq3_xxs),
        QuantType("IQ1_S", 19, 256, 50, dequantize_iq1_s),
        QuantType("IQ4_NL", 20, 32, 18, dequantize_iq4_nl),
        QuantType("IQ3_S", 21, 256, 110, dequantize_iq3_s),
        QuantType("IQ2_S", 22, 256, 82, dequantize_iq2_s),
        QuantType("IQ4_XS", 23, 256, 136, dequantize_iq4_xs),
        QuantType("F64", 28, 1, 8, dequantize_f64),
        QuantType("IQ1_M", 29, 256, 56, dequantize_iq1_m),
        QuantType("BF16", 30, 1, 2, dequantize_bf16),
        QuantType("TQ1_0", 34, 256, 54, dequantize_tq1_0),
        QuantType("TQ2_0", 35, 256, 66, dequantize_tq2_0),
        QuantType("MXFP4", 39, 32, 17, dequantize_mxfp4),
        QuantType("NVFP4", 40, 64, 36, dequantize_nvfp4),
        QuantType("Q1_0", 41, 128, 18, dequantize_q1_0),
        QuantType("Q2_0", 42, 64, 18, dequantize_q2_0),
    )
}

QUANT_TYPES: Mapping[str, QuantType] = {entry.name: entry for entry in TYPES_BY_ID.values()}

# What else a tensor table may name, for error messages: types of activations, integers, and types that ggml removed.
NOT_WEIGHT_TYPES: Mapping[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
