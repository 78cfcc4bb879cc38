"""What a fitted file shall be, and what it became."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ...loader.quant_types import QUANT_TYPES
from ..recipe import parse_rule

WHOLE_BITS = 16  # of a weight that is kept


@dataclass(frozen=True)
class Wanted:
    """What a file shall be.

    Attributes:
        size: its bytes at most; or None, and
        bits: bits a weight of all of it.
        types: which may be chosen; () for all. To keep a group in 16 bit may be chosen in any case.
        at_least, at_most: rules ``PATTERN=TYPE``: a group with a weight that fits gets a type of no fewer, or no more,
            bits than that one.
    """

    size: int | None = None
    bits: float | None = None
    types: tuple[str, ...] = ()
    at_least: tuple[str, ...] = ()
    at_most: tuple[str, ...] = ()

    def check(self, modules: list[str]) -> None:
        """Check it as for a model of these modules.

        Raises:
            ValueError: in a sentence for the user.
        """
        if (self.size is None) == (self.bits is None):
            raise ValueError("Give either a size or bits a weight.")
        for rule in (*self.at_least, *self.at_most):
            pattern, _ = parse_rule(rule)
            if not any(fnmatchcase(module, pattern) for module in modules):
                raise ValueError(
                    f"{rule!r} fits no weight. Their names are such as {modules[-1]}, with * for any text."
                )

    def allowed(self, modules: list[str], types: list[str]) -> list[str | None]:
        """Those of ``types`` that a group of modules may get; None is to keep it in 16 bit."""

        def bits(rules: tuple[str, ...]) -> list[float]:
            parsed = map(parse_rule, rules)
            fitting = (name for pattern, name in parsed if any(fnmatchcase(module, pattern) for module in modules))
            return [QUANT_TYPES[name].bits_per_weight for name in fitting]

        floor, ceiling = max(bits(self.at_least), default=0), min(bits(self.at_most), default=WHOLE_BITS)
        chosen = [name for name in types if not self.types or name in self.types]
        return [
            *(name for name in chosen if floor <= QUANT_TYPES[name].bits_per_weight <= ceiling),
            *([None] if ceiling >= WHOLE_BITS else []),
        ]


@dataclass(frozen=True)
class Beside:
    """A recipe beside a fitted file: its size in bytes, and its errors; None for one that cannot be predicted."""

    name: str
    size: int
    predicted: float | None
    measured: float


@dataclass(frozen=True)
class Fitted:
    """A file that was made.

    Attributes:
        size: its bytes.
        weights: how many it has.
        types: by group, the type; "" where it is kept in 16 bit.
        predicted: the root mean square of the output's relative error that the choice was made by.
        measured: the same as measured of the file, on the inputs that are held back.
        recipes: those of nearest size, the smaller ones first.
    """

    size: int
    weights: int
    types: dict[str, str]
    predicted: float
    measured: float
    recipes: tuple[Beside, ...]

    def table(self, name: str) -> str:
        """The file, called ``name``, beside the recipes, as Markdown."""
        lines = ["| file | GB | bits per weight | predicted error | measured error |", "|---|---|---|---|---|"]
        for row in (*self.recipes, self):
            predicted = "" if row.predicted is None else f"{row.predicted:.5f}"
            sizes = f"{row.size / 1e9:.3f} | {8 * row.size / self.weights:.2f}"
            lines.append(f"| {getattr(row, 'name', name)} | {sizes} | {predicted} | {row.measured:.5f} |")
        return "\n".join(lines)
