"""The workflows that the pack shows: each as a prompt in API format, which the tests run, and as a graph for ComfyUI's
template browser. ``python dev.py templates`` writes both, so change them here."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .server import ROOT, Workflow

Column = tuple[str, ...]
ObjectInfo = dict[str, dict[str, Any]]
"""The answer of ``/object_info``: a node's class → its description."""

EXAMPLES = ROOT / "example_workflows"
WORKFLOWS = ROOT / "tests" / "workflows"

MODEL = "aura_flow_0.3-Q4_K_M.gguf"
PONY_V7 = "base-v7-Q4_0.gguf"
CHECKPOINT = "aura_flow_0.3.safetensors"
TEXT_ENCODER = "model.fp16.safetensors"
VAE = "sdxl_vae.safetensors"
PUBLISHED = {
    MODEL: ("city96/AuraFlow-v0.3-gguf/resolve/main/", "diffusion_models"),
    PONY_V7: ("purplesmartai/pony-v7-base/resolve/main/gguf/", "diffusion_models"),
    CHECKPOINT: ("fal/AuraFlow-v0.3/resolve/main/", "diffusion_models"),
    TEXT_ENCODER: ("fal/AuraFlow-v0.3/resolve/main/text_encoder/", "text_encoders"),
    VAE: ("stabilityai/sdxl-vae/resolve/main/", "vae"),
}
"""Files in the templates that can be downloaded: from which folder on Hugging Face, and ComfyUI's folder for them."""

PROMPT = "a lighthouse on a cliff at dawn, oil painting"


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node of a prompt; a link to the first output of node x is ``["x", 0]``."""
    return {"class_type": class_type, "inputs": inputs}


def _text_encoder() -> dict[str, Any]:
    """ComfyUI's own loader, for the file that is published."""
    return node("CLIPLoader", clip_name=TEXT_ENCODER, type="stable_diffusion", device="default")


def _packed_text_encoder() -> dict[str, Any]:
    return node("AuraFlowGGUFTextEncoderLoader", text_encoder_name="pile-t5-xl-Q4_K_M.gguf")


def _loader(name: str = MODEL) -> dict[str, Any]:
    return node("AuraFlowGGUFLoader", model_name=name, compute_dtype="auto", modulation_cache=True)


def _lora() -> dict[str, Any]:
    return node("AuraFlowLoraLoader", model=["loader", 0], lora_name="my-style.safetensors", strength=1.0)


def _texts(prompt: str, clip: str = "clip") -> Workflow:
    return {
        "positive": node("CLIPTextEncode", clip=[clip, 0], text=prompt),
        "negative": node("CLIPTextEncode", clip=[clip, 0], text=""),
    }


def _sampling(latent: str, **others: Any) -> dict[str, Any]:
    """The inputs that KSampler and Collect Importance for GGUF have in common."""
    return {
        "model": ["sampling", 0],
        "seed": 0,
        "steps": 25,
        "cfg": 3.5,
        "sampler_name": "uni_pc",
        "scheduler": "simple",
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": [latent, 0],
        **others,
    }


def _shift(model: str) -> dict[str, Any]:
    return node("ModelSamplingAuraFlow", model=[model, 0], shift=1.73)


def _scale(image: list[Any], megapixels: float) -> dict[str, Any]:
    """To sides of whole patches: 16 pixels, which are 2 latents."""
    return node(
        "ImageScaleToTotalPixels", image=image, upscale_method="lanczos", megapixels=megapixels, resolution_steps=16
    )


def _vae() -> dict[str, Any]:
    return node("VAELoader", vae_name=VAE)


