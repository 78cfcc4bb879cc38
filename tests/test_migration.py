"""Workflows for other GGUF loaders, in both formats, as ComfyUI writes them."""

import copy
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from auraflow_gguf import cli
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.migration import migrate
from auraflow_gguf.quantizer.convert import convert
from safetensors.torch import save_file

from .quantizer.small_model import FIXED, native_weights

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
        "inputs": {
            "model_name": "pony/v7-Q4_K_M.gguf",
            "compute_dtype": "auto",
            "modulation_cache": True,
            "matrix_mult": "exact",
        },
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
    assert outside["widgets_values"] == ["other.gguf", "auto", True, "exact"]
    assert inside["type"] == "AuraFlowGGUFLoader"
    assert inside["widgets_values"] == ["v7.gguf", "auto", True, "exact"]
    assert inside["inputs"] == [{"name": "model_name", "type": "COMBO", "widget": {"name": "model_name"}, "link": None}]
    assert inside["outputs"] == [{"name": "MODEL", "type": "MODEL", "links": [1]}]
    assert inside["properties"] == {"Node name for S&R": "AuraFlowGGUFLoader"}
    assert instance["properties"]["proxyWidgets"] == [["7", "model_name"], ["8", "seed"]]
    assert graph["nodes"][1] == kept


def test_links_into_inputs_that_fall_away_are_removed():
    node = editor_node(
        3, "UnetLoaderGGUFAdvanced", ["v7.gguf", "float32", "default", False], "dequant_dtype", "unet_name"
    )
    for link, slot in enumerate(node["inputs"], start=10):
        slot["link"] = link
    primitives = [{"id": 1, "type": "PrimitiveNode", "outputs": [{"links": [10]}]}]
    primitives += [{"id": 2, "type": "PrimitiveNode", "outputs": [{"links": [11]}]}]
    links = [[1, 3, 0, 4, 0, "MODEL"], [10, 1, 0, 3, 0, "COMBO"], [11, 2, 0, 3, 1, "COMBO"]]
    graph = {"nodes": [*primitives, node], "links": links}
    migrate(graph)
    assert [(slot["name"], slot["link"]) for slot in node["inputs"]] == [("model_name", 11)]
    assert graph["links"] == [[1, 3, 0, 4, 0, "MODEL"], [11, 2, 0, 3, 0, "COMBO"]]
    assert [primitive["outputs"][0]["links"] for primitive in primitives] == [[], [11]]


def test_links_in_a_subgraph_whose_inputs_fall_away_are_removed():
    node = editor_node(7, "CLIPLoaderGGUF", ["t5.gguf", "stable_diffusion"], "type", "clip_name")
    node["inputs"][0]["link"], node["inputs"][1]["link"] = 1, 2
    links = [
        {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 7, "target_slot": 0, "type": "COMBO"},
        {"id": 2, "origin_id": -10, "origin_slot": 1, "target_id": 7, "target_slot": 1, "type": "COMBO"},
    ]
    inside = {"id": "abc", "nodes": [node], "links": links, "inputs": [{"linkIds": [1]}, {"linkIds": [2]}]}
    migrate({"nodes": [], "definitions": {"subgraphs": [inside]}})
    assert inside["links"] == [links[1] | {"target_slot": 0}]
    assert inside["inputs"] == [{"linkIds": []}, {"linkIds": [2]}]


def test_a_widget_shown_through_two_subgraphs():
    loader = editor_node(7, "UnetLoaderGGUF", ["v7.gguf"], "unet_name")
    inner = {"id": 6, "type": "inner", "properties": {"proxyWidgets": [["7", "unet_name"]]}}
    outer = {"id": 5, "type": "outer", "properties": {"proxyWidgets": [["6", "unet_name"]]}}
    subgraphs = [{"id": "outer", "nodes": [inner]}, {"id": "inner", "nodes": [loader]}]
    migrate({"nodes": [outer], "definitions": {"subgraphs": subgraphs}})
    assert inner["properties"]["proxyWidgets"] == [["7", "model_name"]]
    assert outer["properties"]["proxyWidgets"] == [["6", "model_name"]]


def test_what_other_programs_leave_out():
    node = editor_node(1, "UnetLoaderGGUF", ["v7.gguf"], "unet_name") | {"properties": None, "outputs": None}
    assert migrate({"nodes": [node], "definitions": None, "links": None}) == [
        "UnetLoaderGGUF 1 becomes AuraFlowGGUFLoader"
    ]
    request = {"prompt": copy.deepcopy(PROMPT), "client_id": "x"}
    assert len(migrate(request)) == 2
    assert request["prompt"]["1"]["class_type"] == "AuraFlowGGUFLoader"


def test_a_text_encoder_of_another_model_stays():
    node = editor_node(1, "CLIPLoaderGGUF", ["umt5.gguf", "wan"], "clip_name", "type")
    before = copy.deepcopy(node)
    assert migrate({"nodes": [node]}) == ["CLIPLoaderGGUF 1 stays: its type is wan, for another model than AuraFlow"]
    assert node == before


