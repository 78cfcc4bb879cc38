"""Workflows made for other packs' GGUF loaders, taken over to this pack's, in editor and in API format.

Needs nothing but the standard library, until there is a model file to look at; nodes/replacements.py gives the same
table to ComfyUI.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import group_nodes
from .loader.files.errors import ModelFileError

Json = dict[str, Any]


@dataclass(frozen=True)
class Replacement:
    """A node of this pack in place of another pack's.

    Attributes:
        new: the class of our node.
        widgets: the other node's widgets, in the order in which the editor stores their values.
        inputs: our input for each of the other's that has one; all others fall away.
        added: values of our further widgets, which follow the taken over ones.
        only: values that a widget of the other node must have, for AuraFlow's sake; else the node stays.
        part: what its file must be, a name among `loader.files.parts.PARTS`; else the node stays.
        folders: of ComfyUI's models, which have that file; the first of ``inputs`` names it.
    """

    new: str
    widgets: tuple[str, ...]
    inputs: dict[str, str]
    added: dict[str, Any]
    only: dict[str, tuple[str, ...]]
    part: str
    folders: tuple[str, ...]


_DEFAULTS = {"compute_dtype": "auto", "modulation_cache": True, "matrix_mult": "exact"}
_TRANSFORMER = {"part": "transformer", "folders": ("diffusion_models", "unet")}

REPLACEMENTS = {
    "UnetLoaderGGUF": Replacement(
        "AuraFlowGGUFLoader", ("unet_name",), {"unet_name": "model_name"}, added=_DEFAULTS, only={}, **_TRANSFORMER
    ),
    "UnetLoaderGGUFAdvanced": Replacement(
        "AuraFlowGGUFLoader",
        ("unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"),
        {"unet_name": "model_name"},
        added=_DEFAULTS,
        only={},
        **_TRANSFORMER,
    ),
    "CLIPLoaderGGUF": Replacement(
        "AuraFlowGGUFTextEncoderLoader",
        ("clip_name", "type"),
        {"clip_name": "text_encoder_name"},
        added={},
        # what AuraFlow's graphs choose: Pile-T5-XL is recognised by its weights
        only={"type": ("stable_diffusion",)},
        part="text_encoder",
        folders=("text_encoders", "clip"),
    ),
}

# Where a node came from, which the editor keeps with it.
_ORIGIN = ("cnr_id", "aux_id", "ver")


def migrate_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    models: Iterable[str | os.PathLike] = (),
) -> list[str]:
    """Write the workflow in ``source`` to ``target`` with this pack's nodes.

    Args:
        models: ComfyUI's folders of models: a node whose file is found there, and is another model's, stays.

    Returns:
        a sentence for each node that was or was not taken over; none when the workflow has no such node, and then
        nothing is written.

    Raises:
        ModelFileError: ``source`` is no workflow, or ``target`` exists.
    """
    with open(source, encoding="utf-8-sig") as file:
        try:
            workflow = json.load(file)
        except UnicodeDecodeError as error:
            raise _no_workflow(source, "no text") from error
        except (ValueError, RecursionError) as error:
            raise _no_workflow(source, f"no JSON ({error})") from error
    changes = migrate(workflow, source, models)
    if changes:
        _write(target, workflow, overwrite)
    return changes


def _write(target: str | os.PathLike, workflow: Json, overwrite: bool) -> None:
    if os.path.lexists(target) and not overwrite:
        raise ModelFileError(
            target,
            found="a file of that name",
            expected="none",
            advice="Choose another name (--output), or allow it to be replaced (--overwrite).",
        )
    # JavaScript may cut an emoji in half, which JSON can say with an escape only.
    content = json.dumps(workflow, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
    temporary = f"{os.fspath(target)}.{secrets.token_hex(4)}.partial"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def migrate(
    workflow: object, path: str | os.PathLike = "workflow", models: Iterable[str | os.PathLike] = ()
) -> list[str]:
    """Change a workflow in place, as `migrate_file` says.

    Args:
        workflow: in editor format, ``{"nodes": [...], ...}`` with subgraphs, or in API format,
            ``{id: {"class_type": ..., "inputs": ...}}``, alone or as ``prompt`` of a request.
        path: for the error message.
        models: as `migrate_file` takes them.
    """
    folders = [Path(folder) for folder in models]
    if isinstance(workflow, dict) and all(map(_has_nodes, _graphs(workflow))):
        return [*_migrate_editor(workflow, folders), *_migrate_groups(workflow, folders)]
    if isinstance(workflow, dict) and workflow and all(_is_prompt_node(node) for node in workflow.values()):
        return list(_migrate_prompt(workflow, folders))
    if isinstance(workflow, dict) and isinstance(workflow.get("prompt"), dict):
        return migrate(workflow["prompt"], path, models)
    raise _no_workflow(path, "other JSON")


def _graphs(workflow: Json) -> list[Json]:
    """A workflow in editor format and the subgraphs that it defines."""
    definitions = workflow.get("definitions")
    subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    return [workflow, *(subgraphs or [])]


def _has_nodes(graph: object) -> bool:
    nodes = graph.get("nodes") if isinstance(graph, dict) else None
    return isinstance(nodes, list) and all(isinstance(node, dict) and {"type", "id"} <= node.keys() for node in nodes)


def _is_prompt_node(node: object) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _no_workflow(path: str | os.PathLike, found: str) -> ModelFileError:
    return ModelFileError(
        path,
        found=found,
        expected="a workflow of ComfyUI",
        advice="Save the workflow in ComfyUI with Save or Export (API), and give that file.",
    )


def _migrate_prompt(workflow: Json, models: list[Path]) -> Iterator[str]:
    for key, node in workflow.items():
        old = node["class_type"]
        replacement = REPLACEMENTS.get(old)
        if replacement is None:
            continue
        refusal = _refusal(replacement, node["inputs"], models)
        if refusal:
            yield f"{old} {key} stays: {refusal}"
            continue
        taken = {new: node["inputs"][name] for name, new in replacement.inputs.items() if name in node["inputs"]}
        node["class_type"] = replacement.new
        node["inputs"] = taken | replacement.added
        yield f"{old} {key} becomes {replacement.new}"


def _migrate_editor(workflow: Json, models: list[Path]) -> Iterator[str]:
    graphs = _graphs(workflow)
    renamed: dict[str, dict[str, dict[str, str]]] = {}  # subgraph → node in it → its inputs' new names
    for graph in graphs:
        for node in graph["nodes"]:
            replacement = REPLACEMENTS.get(node["type"])
            if replacement is None:
                continue
            old, number = node["type"], node["id"]
            values = _widget_values(node, replacement)
            refusal = _refusal(replacement, values, models)
            if refusal:
                yield f"{old} {number} stays: {refusal}"
                continue
            _replace(node, replacement, values)
            _relink(graph, node)
            renamed.setdefault(graph.get("id", ""), {})[str(number)] = replacement.inputs
            yield f"{old} {number} becomes {replacement.new}"
    followed = False
    while not followed:  # a subgraph may show a widget of a subgraph in it
        followed = True
        for graph in graphs:
            for node in graph["nodes"]:
                if changed := _rename_proxies(node, renamed.get(node["type"], {})):
                    in_graph = renamed.setdefault(graph.get("id", ""), {})
                    in_graph[str(node["id"])] = in_graph.get(str(node["id"]), {}) | changed
                    followed = False


def _migrate_groups(workflow: Json, models: list[Path]) -> Iterator[str]:
    """The same for the nodes in the editor's older group nodes, whose instances have the values."""
    for name, group in group_nodes.definitions(workflow).items():
        nodes = group.get("nodes") or []
        replaced = {i: node["type"] for i, node in enumerate(nodes) if node.get("type") in REPLACEMENTS}
        if not replaced:
            continue
        graphs = [(graph, node) for graph in _graphs(workflow) for node in graph["nodes"]]
        instances = [(graph, node) for graph, node in graphs if group_nodes.is_instance(node, name)]
        try:
            stay = _migrate_group(group, replaced, instances, models)
        except group_nodes.UnclearError as error:
            stay = dict.fromkeys(
                replaced,
                f"which values of the group node are its own cannot be told: {error}. Open the workflow in ComfyUI, "
                "convert the group node to nodes or to a subgraph, save it, and migrate it again",
            )
        for number, old in replaced.items():
            said = f"stays: {stay[number]}" if number in stay else f"becomes {REPLACEMENTS[old].new}"
            yield f"{old} in the group node {name} {said}"