def _picture(latent: str) -> Workflow:
    return {
        "decode": node("VAEDecode", samples=[latent, 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="AuraFlow"),
    }


def _empty(width: int = 1024, height: int = 1024) -> dict[str, Any]:
    return node("EmptyLatentImage", width=width, height=height, batch_size=1)


def _text_to_image(*, lora: bool) -> Workflow:
    return {
        "loader": _loader(),
        **({"lora": _lora()} if lora else {}),
        "sampling": _shift("lora" if lora else "loader"),
        "clip": _text_encoder(),
        **_texts(PROMPT),
        "latent": _empty(),
        "sampler": node("KSampler", **_sampling("latent", denoise=1.0)),
        "vae": _vae(),
        **_picture("sampler"),
    }


_HUB = "https://huggingface.co"
_FILES_OF = (
    "### Files\n"
    "- transformer: [{model}]({address}), or another type, in `models/diffusion_models`\n"
    f"- Pile-T5-XL: [text_encoder/{TEXT_ENCODER}]({_HUB}/fal/AuraFlow-v0.3/tree/main/text_encoder), in "
    "`models/text_encoders`\n"
    f"- VAE: [{VAE}]({_HUB}/stabilityai/sdxl-vae), in `models/vae`\n\n"
    "Press **R** after you have added files. A text encoder in GGUF takes a quarter of the memory: **Load AuraFlow "
    "Text Encoder (GGUF)** in the place of *Load CLIP*."
)
_FILES = _FILES_OF.format(model=MODEL, address=f"{_HUB}/city96/AuraFlow-v0.3-gguf")


@dataclass(frozen=True)
class Template:
    """A workflow of the pack.

    Attributes:
        case: its folder in tests/workflows.
        title: its name in the template browser, and its file's.
        workflow: the prompt.
        note: Markdown for the note in the graph.
        columns: where the nodes stand, from left to right and from top to bottom; ``"note"`` is the note.
    """

    case: str
    title: str
    workflow: Workflow
    note: str
    columns: tuple[Column, ...]


TEMPLATES = (
    Template(
        "text_to_image",
        "AuraFlow text to image",
        _text_to_image(lora=False),
        f"{_FILES}\n\nAuraFlow likes CFG 3 to 5, 20 to 50 steps and about a megapixel.",
        (
            ("loader", "clip", "vae", "note"),
            ("sampling", "positive", "negative", "latent"),
            ("sampler", "decode"),
            ("save",),
        ),
    ),
    Template(
        "text_to_image_lora",
        "AuraFlow with a LoRA",
        _text_to_image(lora=True),
        f"{_FILES}\n- LoRA: `models/loras`\n\nThe LoRA's node says how many of its modules were found. Chain several "
        "to stack them.",
        (
            ("loader", "clip", "vae", "note"),
            ("lora", "positive", "negative", "latent"),
            ("sampling", "sampler", "decode"),
            ("save",),
        ),
    ),
    Template(
        "image_to_image",
        "AuraFlow variation of an image",
        {
            "loader": _loader(),
            "sampling": _shift("loader"),
            "clip": _text_encoder(),
            **_texts("the same place in deep winter, snow, oil painting"),
            "image": node("LoadImage", image="example.png"),
            "scale": _scale(["image", 0], 1.0),
            "vae": _vae(),
            "encode": node("VAEEncode", pixels=["scale", 0], vae=["vae", 0]),
            "sampler": node("KSampler", **_sampling("encode", denoise=0.6)),
            **_picture("sampler"),
        },
        f"{_FILES}\n\n`denoise` says how far the picture may go from the first one: 0.3 keeps most, 0.8 little.",
        (
            ("loader", "clip", "vae", "note"),
            ("sampling", "positive", "negative"),
            ("image", "scale", "encode"),
            ("sampler", "decode"),
            ("save",),
        ),
    ),
    Template(
        "pony_v7",
        "Pony V7 text to image",
        {
            "loader": _loader(PONY_V7),
            "clip": _text_encoder(),
            "tokenizer": node("T5TokenizerOptions", clip=["clip", 0], min_padding=768, min_length=768),
            **_texts("score_9, a lighthouse keeper with a lantern on a cliff at dawn, digital painting", "tokenizer"),
            "latent": _empty(1280, 1536),
            "sampler": node(
                "KSampler", **_sampling("latent", model=["loader", 0], steps=30, sampler_name="euler", denoise=1.0)
            ),
            "vae": _vae(),
            **_picture("sampler"),
        },
        _FILES_OF.format(model=PONY_V7, address=f"{_HUB}/purplesmartai/pony-v7-base/tree/main/gguf")
        + "\n\nThe settings of its authors: 30 steps of euler, CFG 3.5, no *ModelSamplingAuraFlow*, texts filled up to "
        "768 tokens, 1280 × 1536 or about as large.",
        (
            ("loader", "clip", "vae", "note"),
            ("tokenizer", "positive", "negative", "latent"),
            ("sampler", "decode"),
            ("save",),
        ),
    ),
    Template(
        "train_lora",
        "AuraFlow train a LoRA",
        {
            "loader": _loader(),
            "clip": _text_encoder(),
            "pictures": node("LoadImageTextDataSetFromFolder", folder="my-pictures"),
            "captions": node("CLIPTextEncode", clip=["clip", 0], text=["pictures", 1]),
            "scale": _scale(["pictures", 0], 0.6),
            "vae": _vae(),
            "encode": node("VAEEncode", pixels=["scale", 0], vae=["vae", 0]),
            "train": node(
                "TrainLoraNode",
                model=["loader", 0],
                latents=["encode", 0],
                positive=["captions", 0],
                batch_size=1,
                grad_accumulation_steps=1,
                steps=500,
                learning_rate=0.0005,
                rank=16,
                optimizer="AdamW",
                loss_function="MSE",
                seed=0,
                training_dtype="bf16",
                lora_dtype="bf16",
                quantized_backward=False,
                algorithm="LoRA",
                gradient_checkpointing=True,
                checkpoint_depth=1,
                offloading=False,
                existing_lora="[None]",
                bucket_mode=False,
                bypass_mode=True,
            ),
            "save": node("SaveLoRA", lora=["train", 0], prefix="loras/AuraFlow", steps=["train", 2]),
            "loss": node("LossGraphNode", loss=["train", 1], filename_prefix="AuraFlow"),
        },
        "### A LoRA from your pictures, on a quantized model\n"
        "1. Put 10 to 50 pictures into a folder of ComfyUI's `input`, here `my-pictures`, each with its caption in a "
        "`.txt` file of the same name.\n"
        "2. Press **R**, choose the folder, and run. The weights stay packed. Keep **bypass_mode** on: without it each "
        "weight is unpacked and changed as a whole. **gradient_checkpointing** takes more time and less memory. On a "
        "CPU choose `fp32` for both dtypes: bf16 can take ten times as long and more.\n"
        "3. The file is in `output/loras`, where ComfyUI finds it after **R**: choose it in **Load AuraFlow LoRA**.\n\n"
        "The nodes to train are ComfyUI's own, and experimental; those of 0.16 cannot train a model that a node has "
        "loaded, those of 0.33 can.\n\n" + _FILES,
        (
            ("pictures", "clip", "vae", "note"),
            ("loader", "captions", "scale", "encode"),
            ("train",),
            ("save", "loss"),
        ),
    ),
    Template(
        "convert_and_save",
        "AuraFlow tools convert and save",
        {
            "convert": node(
                "AuraFlowGGUFConvert",
                source=f"diffusion_models/{CHECKPOINT}",
                type="Q4_K_M",
                output_name="",
                overwrite=False,
                imatrix="none",
                tensor_types="",
            ),
            "loader": _loader(),
            "lora": _lora(),
            "save": node(
                "AuraFlowGGUFSave",
                model=["lora", 0],
                type="Q4_K_M",
                filename_prefix="diffusion_models/AuraFlow",
                imatrix="none",
                tensor_types="",
            ),
            "inspect": node("AuraFlowGGUFInspect", model_name=MODEL, check_numbers=False),
        },
        "### Three ways to work with files\n"
        "- **Convert** makes a GGUF file from a checkpoint on disk.\n"
        "- **Load, LoRA, Save** bakes a LoRA into a new file.\n"
        "- **Inspect** shows what a file is.\n\n"
        "Each works without the others: select the ones that you do not need and bypass them with Ctrl+B.",
        (("convert", "note"), ("loader", "lora", "save"), ("inspect",)),
    ),
    Template(
        "importance_matrix",
        "AuraFlow tools importance matrix",
        {
            "loader": node("UNETLoader", unet_name=CHECKPOINT, weight_dtype="default"),
            "sampling": _shift("loader"),
            "clip": _packed_text_encoder(),
            **_texts(PROMPT),
            "latent": _empty(),
            "importance": node(
                "AuraFlowGGUFImportance", **_sampling("latent", filename_prefix="AuraFlow", continue_from="none")
            ),
            "vae": _vae(),
            **_picture("importance"),
        },
        "### An importance matrix\n"
        "Queue this with some tens of prompts like those that the file is for. After the first, press **R** and choose "
        "the newest file in `continue_from`. Then choose it as `imatrix` when you convert.\n\n"
        "Use the unquantized model here: `models/diffusion_models`.",
        (
            ("loader", "clip", "vae", "note"),
            ("sampling", "positive", "negative", "latent"),
            ("importance", "decode"),
            ("save",),
        ),
    ),
    Template(
        "fit_to_a_size",
        "AuraFlow tools fit to a size",
        {
            "loader": node("UNETLoader", unet_name=CHECKPOINT, weight_dtype="default"),
            "sampling": _shift("loader"),
            "clip": _packed_text_encoder(),
            **_texts(PROMPT),
            "latent": _empty(),
            "calibration": node(
                "AuraFlowGGUFCalibration", **_sampling("latent", filename_prefix="AuraFlow", continue_from="none")
            ),
            "vae": _vae(),
            **_picture("calibration"),
            "fit": node(
                "AuraFlowGGUFFit",
                model=["loader", 0],
                calibration="none",
                size=4.0,
                output_name="",
                overwrite=False,
                quick=False,
                imatrix="none",
                device="default",
            ),
        },
        "### The best file for a size\n"
        "1. Bypass **Fit GGUF to a size** (Ctrl+B), and queue the rest with four to eight prompts like those that the "
        "file is for. After the first, press **R** and choose the newest file in `continue_from`.\n"
        "2. Press **R**, choose the last file as `calibration`, bypass **Collect Calibration for GGUF** and what "
        "follows it instead, and queue again. The node says how long it takes; interrupted, it goes on where it "
        "was.\n\n"
        "Use the unquantized model here: `models/diffusion_models`. Measuring needs `pip install diffusers`.",
        (
            ("loader", "clip", "vae", "note"),
            ("sampling", "positive", "negative", "latent"),
            ("calibration", "decode"),
            ("save", "fit"),
        ),
    ),
)


def api_text(workflow: Workflow) -> str:
    """A prompt as the text of its file."""
    return json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"


# Sizes in the graph's pixels.
_TITLE, _GAP, _COLUMN_GAP = 30, 40, 60
_SLOT, _WIDGET, _TEXT, _LINES = 20, 24, 110, 60
_WIDTH = 350
_SIZES = {  # of nodes that show more than their widgets
    "SaveImage": (340, 370),
    "LoadImage": (300, 340),
    "AuraFlowGGUFInspect": (440, 800),
    "CLIPTextEncode": (340, 130),
    "LossGraphNode": (340, 330),
}
_SHOWING_A_LINE = (
    "AuraFlowLoraLoader",
    "AuraFlowGGUFConvert",
    "AuraFlowGGUFSave",
    "AuraFlowGGUFImportance",
    "AuraFlowGGUFFit",
)
_TITLES = {"positive": "Positive prompt", "negative": "Negative prompt", "captions": "Captions"}


def graph(template: Template, info: ObjectInfo) -> dict[str, Any]:
    """A template as a graph of ComfyUI's editor, schema 0.4.

    Args:
        template: what to draw.
        info: the node classes of a server, which say in what order the widgets' values stand.
    """
    ids = {key: number for number, key in enumerate((*template.workflow, "note"), start=1)}
    nodes = {key: _graph_node(ids[key], entry, info) for key, entry in template.workflow.items()}
    for key in _TITLES.keys() & nodes:
        nodes[key]["title"] = _TITLES[key]
    nodes["note"] = _note(ids["note"], template.note)
    links = []
    for key, entry in template.workflow.items():
        for slot, target in enumerate(nodes[key]["inputs"]):
            value = entry["inputs"].get(target["name"])
            if not is_link(value):
                continue
            source = nodes[value[0]]["outputs"][value[1]]
            target["link"] = len(links) + 1
            source["links"].append(target["link"])
            links.append([target["link"], ids[value[0]], value[1], ids[key], slot, target["type"]])
    place(template.columns, nodes)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"auraflow-gguf/{template.case}")),
        "revision": 0,
        "last_node_id": len(ids),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _graph_node(number: int, entry: Mapping[str, Any], info: ObjectInfo) -> dict[str, Any]:
    class_type, given = entry["class_type"], entry["inputs"]
    described = info[class_type]
    inputs, values, height = [], [], 0
    for group in ("required", "optional"):
        for name, (kind, *options) in described["input"].get(group, {}).items():
            options = options[0] if options else {}
            if not _is_widget(kind):
                inputs.append({"name": name, "type": kind, "link": None})
                continue
            value = given.get(name, options.get("default"))
            if is_link(value):  # the widget is there, and does not count
                inputs.append({"name": name, "type": kind, "link": None, "widget": {"name": name}})
                value = options.get("default", 0 if kind == "INT" else "")
            values.append(value)
            height += _TEXT if options.get("multiline") else _WIDGET
            if options.get("control_after_generate", name == "seed"):  # the editor has one for every seed
                values.append("randomize" if options.get("control_after_generate") else "fixed")
                height += _WIDGET
            if options.get("image_upload"):
                values.append("image")
                height += _WIDGET
    if class_type in _SHOWING_A_LINE:
        height += _LINES
    properties: dict[str, Any] = {"Node name for S&R": class_type}
    if models := [_model(value) for value in given.values() if isinstance(value, str) and value in PUBLISHED]:
        properties["models"] = models
    names = described["output_name"]
    outputs = [{"name": n, "type": t, "links": []} for n, t in zip(names, described["output"], strict=True)]
    height += _SLOT * max(len(inputs), len(outputs)) + 20
    return {
        "id": number,
        "type": class_type,
        "pos": [0, 0],
        "size": list(_SIZES.get(class_type, (_WIDTH, height))),
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "properties": properties,
        "widgets_values": values,
    }


