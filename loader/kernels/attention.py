"""Attention in C of our own, by the products of multiply.py: no score is kept longer than a core's cache holds it.

ComfyUI's own attention on a CPU writes all scores of all heads to memory several times over.
"""

from __future__ import annotations

import torch

from . import native, processor
from .multiply import PANEL
from .tiles import in_tiles, tile

NAMES = {torch.float32: "attention", torch.bfloat16: "attention_bf16"}
VALUES = {torch.float32: "lay_out_values", torch.bfloat16: "lay_out_values_bf16"}

QUERIES = 32  # as in attention.c: that are taken at a time
BLOCKS = 8  # of them that a thread takes at a time
HEADS_BYTES = 32 * 2**20  # of keys and values that are laid out at a time


def attends(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attention` is the faster one for these, each ``(batch, heads, tokens, columns)``."""
    return processor.made_by_amd() and can_attend(query, key, value)


def can_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attention` takes these at all: float32, or bfloat16 where the processor has products of it."""
    dtype, columns = query.dtype, query.shape[-1]
    return (
        all(
            x.device.type == "cpu" and x.dtype == dtype and x.numel() and x.stride(-1) == 1 for x in (query, key, value)
        )
        and query.shape[:2] == key.shape[:2]
        and key.shape == value.shape
        and columns == key.shape[-1]
        and columns * dtype.itemsize % 4 == 0
        and dtype in NAMES
        and native.function("attention.c", NAMES[dtype]) is not None
    )


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """``softmax(scale * query @ key.T) @ value`` of each head, with scores and sums in float32.

    The bits of a query's depend neither on the other queries and heads, nor on the threads. With normal inputs it is
    6e-7 from the exact one in float32, where torch's is 4e-7, and 2.3e-3 in bfloat16, as torch's.

    Args:
        query: ``(batch, heads, tokens, columns)``; `can_attend` takes the three.
        key, value: ``(batch, heads, keys, columns)``.
        scale: more than 0.

    Returns:
        ``(batch, tokens, heads * columns)``, contiguous.
    """
    (batch, heads, tokens, columns), dtype, keys = query.shape, query.dtype, key.shape[2]
    out = query.new_empty(batch, tokens, heads, columns)
    lay_out_keys = native.function("lay_out.c", "lay_out_keys")
    lay_out_values = native.function("lay_out.c", VALUES[dtype])
    attend = native.function("attention.c", NAMES[dtype])
    words, in_word = columns * dtype.itemsize // 4, 4 // dtype.itemsize
    padded_keys, padded_columns = -(-keys // PANEL) * PANEL, -(-columns // PANEL) * PANEL
    key_words, value_words = padded_keys * words, padded_keys // in_word * padded_columns
    blocks = -(-tokens // QUERIES)
    scratch_words = QUERIES * (padded_keys + padded_keys // in_word + padded_columns)
    all_heads = [(i, j) for i in range(batch) for j in range(heads)]
    most = max(1, HEADS_BYTES // (4 * (key_words + value_words)))

    for first in range(0, len(all_heads), most):
        some = all_heads[first : first + most]
        laid_out = tile(len(some) * (key_words + value_words), torch.int32, "heads").view(len(some), -1)

        def lay_out(start: int, stop: int, some=some, laid_out=laid_out) -> None:
            for (i, j), to in zip(some[start:stop], laid_out[start:stop], strict=True):
                k, v = key[i, j], value[i, j]
                lay_out_keys(k.data_ptr(), k.stride(0) * dtype.itemsize, keys, words, to.data_ptr())
                lay_out_values(v.data_ptr(), v.stride(0) * dtype.itemsize, keys, columns, to[key_words:].data_ptr())

        def attend_to(start: int, stop: int, some=some, laid_out=laid_out) -> None:
            scratch = tile(scratch_words, torch.int32, "scratch").data_ptr()
            while start < stop:
                head, block = divmod(start, blocks)
                last = min(block + stop - start, blocks)
                i, j = some[head]
                q = query[i, j, block * QUERIES : last * QUERIES]
                to = out[i, block * QUERIES :, j]
                attend(
                    *(q.data_ptr(), q.stride(0) * dtype.itemsize, len(q)),
                    *(laid_out[head].data_ptr(), laid_out[head, key_words:].data_ptr(), keys, columns, scale),
                    *(to.data_ptr(), to.stride(0) * dtype.itemsize, scratch),
                )
                start += last - block

        in_tiles(lay_out, len(some), 1)
        in_tiles(attend_to, len(some) * blocks, BLOCKS)
    return out.view(batch, tokens, heads * columns)
