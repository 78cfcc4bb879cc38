"""ComfyUI as a library: in a process without a server the pack loads, and every node works."""

from __future__ import annotations

import json
import os
import re
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
from PIL import Image
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
    assert len(result["ours"]) == 9
    assert set(result["ours"]) <= set(result["executed"])
    assert (result["server"], result["progress hook"]) == (False, False)

    model = load_model(make_gguf("Q4_0"), torch.float32)
    model, _ = load_lora(model, base / "models" / "loras" / "lora.safetensors", 1.0)
    conditioning = [[torch.randn(1, 6, 2048, generator=torch.Generator().manual_seed(1)), {}]]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    (expected,) = common_ksampler(model, 1, 1, 3.5, "euler", "simple", conditioning, conditioning, latent)
    for name in ("sampled", "collected", "calibrated"):
        assert relative_error(torch.tensor(result[name]).view(1, 4, 8, 8), expected["samples"]) < 1e-5, name
    for path in result["files"]:
        assert open_gguf(path).tensors["single_layers.0.attn.w1q.weight"].type.name == "Q4_0"
    assert open_gguf(result["fitted"]).metadata["general.name"] == "fitted"
    assert "an AuraFlow transformer" in result["report"]
    assert result["conditioning"][0] == 1
    assert result["conditioning"][2] == 2048


@pytest.mark.host_independent
def test_the_script_of_the_document(host, base, tmp_path):
    """The block of code in docs/library.md, with small random models in place of its files, and a small picture."""
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "library.md").read_text(encoding="utf-8"), re.M | re.S
    )
    vae = random_models.cached_vae()
    (base / "models" / "vae").mkdir()
    (base / "models" / "vae" / vae.name).symlink_to(vae)
    for ours, small in {
        '"ComfyUI", "ComfyUI/custom_nodes/auraflow-gguf"': f"{str(host.path)!r}, {str(ROOT)!r}",
        "import torch\n": f"from comfy.cli_args import args\nargs.cpu, args.base_directory = True, {str(base)!r}\n",
        "aura_flow_0.3-Q4_K_M.gguf": "model.gguf",
        "pile-t5-xl-Q8_0.gguf": "text.gguf",
        "sdxl_vae.safetensors": vae.name,
        "width=1024, height=1024": "width=64, height=64",
        "steps=25": "steps=1",
        # texts at their own length, which are filled up to 256 tokens
        "    (vae,) = ": "    clip.set_tokenizer_option('pile_t5xl_min_length', 1)\n    (vae,) = ",
    }.items():
        assert code.count(ours) == 1
        code = code.replace(ours, small if not ours.startswith("import") else small + ours)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    pictures = [Image.open(tmp_path / f"picture-{seed}.png") for seed in range(2)]
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()