def _model(name: str) -> dict[str, str]:
    """What the editor needs to offer the download of a file that is missing."""
    folder, directory = PUBLISHED[name]
    return {"name": name, "url": f"{_HUB}/{folder}{name}", "directory": directory}


def is_link(value: object) -> bool:
    """Whether an input of a prompt is another node's output, ``[key, number]``."""
    return isinstance(value, list)


def _is_widget(kind: object) -> bool:
    """Whether an input of this type is a widget: a list of choices, or one of the simple types."""
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def _note(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [0, 0],
        "size": [340, max(330, 90 + len(text) // 4)],  # as high as its text, of about 50 letters a line
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
    }


def place(columns: Iterable[Sequence[str]], nodes: Mapping[str, dict[str, Any]]) -> None:
    """Set the positions of nodes, in columns."""
    left = 0
    for column in columns:
        top = 0
        for key in column:
            nodes[key]["pos"] = [left, top]
            top += nodes[key]["size"][1] + _TITLE + _GAP
        left += max(nodes[key]["size"][0] for key in column) + _COLUMN_GAP


def write(info: ObjectInfo) -> None:
    """Write all files of all templates; ``info`` is for `graph`."""
    EXAMPLES.mkdir(exist_ok=True)
    for template in TEMPLATES:
        folder = WORKFLOWS / template.case
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "api.json").write_text(api_text(template.workflow), encoding="utf-8")
        text = json.dumps(graph(template, info), indent=2, ensure_ascii=False) + "\n"
        (EXAMPLES / f"{template.title}.json").write_text(text, encoding="utf-8")
