"""What the templates and help pages show: the editor offers what a person lacks, and no picture stands for another."""

from __future__ import annotations

import json

import pytest
from auraflow_gguf.devtools import ROOT
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


def test_each_node_s_help_has_a_picture_of_its_own():
    pictures = sorted((ROOT / "web" / "docs" / "images").glob("*.png"))
    assert len({picture.read_bytes() for picture in pictures}) == len(pictures) > 5
