"""The parts of AuraFlow that a GGUF file may hold, each as a table."""

from __future__ import annotations

from collections.abc import Mapping

from .architecture import Architecture
from .auraflow import AURAFLOW
from .matching import choose
from .pile_t5 import PILE_T5_XL

PARTS: dict[str, Architecture] = {"transformer": AURAFLOW, "text_encoder": PILE_T5_XL}


def part_of(shapes: Mapping[str, tuple[int, ...]], part: str | None = None) -> Architecture:
    """What a file is to be read as.

    Args:
        shapes: its tensors.
        part: a name among `PARTS`; without one the tensors decide, and the transformer goes before the text encoder
            in a file that has both.
    """
    return PARTS[part] if part else choose(tuple(PARTS.values()), shapes)
