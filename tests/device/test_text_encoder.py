"""The text encoder on the accelerator gives the CPU's conditioning, with and without a LoRA."""

import comfy.lora
import comfy.model_management as management
import pytest
import torch
from auraflow_gguf.loader.comfyui.text_encoder import load_text_encoder

from ..host.aura_files import TEXT_SIZES, make_text_encoder_gguf
from ..host.patches import noise
from ..host.sampling import relative_error
from .host_on_device import device_memory, on_the_cpu

SHAPES = {"encoder.block.0.layer.0.SelfAttention.q": (2048, 2048), "shared": (32128, 2048)}


def load():
    return load_text_encoder(make_text_encoder_gguf("Q8_0"), fixed=TEXT_SIZES)


def conditionings(clip):
    """Of a prompt, with a LoRA and without, as *CLIP Text Encode* makes them."""
    state = {}
    for module, (out, into) in SHAPES.items():
        name = f"text_encoders.pile_t5xl.transformer.{module}"
        state |= {f"{name}.lora_up.weight": noise(out, 4), f"{name}.lora_down.weight": noise(4, into)}
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    with_lora = clip.clone()
    assert len(with_lora.add_patches(comfy.lora.load_lora(state, keys), 0.8)) == len(SHAPES)
    tokens = clip.tokenize("a cat", tokenizer_options={"pile_t5xl_min_length": 8})
    return [one.encode_from_tokens(tokens).cpu() for one in (clip, with_lora, clip)]


@pytest.fixture(scope="module")
def expected():
    with on_the_cpu(management):
        return conditionings(load())


@pytest.mark.parametrize("mode", ["full", "half", "lowvram"])
def test_the_conditioning_is_the_cpus(expected, mode):
    clip = load()
    assert clip.patcher.load_device == torch.device("simulated", 0)
    with device_memory(management, clip.patcher, mode):
        for ours, theirs in zip(conditionings(clip), expected, strict=True):
            assert relative_error(ours, theirs) < 1e-5
    assert relative_error(expected[1], expected[0]) > 1e-3
