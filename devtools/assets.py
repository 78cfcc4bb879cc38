"""``dev.py assets``: writes what follows from the nodes, so that nobody keeps it up by hand: the templates, the English
translation file, the snapshot of the nodes' API, and the pictures of templates, help pages and README."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

from . import locales, templates
from .browser import Editor, browser, frontend_arguments
from .hosts import Host, newest
from .random_models import write_hollow
from .server import ROOT, Server
from .small_workflows import LORA, PICTURES, example_picture

SNAPSHOT = ROOT / "tests" / "host" / "object_info.json"
HELP_PICTURES = ROOT / "web" / "docs" / "images"
README_PICTURE = ROOT / "docs" / "graph.png"

# The template whose graph shows a node, and in columns what of it is in the picture.
_HELP = {
    "AuraFlowGGUFLoader": ("text_to_image", (("loader",), ("sampling",))),
    "AuraFlowGGUFTextEncoderLoader": ("importance_matrix", (("clip",), ("positive",))),
    "AuraFlowLoraLoader": ("text_to_image_lora", (("loader",), ("lora",), ("sampling",))),
    "AuraFlowGGUFConvert": ("convert_and_save", (("convert",),)),
    "AuraFlowGGUFSave": ("convert_and_save", (("loader",), ("lora",), ("save",))),
    "AuraFlowGGUFImportance": (
        "importance_matrix",
        (("sampling", "positive", "negative", "latent"), ("importance",)),
    ),
    "AuraFlowGGUFCalibration": (
        "fit_to_a_size",
        (("sampling", "positive", "negative", "latent"), ("calibration",)),
    ),
    "AuraFlowGGUFFit": ("fit_to_a_size", (("loader",), ("fit",))),
    "AuraFlowGGUFInspect": ("convert_and_save", (("inspect",),)),
}
_MARGIN = 24  # around a picture's nodes, in pixels
THUMBNAIL = (512, 512)  # the template browser's cards are square
_THUMBNAILS = {  # what of a template's graph can be told apart in a small picture
    "text_to_image": (("loader", "positive"), ("sampling", "sampler")),
    "text_to_image_lora": (("loader", "clip"), ("lora", "positive")),
    "image_to_image": (("image", "scale"), ("encode", "sampler")),
    "pony_v7": (("loader", "tokenizer"), ("latent", "sampler")),
    "train_lora": (("pictures", "loader"), ("train",)),
    "convert_and_save": (("convert",), ("inspect",)),
    "importance_matrix": (("positive", "negative", "latent"), ("importance",)),
    "fit_to_a_size": (("loader", "positive"), ("fit", "calibration")),
}
_NAMES = {  # files that the templates name
    "diffusion_models": (templates.CHECKPOINT, templates.PONY_V7),
    "text_encoders": (templates.TEXT_ENCODER, "pile-t5-xl-Q4_K_M.gguf"),
    "vae": (templates.VAE,),
    "loras": (LORA,),
}


def main(options: argparse.Namespace, hosts: list[Host]) -> int:
    host = newest(hosts)
    if host is None:
        print("There is no ComfyUI here to ask: set COMFYUI_PATH.", file=sys.stderr)
        return 1
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base,
        Server(host, Path(base), {}, arguments=frontend_arguments(host)) as server,
    ):
        _add_files(server.base)
        info = object_info(server)
        templates.write(info)
        ours = {name: entry for name, entry in info.items() if is_ours(entry)}
        locales.write_english(ours)
        SNAPSHOT.write_text(json.dumps(stable(ours), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if not options.no_pictures:
            with browser() as editor:
                _pictures(editor, server.url)
    return 0


def _add_files(base: Path) -> None:
    """Put files of the names in the templates where the nodes' choices come from."""
    for folder, names in _NAMES.items():
        for name in names:
            (base / "models" / folder / name).touch()
    write_hollow(base / "models" / "diffusion_models" / templates.MODEL, "Q4_K_M")
    (base / "input" / PICTURES).mkdir(parents=True, exist_ok=True)
    example_picture().save(base / "input" / "example.png")


def object_info(server: Server) -> templates.ObjectInfo:
    with urllib.request.urlopen(f"{server.url}/object_info") as answer:
        return json.load(answer)


def stable(info: templates.ObjectInfo) -> dict[str, Any]:
    """What programs that use the pack's nodes over the API rely on: ids, inputs with their types and defaults, outputs.
    The choices of a combo are left out where they are files of the machine, and so are texts."""
    return {
        name: {
            "display_name": entry["display_name"],
            "category": entry["category"],
            "output_node": entry["output_node"],
            "output": entry["output"],
            "output_name": entry["output_name"],
            "input": {
                group: {key: _stable_input(*spec) for key, spec in inputs.items()}
                for group, inputs in entry["input"].items()
                if group != "hidden"
            },
        }
        for name, entry in sorted(info.items())
    }


