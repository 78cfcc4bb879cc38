"""Where every figure of the README comes from: ``python dev.py bench``."""
