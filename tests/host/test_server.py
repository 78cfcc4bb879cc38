"""A whole workflow over ``/prompt``, and files that cannot be used: a sentence at the node, and the server goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from auraflow_gguf.devtools import random_models
from auraflow_gguf.devtools.hosts import Host
from auraflow_gguf.devtools.server import (
    ROOT,
    PromptError,
    Server,
    Workflow,
    load_workflow,
    set_inputs,
    set_text_encoder,
)
from auraflow_gguf.devtools.small_workflows import unpad_texts
from PIL import Image
from safetensors.torch import save_file

import dev

from .bad_files import write_flux, write_text_encoder, write_truncated


def text_to_image(model_name: str) -> Workflow:
    """The workflow with the demo's text encoder and VAE."""
    workflow = load_workflow("text_to_image")
    set_inputs(workflow, "AuraFlowGGUFLoader", model_name=model_name)
    set_text_encoder(workflow, random_models.cached_text_encoder())
    set_inputs(workflow, "VAELoader", vae_name=random_models.cached_vae().name)
    return workflow


def quick(workflow: Workflow, seed: int) -> Workflow:
    """The workflow made small. Another seed than that of a prompt before has the sampler work again."""
    set_inputs(workflow, "EmptyLatentImage", width=64, height=64)
    set_inputs(workflow, "KSampler", steps=1, sampler_name="euler", seed=seed)
    unpad_texts(workflow)
    return workflow


def test_text_to_image(server: Server) -> None:
    steps = []
    workflow = text_to_image(random_models.cached_auraflow().name)
    unpad_texts(workflow)
    set_inputs(workflow, "EmptyLatentImage", width=128, height=128)
    set_inputs(workflow, "KSampler", steps=2)
    (path,) = server.prompt(workflow, lambda node, step, steps_in_all: steps.append((node, step, steps_in_all)))
    assert steps == [("KSampler", 1, 2), ("KSampler", 2, 2)]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (128, 128)
        assert np.asarray(image).std() > 10
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert not re.search(r"clip missing|unet missing|Missing VAE keys", log)


@pytest.mark.host_independent
def test_the_demo_makes_a_picture(host: Host) -> None:
    command = [sys.executable, "dev.py", dev.INSIDE, "demo", "--steps", "1", "--size", "256"]
    environment = {**os.environ, "COMFYUI_PATH": str(host.path)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "KSampler 1/1" in ran.stdout
    with Image.open(ran.stdout.split("\n")[-2]) as image:
        assert image.size == (256, 256)


def test_a_lora_in_a_spelling_that_the_host_drops(server: Server) -> None:
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    factors = {
        "lora_up": torch.randn(3072, 4, generator=generator),
        "lora_down": torch.randn(4, 3072, generator=generator),
    }
    for name, module in (
        ("lycoris", "lycoris_single_layers_0_attn_w1o"),
        ("flux", "lora_unet_double_blocks_0_img_mlp_0"),
    ):
        save_file({f"{module}.{key}.weight": factor for key, factor in factors.items()}, folder / f"{name}.safetensors")

    workflow = quick(text_to_image(random_models.cached_auraflow().name), seed=3)
    (plain,) = server.prompt(workflow)
    workflow["lora"] = {
        "class_type": "AuraFlowLoraLoader",
        "inputs": {"model": ["loader", 0], "lora_name": "lycoris.safetensors", "strength": 1.0},
    }
    workflow["sampling"]["inputs"]["model"] = ["lora", 0]
    (changed,) = server.prompt(workflow)
    pictures = [np.asarray(Image.open(path), np.float32) for path in (plain, changed)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 1
    assert "lycoris.safetensors: matched 1 of 1 modules" in server.log.read_text(encoding="utf-8", errors="replace")

    set_inputs(workflow, "AuraFlowLoraLoader", lora_name="flux.safetensors")
    with pytest.raises(
        PromptError, match=r"AuraFlowLoraLoader: flux.safetensors: found a Flux or Chroma LoRA .*made for AuraFlow"
    ):
        server.prompt(workflow)


@pytest.mark.parametrize(
    ("name", "write", "found"),
    [
        ("flux.gguf", write_flux, "a Flux transformer"),
        ("t5.gguf", write_text_encoder, "text encoder"),
        ("truncated.gguf", write_truncated, "truncated.gguf: found"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(
    server: Server, name: str, write: Callable[[Path], None], found: str
) -> None:
    write(server.base / "models" / "diffusion_models" / name)
    with pytest.raises(PromptError, match=rf"AuraFlowGGUFLoader: {name}: found .*, expected .*\. \w+.*\.") as refusal:
        server.prompt(quick(text_to_image(name), seed=1))
    assert found in str(refusal.value)
    assert server.prompt(quick(text_to_image(random_models.cached_auraflow().name), seed=len(name)))


def test_a_transformer_in_place_of_the_text_encoder_is_refused_in_a_sentence(server: Server) -> None:
    name = "aura.gguf"
    (server.base / "models" / "text_encoders" / name).symlink_to(random_models.cached_auraflow())
    workflow = quick(text_to_image(random_models.cached_auraflow().name), seed=1)
    set_text_encoder(workflow, Path(name))
    with pytest.raises(PromptError) as refusal:
        server.prompt(workflow)
    assert str(refusal.value) == (
        f"AuraFlowGGUFTextEncoderLoader: {name}: found an AuraFlow transformer, expected the Pile-T5-XL text encoder. "
        "Move it to models/diffusion_models and load it with 'Load AuraFlow (GGUF)'."
    )


def test_a_file_that_is_not_there_is_refused_in_a_sentence(server: Server) -> None:
    with pytest.raises(PromptError, match=r"AuraFlowGGUFLoader: .*model_name.*absent\.gguf"):
        server.prompt(quick(text_to_image("absent.gguf"), seed=1))
    assert server.prompt(quick(text_to_image(random_models.cached_auraflow().name), seed=2))