@pytest.fixture
def models(tmp_path):
    """ComfyUI's folder of models, with a file of another model, one of AuraFlow's, and one that cannot be read."""
    folder = tmp_path / "models"
    (folder / "unet" / "wan").mkdir(parents=True)
    (folder / "text_encoders").mkdir()
    for path, architecture, name in (
        (folder / "unet" / "wan" / "flux.gguf", "flux", "double_blocks.0.img_attn.norm.key_norm.scale"),
        (folder / "text_encoders" / "clip.gguf", "clip", "text_model.embeddings.position_embedding.weight"),
    ):
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_tensor(name, np.ones((77, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    save_file(native_weights(), tmp_path / "aura.safetensors")
    convert(tmp_path / "aura.safetensors", folder / "unet" / "aura.gguf", "Q8_0", fixed=FIXED)
    (folder / "unet" / "broken.gguf").write_bytes(b"GGUF")
    return folder


@pytest.mark.parametrize(
    ("kind", "file", "found"),
    [
        ("UnetLoaderGGUF", "wan/flux.gguf", "a Flux transformer"),
        ("UnetLoaderGGUFAdvanced", "wan\\flux.gguf", "a Flux transformer"),
        ("UnetLoaderGGUF", "aura.gguf", None),
        ("UnetLoaderGGUF", "broken.gguf", None),
        ("UnetLoaderGGUF", "elsewhere.gguf", None),
        ("CLIPLoaderGGUF", "clip.gguf", "CLIP"),
    ],
)
def test_a_node_whose_file_is_another_model_s_stays_where_the_file_can_be_looked_at(models, kind, file, found):
    name = "clip_name" if kind == "CLIPLoaderGGUF" else "unet_name"
    prompt = {"7": {"class_type": kind, "inputs": {name: file}}}
    graph = {"nodes": [editor_node(7, kind, [file], name)]}
    for workflow in (prompt, graph):
        before = copy.deepcopy(workflow)
        (change,) = migrate(workflow, models=[models.parent / "none", models])
        assert (workflow == before) == bool(found)
        if found:
            assert change.startswith(f"{kind} 7 stays: its file {file} is ")
            assert found in change
        else:
            assert " becomes " in change


def test_the_command_looks_into_the_folders_that_it_is_given(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompt = {"1": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "wan/flux.gguf"}}}
    Path("flow.json").write_text(json.dumps(prompt))
    assert cli.main(["migrate", "flow.json", "--models", "models"]) == 0
    assert "UnetLoaderGGUF 1 stays: its file wan/flux.gguf is a Flux transformer" in capsys.readouterr().out
    assert json.loads(Path("flow-auraflow.json").read_text()) == prompt


SAMPLER = [7, "fixed", 20, 3.5, "euler", "simple", 1.0]


def group_node(*values: list, sockets: bool = False) -> dict:
    """A graph with group nodes of a loader, a sampler and a text encoder's loader, whose values are ``values``.

    Args:
        sockets: as editors since 1.16 write it, in which every widget is an input too.
    """
    names = {
        "UnetLoaderGGUFAdvanced": ("unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"),
        "KSampler": ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
        "CLIPLoaderGGUF": ("clip_name", "type"),
    }
    inside = [
        editor_node(0, "UnetLoaderGGUFAdvanced", ["own.gguf", "default", "default", False]),
        editor_node(0, "KSampler", SAMPLER),
        editor_node(0, "CLIPLoaderGGUF", ["own.gguf", "stable_diffusion"]),
    ]
    inside[1]["inputs"] = [{"name": name, "type": name.upper()} for name in ("model", "positive")]
    for node in inside if sockets else []:
        node["inputs"] += [{"name": name, "type": "X", "widget": {"name": name}} for name in names[node["type"]]]
    for node in inside:
        del node["id"]
    group = {"nodes": inside, "links": [[0, 0, 1, 0, 1, "MODEL"]], "external": []}
    shown = [{"name": "positive", "type": "CONDITIONING", "link": 1}]
    shown += [{"name": name, "type": "X", "widget": {"name": name}, "link": None} for name in sum(names.values(), ())]
    instances = [
        {"id": id, "type": "workflow>mine", "widgets_values": value, "inputs": copy.deepcopy(shown)}
        for id, value in enumerate(values, start=3)
    ]
    links = [[1, 9, 0, 3, 0, "CONDITIONING"]]
    return {"nodes": instances, "links": links, "extra": {"groupNodes": {"mine": group}}}


UNET = ["v7.gguf", "default", "float32", True]
CLIP = ["t5.gguf", "stable_diffusion"]


@pytest.mark.parametrize("sockets", [False, True], ids=["widgets", "sockets"])
def test_nodes_in_older_group_nodes(sockets):
    graph = group_node([*UNET, *SAMPLER, *CLIP], ["w.gguf", *UNET[1:], *SAMPLER, *CLIP], sockets=sockets)
    assert migrate(graph) == [
        "UnetLoaderGGUFAdvanced in the group node mine becomes AuraFlowGGUFLoader",
        "CLIPLoaderGGUF in the group node mine becomes AuraFlowGGUFTextEncoderLoader",
    ]
    group = graph["extra"]["groupNodes"]["mine"]
    loader, sampler, clip = group["nodes"]
    assert loader["type"] == "AuraFlowGGUFLoader"
    assert loader["widgets_values"] == ["own.gguf", "auto", True, "exact"]
    assert [slot["name"] for slot in loader["inputs"]] == (["model_name"] if sockets else [])
    assert (clip["type"], clip["widgets_values"]) == ("AuraFlowGGUFTextEncoderLoader", ["own.gguf"])
    assert sampler["widgets_values"] == SAMPLER
    # the values of widgets that are inputs come last
    files = [node["widgets_values"] for node in graph["nodes"]]
    for values, file in zip(files, ("v7.gguf", "w.gguf"), strict=True):
        settings = ["auto", True, "exact"]
        expected = [*settings, file, *SAMPLER, "t5.gguf"] if sockets else [file, *settings, *SAMPLER, "t5.gguf"]
        assert values == expected
    left = [slot["name"] for slot in graph["nodes"][0]["inputs"]]
    assert left == ["positive", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"]
    assert graph["links"] == [[1, 9, 0, 3, 0, "CONDITIONING"]]
    assert migrate(graph) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda graph, group: graph["nodes"][0]["widgets_values"].append(1),
            "it has 14 values, and the nodes in it 13",
        ),
        (
            lambda graph, group: group["nodes"][1]["inputs"].append({"name": "cfg", "widget": {"name": "cfg"}}),
            "some widgets of KSampler are inputs",
        ),
        (lambda graph, group: graph["nodes"][0]["inputs"][1].update(link=5), "its widgets are linked"),
        (lambda graph, group: group["links"].append([1, 0, 0, 0, 2, "X"]), "its widgets are linked"),
    ],
    ids=["values", "inputs", "linked outside", "linked inside"],
)
def test_a_node_in_an_older_group_node_stays_where_its_values_are_not_certain(change, why):
    graph = group_node([*UNET, *SAMPLER, *CLIP])
    change(graph, graph["extra"]["groupNodes"]["mine"])
    before = copy.deepcopy(graph)
    unet, clip = migrate(graph)
    assert unet.startswith("UnetLoaderGGUFAdvanced in the group node mine stays: ")
    assert why in unet
    if "linked" in why:
        assert "becomes" in clip
        (node,) = graph["nodes"]
        assert node["widgets_values"] == [*UNET, *SAMPLER, "t5.gguf"]
        before["extra"]["groupNodes"]["mine"]["nodes"].pop()
        graph["extra"]["groupNodes"]["mine"]["nodes"].pop()
        assert graph["extra"] == before["extra"]
    else:
        assert "stays" in clip
        assert graph == before


