"""Attention of a model on a CPU, by kernels/attention.py where that is faster than ComfyUI's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.cli_args import args
from comfy.ldm.modules import attention as host

from ..kernels.attention import attends, attention

OVERRIDE = "optimized_attention_override"  # ComfyUI's name, of a transformer option

# Arguments of ComfyUI's attention that change nothing here: scores are float32 in any case.
_KNOWN = {"skip_reshape", "transformer_options", "attn_precision", "_inside_attn_wrapper"}


def install(patcher) -> None:
    """Has a freshly loaded model, and all later clones of its patcher, attend by our own C on a CPU.

    Where the user has chosen one of ComfyUI's attentions by an argument, that stays. A node that sets this transformer
    option later on takes our place.
    """
    is_default = host.optimized_attention is host.attention_sub_quad and not args.use_quad_cross_attention
    if patcher.load_device.type == "cpu" and is_default:
        patcher.model_options["transformer_options"].setdefault(OVERRIDE, attend)


def attend(
    by_host: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """ComfyUI's attention as AuraFlow asks for it; all else is left to ``by_host``, which is ComfyUI's own.

    Args:
        query, key, value: ``(batch, heads, tokens, columns)``.
        mask, options: as ComfyUI's attentions have them.

    Returns:
        ``(batch, tokens, heads * columns)`` in ``query``'s dtype.
    """
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    is_taken_apart = has_gradient or torch.compiler.is_compiling()
    is_asked_more = mask is not None or not options.get("skip_reshape") or set(options) - _KNOWN
    if is_taken_apart or is_asked_more or not attends(query, key, value):
        return by_host(query, key, value, heads, mask=mask, **options)
    return attention(query, key, value, query.shape[-1] ** -0.5)
