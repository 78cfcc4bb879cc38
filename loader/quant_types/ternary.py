"""The ternary types: 256 weights of -1, 0 or 1 times a 16-bit float ``d``.

Bytes and formulas are those of ``block_tq*`` and ``dequantize_row_tq*`` in ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import torch

from .bits import halves, planes
from .constants import per_device


@per_device
def _powers_of_three(device: torch.device) -> torch.Tensor:
    return torch.tensor((1, 3, 9, 27, 81), dtype=torch.uint8, device=device).unsqueeze(-1)


def dequantize_tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    """54 bytes: ``qs[48] qh[4] d[2]``; ``x = d (t - 1)``.

    A byte ``b`` is the fraction ``b / 256`` with five digits in base 3: digit *n* is ``t = 3 (b 3ⁿ mod 256) >> 8``. The
    order is digit 0 of ``qs[0:32]``, digit 1 of them, …, the same for ``qs[32:48]``, then four digits of ``qh``.
    """
    long, short, last, d = blocks.split((32, 16, 4, 2), dim=1)
    power = _powers_of_three(blocks.device)
    scaled = [(run.unsqueeze(1) * power).flatten(1) for run in (long, short)]
    scaled.append((last.unsqueeze(1) * power[:4]).flatten(1))
    t = torch.cat(scaled, dim=1).short().mul_(3).bitwise_right_shift_(8)
    return halves(d) * t.sub_(1)


def dequantize_tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    """66 bytes: ``qs[64] d[2]``; ``x = d (q - 1)``, ``q`` of 2 bits, packed as in Q2_K."""
    qs, d = blocks.split((64, 2), dim=1)
    q = planes(qs.unflatten(1, (2, 32)), 2).view(torch.int8).sub_(1)
    return halves(d) * q.flatten(1)
