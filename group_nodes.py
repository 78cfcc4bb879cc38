"""Where the values of a group node stand: the editor's older way to make one node of several, of before subgraphs.

A workflow keeps the definition of each in ``extra.groupNodes``, and in the graph nodes of type ``workflow>NAME``, whose
``widgets_values`` are those of the nodes inside, one after the other. Which belongs to which follows from the nodes'
definitions, which only the editor has; here it is counted from what the workflow holds of them, and where that cannot
be done for certain, it is refused. The order is that of ComfyUI_frontend's ``extensions/core/groupNode.ts``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Json = dict[str, Any]
Segment = tuple[int, tuple[str, ...] | int]
"""A node's number in the group, and its next widgets: their names where they are known, how many where not."""

_WITHOUT_WIDGETS = ("Reroute", "Note", "MarkdownNote")
_WITH_CONTROL = ("seed", "noise_seed")  # which have another widget after them


class UnclearError(Exception):
    """The places of the values cannot be told; the message says why."""


def definitions(workflow: Json) -> Json:
    """The definitions of group nodes in a workflow, by name."""
    extra = workflow.get("extra")
    return (extra.get("groupNodes") if isinstance(extra, dict) else None) or {}


def is_instance(node: Json, name: str) -> bool:
    """Whether a node is the group node ``name``; editors before 1.2.63 wrote a slash."""
    return node.get("type") in (f"workflow>{name}", f"workflow/{name}")


def layout(group: Json, known: Mapping[int, tuple[str, ...]]) -> list[Segment]:
    """The widgets of a group node, in the order of their values.

    Args:
        group: its definition.
        known: the widgets of some of its nodes, by the node's number.

    Raises:
        UnclearError: the widgets of another node cannot be counted.
    """
    first: list[Segment] = []
    last: list[Segment] = []  # widgets that are inputs too come after those of all nodes
    for number, node in enumerate(group["nodes"]):
        converted = list(_converted(group, number))
        names = {name for name, _ in converted}
        if number in known:
            first.append((number, tuple(name for name in known[number] if name not in names)))
            last.append((number, tuple(name for name, linked in converted if not linked)))
        elif not _is_virtual(group, number):
            count, counts = _counted(node, converted)
            first.append((number, count))
            last.append((number, sum(counts[name] for name, linked in converted if not linked)))
    return first + last


def split(values: object, segments: list[Segment]) -> list[list[Any]]:
    """The values of a group node by segment.

    Raises:
        UnclearError: they are not as many as its widgets.
    """
    sizes = [names if isinstance(names, int) else len(names) for _, names in segments]
    if not isinstance(values, list) or len(values) != sum(sizes):
        found = len(values) if isinstance(values, list) else 0
        raise UnclearError(f"it has {found} values, and the nodes in it {sum(sizes)} widgets")
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in sizes]


def is_linked(group: Json, number: int) -> bool:
    """Whether an input of a node comes from another in the group."""
    return any(link[0] is not None and link[2] == number for link in group.get("links") or [])


def _is_virtual(group: Json, number: int) -> bool:
    """Whether a node has no widget in the group node."""
    kind = group["nodes"][number].get("type")
    leads_on = any(link[0] == number for link in group.get("links") or [])
    return kind in _WITHOUT_WIDGETS or (kind == "PrimitiveNode" and not leads_on)


def _converted(group: Json, number: int) -> Iterator[tuple[str, bool]]:
    """Widgets of a node that are inputs too, in the group node's order, and whether one is linked inside."""
    inputs = group["nodes"][number].get("inputs") or []
    found = {i: slot["name"] for i, slot in enumerate(inputs) if (slot.get("widget") or {}).get("name") == slot["name"]}
    linked = {link[3] for link in group.get("links") or [] if link[0] is not None and link[2] == number}
    for place, index in enumerate(sorted(found, key=str), start=len(inputs) - len(found)):
        yield found[index], place in linked


def _counted(node: Json, converted: list[tuple[str, bool]]) -> tuple[int, dict[str, int]]:
    """How many widgets of a node are no inputs, and how many values each of the others has."""
    values = node.get("widgets_values") or []
    if isinstance(values, list):
        with_control = {name: 2 if name in _WITH_CONTROL else 1 for name, _ in converted}
        for counts in (with_control, dict.fromkeys(with_control, 1)):
            if not converted or len(values) == sum(counts.values()):
                return len(values) - sum(counts.values()), counts
    raise UnclearError(f"some widgets of {node.get('type')} are inputs, and which values are theirs is not written")
