"""Makes the pack's workflows small, and gives them files that are there, so that tests can run them on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from . import random_models
from .server import Server, Workflow, set_text_encoder

LORA = "my-style.safetensors"
PICTURES = "my-pictures"

_VALUES = {
    "EmptyLatentImage": {"width": 64, "height": 64},
    "ImageScaleToTotalPixels": {"megapixels": 0.01},
    "KSampler": {"steps": 2, "sampler_name": "euler"},
    "AuraFlowGGUFImportance": {"steps": 1, "sampler_name": "euler"},
    "AuraFlowGGUFCalibration": {"steps": 1, "sampler_name": "euler"},
    # what the file has already, so that all but the LoRA's weight is copied
    "AuraFlowGGUFSave": {"type": "Q4_K_M"},
    "AuraFlowLoraLoader": {"lora_name": LORA},
    "LoadImageTextDataSetFromFolder": {"folder": PICTURES},
    "TrainLoraNode": {"steps": 2, "rank": 2, "training_dtype": "fp32", "lora_dtype": "fp32"},
}


def small(workflow: Workflow) -> Workflow:
    """The workflow in a size for tests, with the models that `server_models` and `add_files` put in place."""
    model = random_models.cached_auraflow().name
    checkpoint = random_models.cached_checkpoint().name
    values = {
        **_VALUES,
        "UNETLoader": {"unet_name": checkpoint},
        "AuraFlowGGUFConvert": {"source": f"diffusion_models/{checkpoint}", "type": "Q8_0"},
        "AuraFlowGGUFLoader": {"model_name": model},
        "AuraFlowGGUFInspect": {"model_name": model},
        "VAELoader": {"vae_name": random_models.cached_vae().name},
    }
    workflow.pop("fit", None)  # takes minutes in the types that people want; tests/host/test_fit_node.py has others
    for node in workflow.values():
        node["inputs"].update(values.get(node["class_type"], {}))
    if "clip" in workflow:
        set_text_encoder(workflow, random_models.cached_text_encoder())
        unpad_texts(workflow)
    return workflow


def unpad_texts(workflow: Workflow) -> None:
    """Has texts encoded at their own length, and not filled up to 256 tokens, which takes half a minute on one core."""
    workflow["tokenizer"] = {
        "class_type": "T5TokenizerOptions",
        "inputs": {"clip": ["clip", 0], "min_padding": 0, "min_length": 1},
    }
    for node in workflow.values():
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["clip"] = ["tokenizer", 0]


def server_models() -> dict[str, Path]:
    """The folders of the random models, by kind."""
    return {
        "diffusion_models": random_models.cached_auraflow().parent,  # the checkpoint's too
        "text_encoders": random_models.cached_text_encoder().parent,
        "vae": random_models.cached_vae().parent,
    }


def add_files(server: Server) -> None:
    """Put a LoRA, a picture, and a folder with a picture and its caption where the server finds them."""
    generator = torch.Generator().manual_seed(0)
    name, (out, into) = "diffusion_model.single_layers.0.attn.w1q", (3072, 3072)
    factors = {
        f"{name}.lora_up.weight": torch.randn(out, 4, generator=generator) * 0.05,
        f"{name}.lora_down.weight": torch.randn(4, into, generator=generator) * 0.05,
    }
    save_file(factors, server.base / "models" / "loras" / LORA)
    pictures = server.base / "input" / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    example_picture().resize((128, 128)).save(server.base / "input" / "example.png")
    example_picture().resize((128, 128)).save(pictures / "evening.png")
    (pictures / "evening.txt").write_text("an evening sky")


def example_picture() -> Image.Image:
    """A picture to begin image-to-image with."""
    sky = Image.linear_gradient("L").resize((512, 512))
    return Image.merge("RGB", (sky.point(lambda v: 255 - v // 2), sky.point(lambda v: 180 - v // 3), sky))
