"""Tells ComfyUI which of our nodes can stand in for another pack's GGUF loaders, where that pack is absent."""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io

import nodes

from ..migration import REPLACEMENTS


async def register_replacements() -> None:
    """Offer the replacements, when all packs are loaded and can be asked for."""
    api = ComfyAPI()
    for old, replacement in REPLACEMENTS.items():
        if old in nodes.NODE_CLASS_MAPPINGS or replacement.new not in nodes.NODE_CLASS_MAPPINGS:
            continue
        taken = [{"new_id": new, "old_id": name} for name, new in replacement.inputs.items()]
        added = [{"new_id": name, "set_value": value} for name, value in replacement.added.items()]
        await api.node_replacement.register(
            io.NodeReplace(
                new_node_id=replacement.new,
                old_node_id=old,
                old_widget_ids=list(replacement.widgets),
                input_mapping=[*taken, *added],
                output_mapping=[{"old_idx": 0, "new_idx": 0}],
            )
        )