def _migrate_group(
    group: Json, replaced: dict[int, str], instances: list[tuple[Json, Json]], models: list[Path]
) -> dict[int, str]:
    """Change the nodes ``replaced`` of a group node, and the values of its instances; those that stay, and why."""
    nodes = group["nodes"]
    before = group_nodes.layout(group, {number: REPLACEMENTS[old].widgets for number, old in replaced.items()})
    parts = [group_nodes.split(node.get("widgets_values"), before) for _, node in instances]
    stay = {}
    for number, old in replaced.items():
        replacement = REPLACEMENTS[old]
        own = [_values_of(number, before, part) for part in parts] or [_widget_values(nodes[number], replacement)]
        shown = [slot for _, node in instances for slot in _slots_of(nodes[number], group, number, replacement, node)]
        refusals = [_refusal(replacement, values, models) for values in own]
        if group_nodes.is_linked(group, number) or any(slot.get("link") is not None for slot in shown):
            stay[number] = "its widgets are linked"
        elif refusal := next(filter(None, refusals), None):
            stay[number] = refusal
    changed = {number: REPLACEMENTS[old] for number, old in replaced.items() if number not in stay}
    for number, replacement in changed.items():
        for _, node in instances:
            gone = _slots_of(nodes[number], group, number, replacement, node)
            node["inputs"] = [slot for slot in node.get("inputs") or [] if slot not in gone]
        _replace(nodes[number], replacement, _widget_values(nodes[number], replacement))
        inputs = _config(group, number).get("input") or {}
        for name in set(inputs) & {*replacement.widgets}:
            shown = inputs.pop(name)
            if name in replacement.inputs:
                inputs[replacement.inputs[name]] = shown
    widgets = {number: REPLACEMENTS[old].widgets for number, old in replaced.items() if number in stay}
    widgets |= {number: (*new.inputs.values(), *new.added) for number, new in changed.items()}
    after = group_nodes.layout(group, widgets)
    for (graph, node), part in zip(instances, parts, strict=True):
        values = []
        for place, (number, names) in enumerate(after):
            if number not in changed:
                values += part[place]
                continue
            own, new = _values_of(number, before, part), changed[number]
            taken = {new.inputs[name]: value for name, value in own.items() if name in new.inputs}
            values += [(taken | new.added)[name] for name in names]
        node["widgets_values"] = values
        _relink(graph, node)
    return stay


