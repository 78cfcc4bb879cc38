"""Where a conversion's weights come from: any checkpoint, one module a format.

A new format is a subclass of `Checkpoint` in a module of its own, and a line in `open_checkpoint`.
"""

from .checkpoint import Checkpoint, swap_halves
from .open import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint", "swap_halves"]
