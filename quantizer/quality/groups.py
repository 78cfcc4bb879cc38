"""The weights of a transformer in groups that get one type each: a layer's of one kind, and each of the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

# By what follows the layer in a native name without ``.weight``; the first pattern that fits decides.
KINDS = {
    "q, k": "attn.w?[qk]",
    "v": "attn.w?v",
    "o": "attn.w?o",
    "MLP in": "mlp*.c_fc[12]",
    "MLP out": "mlp*.c_proj",
    "modulation": "mod*.1",
}
SIDES = {"text": ("attn.w1?", "mlpC.*", "modC.*"), "image": ("attn.w2?", "mlpX.*", "modX.*")}  # of a double layer


@dataclass(frozen=True)
class Group:
    """Weights that get one type.

    Attributes:
        layer: the native name of its layer, ``single_layers.3``; "" outside of the layers.
        kind: one of `KINDS`, in a double layer after its side, ``image v``; outside of the layers the weight's module.
        weights: native names of the weights.
    """

    layer: str
    kind: str
    weights: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.layer} {self.kind}".strip()


def group_weights(names: Iterable[str]) -> list[Group]:
    """The linears' weights among native ``names`` in groups, in the order in which the groups come first."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if name.endswith(".weight"):
            members.setdefault(_place(name.removesuffix(".weight")), []).append(name)
    return [Group(layer, kind, tuple(weights)) for (layer, kind), weights in members.items()]


def _place(module: str) -> tuple[str, str]:
    stack, _, rest = module.partition(".")
    if not stack.endswith("_layers"):
        return "", module
    number, _, inner = rest.partition(".")
    kind = next(kind for kind, pattern in KINDS.items() if fnmatchcase(inner, pattern))
    if stack == "double_layers":
        side = next(side for side, patterns in SIDES.items() if any(fnmatchcase(inner, p) for p in patterns))
        kind = f"{side} {kind}"
    return f"{stack}.{number}", kind
