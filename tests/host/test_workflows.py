"""What a running server says about the nodes and makes of the pack's workflows, and what docs/api.md promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from auraflow_gguf.devtools import assets, locales, templates
from auraflow_gguf.devtools.random_models import write_hollow
from auraflow_gguf.devtools.server import ROOT, PromptError, Server, Workflow, load_workflow
from auraflow_gguf.devtools.small_workflows import LORA, small
from auraflow_gguf.loader.files.gguf_file import open_gguf
from auraflow_gguf.migration import REPLACEMENTS
from PIL import Image
from safetensors.torch import load_file, save_file

from .bad_files import write_flux, write_truncated

ADVICE = "run `python dev.py assets` if this is meant"


@pytest.fixture(scope="module")
def every_node(server: Server) -> templates.ObjectInfo:
    """The nodes, as the server describes them."""
    return assets.object_info(server)


@pytest.fixture(scope="module")
def info(every_node: templates.ObjectInfo) -> templates.ObjectInfo:
    """Ours."""
    return {name: entry for name, entry in every_node.items() if assets.is_ours(entry)}


def test_ids_inputs_and_defaults_are_those_that_programs_know(info):
    known = json.loads(assets.SNAPSHOT.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(assets.stable(info))) == known, ADVICE


@pytest.mark.host_independent
def test_translations_have_every_text_of_the_nodes(info):
    english = locales.node_defs(info)
    assert locales.read("en") == english, ADVICE
    assert _keys(locales.read("zh")) == _keys(english)


def _keys(tree):
    return {key: _keys(value) for key, value in tree.items()} if isinstance(tree, dict) else bool(tree)


@pytest.mark.host_independent
def test_every_node_has_a_help_page_that_names_its_inputs(info):
    for name, described in info.items():
        inputs = [key for group in ("required", "optional") for key in described["input"].get(group, {})]
        for page in (ROOT / "web" / "docs" / f"{name}.md", ROOT / "web" / "docs" / name / "zh.md"):
            text = page.read_text(encoding="utf-8")
            assert [key for key in inputs if f"`{key}`" not in text] == [], page
            (picture,) = re.findall(r"!\[.+\]\((.+)\)", text)
            assert (ROOT / "web" / "docs" / picture).is_file(), page


@pytest.mark.host_independent
def test_replacements_of_other_packs_nodes_have_inputs_of_ours(info):
    for replacement in REPLACEMENTS.values():
        inputs = info[replacement.new]["input"]
        assert {*replacement.inputs.values(), *replacement.added} == {*inputs["required"], *inputs.get("optional", {})}


def test_the_host_takes_a_prompt_for_another_pack(server):
    workflow = small(load_workflow("text_to_image"))
    model = workflow["loader"]["inputs"]["model_name"]
    workflow["loader"] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": model}, "_meta": {}}
    workflow["sampler"]["inputs"]["seed"] = 77
    assert server.prompt(workflow)


OTHER_PACK = """
class Loader:
    CATEGORY, FUNCTION, RETURN_TYPES = "loaders", "load", ("STRING",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"unet_name": ("STRING", {{}})}}}}

    def load(self, unet_name):
        return {{"ui": {{"loaded": [unet_name]}}, "result": (unet_name,)}}


