"""What dev.py is made of. Not part of the node pack: nothing in loader/, quantizer/ or nodes/ imports it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The project's folder."""
