"""Workflows for other GGUF loaders, in both formats, as ComfyUI writes them."""

import copy
import json
from pathlib import Path

import pytest
from auraflow_gguf import cli
from auraflow_gguf.loader.errors import ModelFileError
from auraflow_gguf.migration import migrate

PROMPT = {
    "1": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "pony/v7-Q4_K_M.gguf"}},
    "2": {"class_type": "CLIPLoaderGGUF", "inputs": {"clip_name": "t5-Q8_0.gguf", "type": "stable_diffusion"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "a cat"}},
    "4": {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": ["1", 0], "shift": 1.73}},
}


def editor_node(number: int, kind: str, values: object, *inputs: str) -> dict:
    return {
        "id": number,
        "type": kind,
        "pos": [0, 0],
        "inputs": [{"name": name, "type": "COMBO", "widget": {"name": name}, "link": None} for name in inputs],
        "outputs": [{"name": "MODEL", "type": "MODEL", "links": [1]}],
        "properties": {"Node name for S&R": kind, "cnr_id": "comfyui-gguf", "ver": "1.1.0"},
        "widgets_values": values,
    }


def test_a_prompt():
    prompt = copy.deepcopy(PROMPT)
    assert migrate(prompt) == [
        "UnetLoaderGGUF 1 becomes AuraFlowGGUFLoader",
        "CLIPLoaderGGUF 2 becomes AuraFlowGGUFTextEncoderLoader",
    ]
    assert prompt["1"] == {
        "class_type": "AuraFlowGGUFLoader",
        "inputs": {"model_name": "pony/v7-Q4_K_M.gguf", "compute_dtype": "auto", "modulation_cache": True},
    }
    assert prompt["2"]["inputs"] == {"text_encoder_name": "t5-Q8_0.gguf"}
    assert {key: prompt[key] for key in "34"} == {key: PROMPT[key] for key in "34"}
    assert migrate(prompt) == []


def test_a_graph_with_a_subgraph():
    inside = editor_node(
        7, "UnetLoaderGGUFAdvanced", ["v7.gguf", "default", "default", False], "unet_name", "dequant_dtype"
    )
    instance = {"id": 9, "type": "abc", "properties": {"proxyWidgets": [["7", "unet_name"], ["8", "seed"]]}}
    outside = editor_node(3, "UnetLoaderGGUF", {"unet_name": "other.gguf"}, "unet_name")
    kept = {"id": 4, "type": "KSampler", "properties": {}, "widgets_values": [0, "fixed"]}
    graph = {
        "id": "root",
        "nodes": [outside, copy.deepcopy(kept), instance],
        "links": [],
        "definitions": {"subgraphs": [{"id": "abc", "nodes": [inside]}]},
    }
    assert migrate(graph) == [
        "UnetLoaderGGUF 3 becomes AuraFlowGGUFLoader",
        "UnetLoaderGGUFAdvanced 7 becomes AuraFlowGGUFLoader",
    ]
    assert outside["widgets_values"] == ["other.gguf", "auto", True]
    assert inside["type"] == "AuraFlowGGUFLoader"
    assert inside["widgets_values"] == ["v7.gguf", "auto", True]
    assert inside["inputs"] == [{"name": "model_name", "type": "COMBO", "widget": {"name": "model_name"}, "link": None}]
    assert inside["outputs"] == [{"name": "MODEL", "type": "MODEL", "links": [1]}]
    assert inside["properties"] == {"Node name for S&R": "AuraFlowGGUFLoader"}
    assert instance["properties"]["proxyWidgets"] == [["7", "model_name"], ["8", "seed"]]
    assert graph["nodes"][1] == kept


def test_a_text_encoder_of_another_model_stays():
    node = editor_node(1, "CLIPLoaderGGUF", ["umt5.gguf", "wan"], "clip_name", "type")
    before = copy.deepcopy(node)
    assert migrate({"nodes": [node]}) == ["CLIPLoaderGGUF 1 stays: its type is wan, for another model than AuraFlow"]
    assert node == before


@pytest.mark.parametrize("other", [[], {}, {"nodes": 1}, {"1": {"class_type": "X"}}, 5])
def test_other_json_is_refused(other):
    with pytest.raises(ModelFileError, match="found other JSON, expected a workflow of ComfyUI"):
        migrate(other)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("flow.json").write_text(json.dumps(PROMPT))
    assert cli.main(["migrate", "flow.json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "flow-auraflow.json: written."
    assert json.loads(Path("flow-auraflow.json").read_text())["1"]["class_type"] == "AuraFlowGGUFLoader"
    assert json.loads(Path("flow.json").read_text()) == PROMPT
    assert cli.main(["migrate", "flow.json"]) == 1
    assert "flow-auraflow.json: found a file of that name" in capsys.readouterr().err
    assert cli.main(["migrate", "flow.json", "--overwrite"]) == 0
    assert cli.main(["migrate", "flow-auraflow.json", "--output", "again.json"]) == 0
    assert not Path("again.json").exists()
    Path("page.json").write_text("<!DOCTYPE html>")
    assert cli.main(["migrate", "page.json"]) == 1
    assert "page.json: found no JSON" in capsys.readouterr().err