NODE_CLASS_MAPPINGS = {{{name!r}: Loader}}
"""


def replacements(server: Server) -> dict[str, list[str]]:
    """What the editor asks for when a graph has nodes that it does not know: their ids, and those that can stand in."""
    with urllib.request.urlopen(f"{server.url}/api/node_replacements") as answer:
        offered = {old: [entry["new_node_id"] for entry in entries] for old, entries in json.load(answer).items()}
    return {old: new for old, new in offered.items() if old in REPLACEMENTS}


def test_replacements_are_offered_where_the_other_pack_is_absent(server):
    assert replacements(server) == {old: [replacement.new] for old, replacement in REPLACEMENTS.items()}


def test_replacements_are_not_offered_for_nodes_that_another_pack_has(host, tmp_path):
    """Two such packs, in the order in which the host happens to find them and ours."""
    for folder, name in (("a-pack", "UnetLoaderGGUF"), ("z-pack", "CLIPLoaderGGUF")):
        (tmp_path / "custom_nodes" / folder).mkdir(parents=True)
        (tmp_path / "custom_nodes" / folder / "__init__.py").write_text(OTHER_PACK.format(name=name))
    with Server(host, tmp_path, {}) as server:
        assert replacements(server) == {"UnetLoaderGGUFAdvanced": ["AuraFlowGGUFLoader"]}
        theirs = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "theirs.gguf"}, "_meta": {}}
        assert server.prompt({"1": theirs}) == []
        with urllib.request.urlopen(f"{server.url}/history") as answer:
            (run,) = json.load(answer).values()
        assert run["outputs"]["1"] == {"loaded": ["theirs.gguf"]}


# What an older host can do too; its Train LoRA cannot train what a node has loaded.
IN_THE_NEWEST_ALONE = ("train_lora",)
RUN_BY_ANOTHER = ("pony_v7",)  # of the same nodes


def _of(cases: list[templates.Template]) -> list:
    once = pytest.mark.host_independent
    return [pytest.param(t, id=t.case, marks=[once] if t.case in IN_THE_NEWEST_ALONE else []) for t in cases]


@pytest.mark.parametrize("template", _of(templates.TEMPLATES))
def test_the_host_knows_every_node_and_input_of_the_workflow(template, every_node):
    workflow = load_workflow(template.case)
    assert workflow == template.workflow, ADVICE
    for key, node in workflow.items():
        described = every_node[node["class_type"]]["input"]
        known = described.get("required", {}) | described.get("optional", {})
        assert node["inputs"].keys() <= known.keys(), key
        assert described.get("required", {}).keys() <= node["inputs"].keys(), key
        for name, value in node["inputs"].items():
            kind, *options = known[name]
            if templates.is_link(value):
                source, number = value
                assert every_node[workflow[source]["class_type"]]["output"][number] == kind, (key, name)
            elif not re.search(r"\.[a-z]+$", str(value)):  # a file's name is one that the machine has or has not
                options = options[0] if options else {}
                choices = kind if isinstance(kind, list) else options.get("options") or [value]
                assert value in choices, (key, name)
                assert options.get("min", value) <= value <= options.get("max", value), (key, name)


@pytest.mark.parametrize("template", _of([t for t in templates.TEMPLATES if t.case not in RUN_BY_ANOTHER]))
def test_the_workflow_runs(server, template):
    pictures = server.prompt(small(load_workflow(template.case)))
    if template.case == "convert_and_save":
        _check_made_files(server)
        return
    if template.case == "train_lora":
        (file,) = (server.output / "loras").glob("*.safetensors")
        assert file.name == "AuraFlow_2_steps_00001_.safetensors"
        factors = load_file(file)
        assert factors["diffusion_model.single_layers.0.attn.w1q.lora_up.weight"].any()
        return
    (path,) = pictures
    with Image.open(path) as image:
        assert image.size == ((96, 96) if template.case == "image_to_image" else (64, 64))
        assert len(image.getcolors(1 << 16)) > 100
    if template.case == "importance_matrix":
        assert (server.output / "imatrix" / "AuraFlow_00001_.gguf").is_file()
    if template.case == "fit_to_a_size":
        assert (server.output / "calibration" / "AuraFlow_00001_.safetensors").is_file()


def _check_made_files(server: Server) -> None:
    (converted,) = (server.base / "models" / "diffusion_models").glob("*-Q8_0.gguf")
    assert open_gguf(converted).tensors["single_layers.0.attn.w1q.weight"].type.name == "Q8_0"
    saved = open_gguf(server.output / "diffusion_models" / "AuraFlow_00001_.gguf")
    assert saved.tensors["single_layers.0.attn.w1q.weight"].type.name == "Q4_K"
    assert (server.base / "models" / "loras" / LORA).is_file()


@pytest.mark.host_independent
def test_the_api_document_is_true(server, tmp_path):
    """Every block of code in docs/api.md, executed in order, on this server."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (tmp_path / "workflow.json").write_text(json.dumps(small(load_workflow("text_to_image"))))
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} == {"sh", "python"}
    for language, code in blocks:
        code = code.replace("http://127.0.0.1:8188", server.url)
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
        ran = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True)
        assert ran.returncode == 0, f"{code}\n{ran.stdout}\n{ran.stderr}"
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (64, 64)


def _environment() -> dict[str, str]:
    """This Python first in PATH, as ``python``."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def _troubles(server: Server) -> dict[str, Workflow]:
    """A prompt for each message in the README's table, by the message."""
    models = server.base / "models"
    folder = models / "diffusion_models"
    write_flux(folder / "trouble-flux.gguf")
    write_truncated(folder / "trouble-cut.gguf")
    write_hollow(folder / "trouble-label.gguf", "Q4_0")
    with open(folder / "trouble-label.gguf", "r+b") as file:
        key = b"aura.block_count"
        file.seek(file.read(1 << 16).index(key) + len(key) + 4)
        file.write((35).to_bytes(4, "little"))
    save_file({"lora_unet_blocks_7_attn1.lora_down.weight": torch.ones(2, 8)}, models / "loras" / "trouble.safetensors")
    (folder / "trouble-taken.gguf").touch()

    nodes = small(load_workflow("convert_and_save"))
    convert = nodes["convert"]["inputs"]

    def load(name: str) -> Workflow:
        save = templates.node("AuraFlowGGUFSave", **{**nodes["save"]["inputs"], "model": ["loader", 0]})
        return {"loader": templates.node("AuraFlowGGUFLoader", model_name=name), "save": save}

    lora = {name: nodes[name] for name in ("loader", "lora", "save")}
    lora["lora"]["inputs"]["lora_name"] = "trouble.safetensors"
    return {
        "found a Flux transformer, expected an AuraFlow transformer": load("trouble-flux.gguf"),
        "The download is incomplete": load("trouble-cut.gguf"),
        "in its metadata, but` … `by its tensors": load("trouble-label.gguf"),
        "None of its modules is in this model": lora,
        "cannot be made without an importance matrix": {
            "1": templates.node("AuraFlowGGUFConvert", **{**convert, "type": "IQ2_XXS"})
        },
        "found a file of that name, expected none": {
            "1": templates.node("AuraFlowGGUFConvert", **{**convert, "output_name": "trouble-taken"})
        },
        "Value not in list": load("absent.gguf"),
    }


@pytest.mark.host_independent
def test_every_message_in_the_readme_is_said(server):
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Troubleshooting")[2].partition("\n\n**")[0]
    messages = re.findall(r"^\| `(.+)` \| [^|]+ \|$", table, re.MULTILINE)
    prompts = _troubles(server)
    assert messages == list(prompts)
    for message, prompt in prompts.items():
        with pytest.raises(PromptError) as refusal:
            server.prompt(prompt)
        for part in message.split("` … `"):
            assert part in str(refusal.value), message
