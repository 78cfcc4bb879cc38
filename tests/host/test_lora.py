"""LoRA files in every spelling: loaded by our node's function, and by ComfyUI where it maps the spelling."""

import comfy.sd
import comfy.utils
import pytest
import torch
from auraflow_gguf.loader.auraflow import AURAFLOW
from auraflow_gguf.loader.errors import ModelFileError
from auraflow_gguf.loader.lora import load_lora
from auraflow_gguf.loader.model import load_model
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file

from .aura_files import load_dense, make_gguf
from .forward import forward, loaded
from .sampling import relative_error

MODULES = ["double_layers.0.attn.w1q", "double_layers.0.mlpX.c_fc2", "single_layers.0.attn.w1o", "modF.1"]


def _underscored(name: str) -> str:
    return name.replace(".", "_")


def _diffusers(name: str) -> str:
    return AURAFLOW.spell(f"{name}.weight", "diffusers").removesuffix(".weight")


# the name of a module in the file, and whether ComfyUI maps it by itself
SPELLINGS = {
    "diffusion_model.<native>": (lambda n: f"diffusion_model.{n}", True),
    "lora_unet_<native>": (lambda n: f"lora_unet_{_underscored(n)}", True),
    "transformer.<diffusers>": (lambda n: f"transformer.{_diffusers(n)}", True),
    "base_model.model.<diffusers>": (lambda n: f"base_model.model.{_diffusers(n)}", False),
    "base_model.model.<native>": (lambda n: f"base_model.model.{n}", False),
    "base_model.model.transformer.<diffusers>": (lambda n: f"base_model.model.transformer.{_diffusers(n)}", False),
    "lycoris_<diffusers>": (lambda n: f"lycoris_{_underscored(_diffusers(n))}", False),
    "lycoris_<native>": (lambda n: f"lycoris_{_underscored(n)}", False),
    "lora_transformer_<diffusers>": (lambda n: f"lora_transformer_{_underscored(_diffusers(n))}", False),
    "<diffusers>": (_diffusers, False),
    "<native>": (lambda n: n, False),
}


@pytest.fixture(scope="module")
def packed():
    return load_model(make_gguf("Q4_0"))


@pytest.fixture(scope="module")
def shapes(packed):
    state = packed.model.diffusion_model.state_dict()
    return {name: tuple(state[f"{name}.weight"].shape) for name in MODULES}


def factors(shapes, name) -> tuple[torch.Tensor, torch.Tensor]:
    out, into = shapes[name]
    generator = torch.Generator().manual_seed(out + into)
    return torch.randn(out, 4, generator=generator) * 0.1, torch.randn(4, into, generator=generator) * 0.1


def write(path, shapes, spell, modules=MODULES):
    tensors = {}
    for name in modules:
        up, down = factors(shapes, name)
        spelled = spell(name)
        if spelled.endswith(("norm_out.linear", "norm_out_linear")):
            up = torch.cat(up.chunk(2)[::-1])
        peft = "base_model" in spelled or "transformer." in spelled
        tensors[f"{spelled}.{'lora_B' if peft else 'lora_up'}.weight"] = up.contiguous()
        tensors[f"{spelled}.{'lora_A' if peft else 'lora_down'}.weight"] = down
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def expected(shapes):
    """The dense model with the LoRA merged by hand."""
    dense = load_dense(make_gguf("Q4_0"))
    state = dense.model.diffusion_model.state_dict()
    for name in MODULES:
        up, down = factors(shapes, name)
        state[f"{name}.weight"] += up @ down
    with loaded(dense, "full"):
        return forward(dense)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_same_picture(packed, shapes, expected, tmp_path, name):
    spell, mapped_by_host = SPELLINGS[name]
    path = write(tmp_path / "lora.safetensors", shapes, spell)
    model, report = load_lora(packed, path, 1.0)
    assert str(report) == f"matched {len(MODULES)} of {len(MODULES)} modules"
    with loaded(model, "full"):
        assert relative_error(forward(model), expected) < 1e-5
    if mapped_by_host:
        stock, _ = comfy.sd.load_lora_for_models(packed, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)
        with loaded(stock, "full"):
            assert relative_error(forward(stock), expected) < 1e-5


def test_modules_that_the_model_lacks_are_named(packed, shapes, tmp_path):
    path = write(tmp_path / "lora.safetensors", shapes, SPELLINGS["lycoris_<native>"][0])
    tensors = comfy.utils.load_torch_file(str(path))
    tensors["lycoris_single_layers_7_attn_w1q.lora_up.weight"] = torch.zeros(3072, 4)
    tensors["lycoris_single_layers_7_attn_w1q.lora_down.weight"] = torch.zeros(4, 3072)
    save_file(tensors, path)
    _, report = load_lora(packed, path, 1.0)
    assert str(report) == "matched 4 of 5 modules; not in this model: lycoris_single_layers_7_attn_w1q"


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "a Flux LoRA"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a Flux LoRA"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "an SDXL or SD1 LoRA"),
        ("diffusion_model.joint_blocks.3.x_block.attn.qkv.lora_A.weight", "an SD3 LoRA"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "a Wan LoRA"),
        ("something.else.lora_A.weight", "a LoRA of an unknown model"),
    ],
)
def test_a_lora_of_another_model_is_named(packed, tmp_path, key, what):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(4, 4)}, path)
    with pytest.raises(
        ModelFileError, match=f"^other.safetensors: found {what} .*expected a LoRA of AuraFlow. None of"
    ):
        load_lora(packed, path, 1.0)


def test_a_file_that_is_no_lora_is_refused(packed, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"some.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(ModelFileError, match="of which none is a LoRA's"):
        load_lora(packed, path, 1.0)


def test_a_model_that_is_not_auraflow_is_refused(packed, shapes, tmp_path):
    path = write(tmp_path / "lora.safetensors", shapes, SPELLINGS["<native>"][0])
    other = ModelPatcher(torch.nn.Linear(2, 2), packed.load_device, packed.offload_device)
    with pytest.raises(ValueError, match="The model is Linear, not AuraFlow: connect"):
        load_lora(other, path, 1.0)
