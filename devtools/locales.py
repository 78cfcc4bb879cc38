"""The nodes' texts as ComfyUI's translation files have them."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from .server import ROOT

ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"


def node_defs(nodes: list[type[io.ComfyNode]]) -> dict[str, Any]:
    """What ``locales/en/nodeDefs.json`` has to say: the texts of the schemas."""
    return {schema.node_id: _entry(schema) for schema in (node.define_schema() for node in nodes)}


def _entry(schema: io.Schema) -> dict[str, Any]:
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {part.id: {"name": part.id, "tooltip": part.tooltip} for part in schema.inputs},
        "outputs": {
            str(slot): {"name": part.display_name or part.id or part.io_type, "tooltip": part.tooltip}
            for slot, part in enumerate(schema.outputs)
        },
    }


def write_english(nodes: list[type[io.ComfyNode]]) -> None:
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(json.dumps(node_defs(nodes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
