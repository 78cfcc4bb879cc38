"""docs/diffusers.md as a reader would follow it: its script, with small models under the names that it uses."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from auraflow_gguf.loader.diffusers import text_encoder
from auraflow_gguf.loader.files.pile_t5 import PILE_T5_XL
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..quantizer.test_text_encoder import SIZES
from .test_diffusers_door import folder, load_diffusers_text_encoder, load_diffusers_transformer  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")


@pytest.fixture
def repository(folder, tmp_path):  # noqa: F811
    """What the page loads besides the GGUF files, small."""
    words = {word: number for number, word in enumerate(["<unk>", "<pad>", "</s>", "a", "lighthouse", "at", "dusk"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    packed = load_diffusers_transformer(folder / "auraflow.gguf")
    pipeline = AuraFlowPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"),
        text_encoder=load_diffusers_text_encoder(folder / "t5.gguf", fixed=SIZES),
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8] * 4,
            norm_num_groups=4,
        ),
        transformer=AuraFlowTransformer2DModel.from_config(packed.config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipeline.save_pretrained(tmp_path / "fal" / "AuraFlow-v0.3")
    (tmp_path / "aura_flow_0.3-Q4_K_M.gguf").symlink_to(folder / "auraflow.gguf")
    (tmp_path / "pile-t5-xl-Q8_0.gguf").symlink_to(folder / "t5.gguf")
    return tmp_path


def test_the_script(repository, monkeypatch):
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(text_encoder, "PILE_T5_XL", replace(PILE_T5_XL, fixed=SIZES))
    monkeypatch.chdir(repository)
    names: dict[str, object] = {}
    exec(script.replace("1024", "128").replace("num_inference_steps=25", "num_inference_steps=2"), names)
    with Image.open("lighthouse.png") as image:
        assert image.size == (128, 128)
    assert names["pipe"].transformer.single_transformer_blocks[0].attn.to_q.packed.dtype == torch.uint8


def test_the_package_installs_and_imports_without_comfyui(tmp_path):
    """From its folder with pip, as the page says; its requirements are those of this environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--no-build-isolation"]
    source = tmp_path / "auraflow-gguf"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run([*command, "--target", str(tmp_path / "installed"), str(source)], check=True, capture_output=True)
    script = (
        "import sys, auraflow_gguf; assert 'diffusers' not in sys.modules; "
        "from auraflow_gguf import load_diffusers_transformer, load_diffusers_text_encoder; "
        "assert not [name for name in sys.modules if name.split('.')[0] == 'comfy']; "
        "print(auraflow_gguf.__file__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    assert Path(ran.stdout.strip()).is_relative_to(tmp_path / "installed")
