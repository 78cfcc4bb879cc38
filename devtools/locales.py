"""The nodes' texts as ComfyUI's translation files have them."""

from __future__ import annotations

import json
from typing import Any

from .server import ROOT

LOCALES = ROOT / "locales"


def node_defs(info: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What ``nodeDefs.json`` has to say in English: the texts of node classes as ``/object_info`` describes them."""
    return {name: _entry(described) for name, described in info.items()}


def _entry(described: dict[str, Any]) -> dict[str, Any]:
    inputs = {
        name: {"name": name, "tooltip": options["tooltip"]}
        for group in ("required", "optional")
        for name, (_, options) in described["input"].get(group, {}).items()
    }
    outputs = zip(described["output_name"], described["output_tooltips"], strict=True)
    return {
        "display_name": described["display_name"],
        "description": described["description"],
        "inputs": inputs,
        "outputs": {str(slot): {"name": name, "tooltip": tooltip} for slot, (name, tooltip) in enumerate(outputs)},
    }


def read(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def write_english(info: dict[str, dict[str, Any]]) -> None:
    text = json.dumps(node_defs(info), indent=2, ensure_ascii=False) + "\n"
    (LOCALES / "en" / "nodeDefs.json").write_text(text, encoding="utf-8")
