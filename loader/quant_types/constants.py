"""Small constant tensors, kept on each device that asked for them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def per_device(build: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Keep what ``build(…, device)`` returns, for each set of arguments.

    Under torch.compile the tensor is built anew and becomes a part of the graph: a traced tensor stands for no
    data and must not be kept, and a kept one cannot enter the trace of a tensor subclass.
    """
    kept = functools.lru_cache(maxsize=None)(build)

    @functools.wraps(build)
    def constant(*arguments) -> torch.Tensor:
        return build(*arguments) if torch.compiler.is_compiling() else kept(*arguments)

    return constant
