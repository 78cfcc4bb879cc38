"""ComfyUI as a library: in a process without a server the pack loads, and every node works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from auraflow_gguf.devtools import random_models
from auraflow_gguf.devtools.server import ROOT
from auraflow_gguf.loader.comfyui.lora import load_lora
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.files.gguf_file import open_gguf
from safetensors.torch import save_file

from nodes import common_ksampler

from .aura_files import make_gguf
from .sampling import relative_error


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory with models."""
    folder = tmp_path_factory.mktemp("library")
    for kind in ("diffusion_models", "text_encoders", "loras"):
        (folder / "models" / kind).mkdir(parents=True)
    (folder / "models" / "diffusion_models" / "model.gguf").symlink_to(make_gguf("Q4_0"))
    (folder / "models" / "text_encoders" / "text.gguf").symlink_to(random_models.cached_text_encoder())
    generator = torch.Generator().manual_seed(0)
    module = "transformer.single_transformer_blocks.0.attn.to_k"
    factors = {f"{module}.lora_A.weight": (4, 3072), f"{module}.lora_B.weight": (3072, 4)}
    factors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in factors.items()}
    save_file(factors, folder / "models" / "loras" / "lora.safetensors")
    return folder


def test_every_node_works_where_there_is_no_server(host, base):
    script = Path(__file__).with_name("as_library.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(ROOT), str(base)],
        capture_output=True,
        text=True,
        cwd=base,
        env={**os.environ, "PYTHONPATH": str(host.path)},
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert len(result["ours"]) == 7
    assert set(result["ours"]) <= set(result["executed"])
    assert (result["server"], result["progress hook"]) == (False, False)

    model = load_model(make_gguf("Q4_0"), torch.float32)
    model, _ = load_lora(model, base / "models" / "loras" / "lora.safetensors", 1.0)
    conditioning = [[torch.randn(1, 6, 2048, generator=torch.Generator().manual_seed(1)), {}]]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    (expected,) = common_ksampler(model, 1, 1, 3.5, "euler", "simple", conditioning, conditioning, latent)
    for name in ("sampled", "collected"):
        assert relative_error(torch.tensor(result[name]).view(1, 4, 8, 8), expected["samples"]) < 1e-5, name
    for path in result["files"]:
        assert open_gguf(path).tensors["single_layers.0.attn.w1q.weight"].type.name == "Q4_0"
    assert "an AuraFlow transformer" in result["report"]
    assert result["conditioning"][0] == 1
    assert result["conditioning"][2] == 2048