def test_a_node_in_an_older_group_node_stays_where_one_of_them_has_another_model(models):
    graph = group_node(*([file, *UNET[1:], *SAMPLER, *CLIP] for file in ("aura.gguf", "wan/flux.gguf")))
    unet, clip = migrate(graph, models=[models])
    assert "stays: its file wan/flux.gguf is a Flux transformer" in unet
    assert "becomes" in clip
    assert [node["widgets_values"][-1] for node in graph["nodes"]] == ["t5.gguf"] * 2


def test_nodes_of_group_nodes_in_a_prompt():
    """There the editor has written each under the number of the group node and its own."""
    prompt = {"3:0": copy.deepcopy(PROMPT["1"]), "3:1": {"class_type": "KSampler", "inputs": {"model": ["3:0", 0]}}}
    assert migrate(prompt) == ["UnetLoaderGGUF 3:0 becomes AuraFlowGGUFLoader"]
    assert prompt["3:1"]["inputs"] == {"model": ["3:0", 0]}


@pytest.mark.parametrize("other", [[], {}, {"nodes": 1}, {"nodes": [{"type": "X"}]}, {"1": {"class_type": "X"}}, 5])
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
    half_an_emoji = PROMPT | {"5": {"class_type": "Note", "inputs": {"text": "\ud83d 猫"}}}
    Path("emoji.json").write_text("\ufeff" + json.dumps(half_an_emoji), encoding="utf-8")
    assert cli.main(["migrate", "emoji.json", "--output", "emoji.json", "--overwrite"]) == 0
    assert json.loads(Path("emoji.json").read_text(encoding="utf-8"))["5"] == half_an_emoji["5"]
    assert "猫" in Path("emoji.json").read_text(encoding="utf-8")
    Path("picture.json").write_bytes(b"\x89PNG\r\n\xff\xfe")
    assert cli.main(["migrate", "picture.json"]) == 1
    assert "picture.json: found no text" in capsys.readouterr().err
    Path("page.json").write_text("<!DOCTYPE html>")
    assert cli.main(["migrate", "page.json"]) == 1
    assert "page.json: found no JSON" in capsys.readouterr().err