def _values_of(number: int, segments: list[group_nodes.Segment], parts: list[list[Any]]) -> Json:
    """The values of one node in a group node, by the names of its widgets."""
    return {
        name: value
        for (owner, names), part in zip(segments, parts, strict=True)
        if owner == number
        for name, value in zip(names, part, strict=True)
    }


def _slots_of(node: Json, group: Json, number: int, replacement: Replacement, instance: Json) -> list[Json]:
    """The inputs of a group node for widgets of one node in it, under all names that the editor gives them."""
    names = set()
    for widget in replacement.widgets:
        given = ((_config(group, number).get("input") or {}).get(widget) or {}).get("name")
        labels = [slot.get("label") for slot in node.get("inputs") or [] if slot["name"] == widget]
        names |= {widget, given, *labels, f"{node.get('title') or node['type']} {widget}"}
    slots = instance.get("inputs") or []
    return [slot for slot in slots if (slot.get("widget") or {}).get("name") in names - {None}]


def _config(group: Json, number: int) -> Json:
    """What a person has set for one node of a group node: other names of inputs, and which are hidden."""
    return (group.get("config") or {}).get(str(number)) or {}


def _refusal(replacement: Replacement, values: Json, models: list[Path]) -> str | None:
    for name, allowed in replacement.only.items():
        if values.get(name, allowed[0]) not in allowed:
            return f"its {name} is {values[name]}, for another model than AuraFlow"
    file = values.get(next(iter(replacement.inputs)))
    for path in _candidates(file, replacement.folders, models):
        if path.is_file() and (what := _other_model(path, replacement.part)):
            return f"its file {file} is {what}"
    return None