def is_ours(entry: dict[str, Any]) -> bool:
    return entry["python_module"] == "custom_nodes.auraflow-gguf"


_KEPT = ("default", "min", "max", "step", "multiline")


def _stable_input(kind: str, options: dict[str, Any] | None = None) -> list[Any]:
    return [kind, {key: options[key] for key in _KEPT if key in options}] if options else [kind]


def _pictures(editor: Editor, url: str) -> None:
    graphs = {template.case: _read(template) for template in templates.TEMPLATES}
    for template in templates.TEMPLATES:
        editor.open(url)
        editor.load(_only(graphs[template.case], template.case, _THUMBNAILS[template.case]))
        if template.case == "convert_and_save":
            _inspect(editor)
        picture = _shot(editor)
        picture.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
        _on_background(picture).save(templates.EXAMPLES / f"{template.title}.jpg", quality=85)
    HELP_PICTURES.mkdir(exist_ok=True)
    for name, (case, columns) in _HELP.items():
        editor.open(url)
        editor.load(_only(graphs[case], case, columns))
        if name == "AuraFlowGGUFInspect":
            _inspect(editor)
        _small(_shot(editor)).save(HELP_PICTURES / f"{name}.png", optimize=True)
    editor.open(url)
    editor.load(graphs["text_to_image"])
    _small(_shot(editor)).save(README_PICTURE, optimize=True)


def _read(template: templates.Template) -> dict[str, Any]:
    return json.loads((templates.EXAMPLES / f"{template.title}.json").read_text(encoding="utf-8"))


def _only(graph: dict[str, Any], case: str, columns: tuple[templates.Column, ...]) -> dict[str, Any]:
    """A part of a template's graph, in columns of its own."""
    (template,) = (template for template in templates.TEMPLATES if template.case == case)
    order = [*template.workflow, "note"]
    ids = {order.index(key) + 1 for column in columns for key in column}
    links = [link for link in graph["links"] if link[1] in ids and link[3] in ids]
    kept = {link[0] for link in links}
    nodes = json.loads(json.dumps([node for node in graph["nodes"] if node["id"] in ids]))
    for node in nodes:
        for slot in node["inputs"]:
            slot["link"] = slot["link"] if slot["link"] in kept else None
        for slot in node["outputs"]:
            slot["links"] = [link for link in slot["links"] if link in kept]
    templates.place(columns, {order[node["id"] - 1]: node for node in nodes})
    return {**graph, "nodes": nodes, "links": links}


def _inspect(editor: Editor) -> None:
    """Run the inspector of the graph, and wait for its panel."""
    editor.page.evaluate(
        """async () => {
            const { output, workflow } = await app.graphToPrompt();
            const ours = Object.entries(output).filter(([, node]) => node.class_type === "AuraFlowGGUFInspect");
            await app.api.queuePrompt(0, { output: Object.fromEntries(ours), workflow });
        }"""
    )
    editor.page.locator(".aurainspect-panel table").wait_for()
    editor.page.wait_for_function("() => !app.runningNodeId")  # else the node has a frame


def _shot(editor: Editor) -> Image.Image:
    """The graph alone: without the menus around it, cut to its nodes."""
    editor.fit()
    editor.page.add_style_tag(content=_HIDE_MENUS)
    editor.frame()
    left, top, right, bottom = editor.bounds()
    image = Image.open(io.BytesIO(editor.page.screenshot())).convert("RGB")
    return image.crop((left - _MARGIN, top - _MARGIN, right + _MARGIN, bottom + _MARGIN))


_HIDE_MENUS = """
.comfyui-body-top, .comfyui-body-left, .comfyui-body-right, .comfyui-body-bottom, .side-tool-bar-container,
.p-toast, .graph-canvas-menu, .litegraph-minimap, [data-testid=selection-toolbox] { visibility: hidden !important }
"""


def _small(picture: Image.Image) -> Image.Image:
    """A palette of 128 colours: a graph needs no more, and a third of the bytes."""
    return picture.quantize(128)


def _on_background(picture: Image.Image) -> Image.Image:
    """In the middle of a thumbnail."""
    canvas = Image.new("RGB", THUMBNAIL, picture.getpixel((2, 2)))
    canvas.paste(picture, ((THUMBNAIL[0] - picture.width) // 2, (THUMBNAIL[1] - picture.height) // 2))
    return canvas
