"""The editor offers to download what a template names and a person lacks."""

from __future__ import annotations

import json

import pytest
from auraflow_gguf.devtools.templates import EXAMPLES, MODEL, PUBLISHED, TEMPLATES


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.case)
def test_published_files_come_with_their_address(template):
    graph = json.loads((EXAMPLES / f"{template.title}.json").read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        named = [value for value in node["widgets_values"] if isinstance(value, str) and value in PUBLISHED]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == named
        for model in models:
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/resolve/main/{model['name']}")
            assert model["directory"] == "diffusion_models"
    loaders = [node for node in graph["nodes"] if node["type"] == "AuraFlowGGUFLoader"]
    assert all(node["properties"]["models"][0]["name"] == MODEL for node in loaders)