def _candidates(file: object, folders: tuple[str, ...], models: list[Path]) -> Iterator[Path]:
    """Where the file may be that a widget names; one that is linked names none."""
    if isinstance(file, str) and file:
        parts = file.replace("\\", "/").split("/")  # a workflow from Windows
        yield from (model / folder / Path(*parts) for model in models for folder in folders)


def _other_model(path: Path, part: str) -> str | None:
    """What a file is that is not ``part`` of AuraFlow; None also where it cannot be looked at."""
    from .loader.files.gguf_file import open_gguf  # needs torch
    from .loader.files.matching import check_kind
    from .loader.files.parts import PARTS

    try:
        file = open_gguf(path)
    except (ModelFileError, OSError):
        return None
    try:
        check_kind(PARTS[part], file.shapes, metadata=file.metadata, path=file.path)
    except ModelFileError as error:
        return error.found
    return None


def _widget_values(node: Json, replacement: Replacement) -> Json:
    values = node.get("widgets_values") or []
    return values if isinstance(values, dict) else dict(zip(replacement.widgets, values, strict=False))


def _replace(node: Json, replacement: Replacement, values: Json) -> None:
    old = node["type"]
    node["type"] = replacement.new
    taken = [values[name] for name in replacement.inputs if name in values]
    node["widgets_values"] = [*taken, *replacement.added.values()]
    node["inputs"] = [slot for slot in node.get("inputs") or [] if slot["name"] in replacement.inputs]
    for slot in node["inputs"]:
        slot["name"] = replacement.inputs[slot["name"]]
        if "widget" in slot:
            slot["widget"] = {**slot["widget"], "name": slot["name"]}
        slot.pop("localized_name", None)
        slot.pop("label", None)
    properties = node["properties"] = node.get("properties") or {}
    for key in _ORIGIN:
        properties.pop(key, None)
    if properties.get("Node name for S&R") == old:
        properties["Node name for S&R"] = replacement.new


def _relink(graph: Json, node: Json) -> None:
    """Remove the links into inputs that the node has no more, and give the others the inputs' new positions."""
    positions = {slot["link"]: index for index, slot in enumerate(node["inputs"]) if slot.get("link") is not None}
    kept, gone = [], set()
    for link in graph.get("links") or []:
        # subgraphs have links as objects, workflows as lists: id, origin, its slot, target, its slot, type
        number, target, slot = ("id", "target_id", "target_slot") if isinstance(link, dict) else (0, 3, 4)
        if link[target] == node["id"]:
            if link[number] not in positions:
                gone.add(link[number])
                continue
            link[slot] = positions[link[number]]
        kept.append(link)
    graph["links"] = kept
    outputs = [slot for other in graph["nodes"] for slot in other.get("outputs") or []]
    for slots, key in ((outputs, "links"), (graph.get("inputs") or [], "linkIds")):
        for slot in slots:
            if slot.get(key):
                slot[key] = [number for number in slot[key] if number not in gone]


def _rename_proxies(node: Json, renamed: dict[str, dict[str, str]]) -> dict[str, str]:
    """A subgraph's node shows widgets of nodes inside, ``[node, widget]``: follow those that have a new name."""
    changed: dict[str, str] = {}
    for proxy in (node.get("properties") or {}).get("proxyWidgets") or []:
        inside, widget = str(proxy[0]), proxy[1]
        if (name := renamed.get(inside, {}).get(widget, widget)) != widget:
            proxy[1] = changed[widget] = name
    return changed
