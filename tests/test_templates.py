"""What the templates name can be had, the first of them is the one to begin with, and no picture stands for another."""

from __future__ import annotations

import json
import re

import pytest
from auraflow_gguf.devtools import ROOT
from auraflow_gguf.devtools.templates import EXAMPLES, PUBLISHED, TEMPLATES

README = (ROOT / "README.md").read_text(encoding="utf-8")
ONES_OWN = {"pile-t5-xl-Q4_K_M.gguf", "my-style.safetensors"}  # converted, and trained


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.case)
def test_published_files_come_with_their_address(template):
    """In the way in which ComfyUI's own templates have it, by which the editor says what is missing."""
    graph = json.loads((EXAMPLES / f"{template.title}.json").read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        values = [value for value in node["widgets_values"] if isinstance(value, str)]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == [value for value in values if value in PUBLISHED]
        for model in models:
            folder, directory = PUBLISHED[model["name"]]
            assert model["url"] == f"https://huggingface.co/{folder}{model['name']}"
            assert model["directory"] == directory
        if node["type"].endswith(("Loader", "Inspect")) and "Dataset" not in node["type"]:
            named = {value for value in values if value.endswith((".gguf", ".safetensors"))}
            assert named <= PUBLISHED.keys() | ONES_OWN


def test_every_published_file_is_in_the_readme():
    for name, (folder, directory) in PUBLISHED.items():
        repository, _, subfolder = folder.partition("/resolve/main/")
        assert repository in README, name
        assert f"{subfolder}{name}" in README, name
        assert f"`models/{directory}`" in README, name


def test_text_to_image_stands_first_and_needs_no_file_that_nobody_publishes():
    # ComfyUI lists the files as the disk gives them: on NTFS, in the order of their names.
    first = min(EXAMPLES.glob("*.json"), key=lambda path: path.name).stem
    assert first == TEMPLATES[0].title == "AuraFlow text to image"
    assert f"**{first}**" in README
    named = re.findall(r"[\w.-]+\.(?:gguf|safetensors)", json.dumps(TEMPLATES[0].workflow))
    assert set(named) == PUBLISHED.keys() & set(named)
    assert len(named) == 3


def test_each_node_s_help_has_a_picture_of_its_own():
    pictures = sorted((ROOT / "web" / "docs" / "images").glob("*.png"))
    assert len({picture.read_bytes() for picture in pictures}) == len(pictures) > 5
