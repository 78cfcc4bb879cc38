"""LoRA files in every spelling: loaded by our node's function, and by ComfyUI where it maps the spelling."""

import comfy.sd
import comfy.utils
import pytest
import torch
from auraflow_gguf.loader.comfyui.lora import load_lora
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.errors import ModelFileError
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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if mapped_by_host else [pytest.mark.host_independent])
        for name, (_, mapped_by_host) in SPELLINGS.items()
    ],
)
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


@pytest.mark.host_independent
def test_modules_that_the_model_lacks_are_named(packed, shapes, tmp_path):
    path = write(tmp_path / "lora.safetensors", shapes, SPELLINGS["lycoris_<native>"][0])
    tensors = comfy.utils.load_torch_file(str(path))
    tensors["lycoris_single_layers_7_attn_w1q.lora_up.weight"] = torch.zeros(3072, 4)
    tensors["lycoris_single_layers_7_attn_w1q.lora_down.weight"] = torch.zeros(4, 3072)
    save_file(tensors, path)
    _, report = load_lora(packed, path, 1.0)
    assert str(report) == "matched 4 of 5 modules; not in this model: lycoris_single_layers_7_attn_w1q"


@pytest.mark.host_independent
def test_a_flux_lora_is_not_applied_to_the_modules_of_the_same_name(packed, tmp_path):
    modules = ("single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.proj_mlp")
    tensors = {f"transformer.{name}.lora_{letter}.weight": torch.zeros(3072, 4) for name in modules for letter in "AB"}
    save_file(tensors, tmp_path / "flux.safetensors")
    with pytest.raises(ModelFileError, match=r"found a Flux or Chroma LoRA \(.*proj_mlp\).*are another model's"):
        load_lora(packed, tmp_path / "flux.safetensors", 1.0)


def test_an_adapter_of_any_name_and_what_is_not_applied(packed, shapes, expected, tmp_path):
    path = write(tmp_path / "lora.safetensors", shapes, SPELLINGS["base_model.model.<native>"][0])
    tensors = comfy.utils.load_torch_file(str(path))
    renamed = {name.replace(".weight", ".my_style.weight"): tensor for name, tensor in tensors.items()}
    magnitude = f"base_model.model.{MODULES[0]}.lora_magnitude_vector"
    save_file(renamed | {magnitude: torch.ones(3072)}, path)
    model, report = load_lora(packed, path, 1.0)
    assert str(report) == f"matched 4 of 4 modules; not applied: {magnitude}"
    with loaded(model, "full"):
        assert relative_error(forward(model), expected) < 1e-5


def test_a_change_of_a_bias_alone_is_matched(packed, tmp_path):
    change = torch.ones(3072)
    save_file({"lora_unet_t_embedder_mlp_0.diff_b": change}, tmp_path / "lora.safetensors")
    model, report = load_lora(packed, tmp_path / "lora.safetensors", 1.0)
    assert str(report) == "matched 1 of 1 modules"
    assert "diffusion_model.t_embedder.mlp.0.bias" in model.patches


@pytest.mark.host_independent
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>login</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer instead of the file"),
        (None, "a safetensors file that is cut off or damaged"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_file_that_cannot_be_read_is_named(packed, shapes, tmp_path, content, found, ending):
    path = tmp_path / f"lora.{ending}"
    if content is None:
        content = write(path, shapes, SPELLINGS["<native>"][0]).read_bytes()[:-100]
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"^lora\.{ending}: found {found}, expected a LoRA of AuraFlow"):
        load_lora(packed, path, 1.0)


@pytest.mark.host_independent
@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "a Flux or Chroma LoRA"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA of Flux, SD3, Qwen-Image or another"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight", "an SDXL or SD1 LoRA"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight", "an SDXL or SD1 LoRA"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "a text encoder's LoRA"),
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


@pytest.mark.host_independent
def test_a_file_that_is_no_lora_is_refused(packed, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"some.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(ModelFileError, match="of which none is a LoRA's"):
        load_lora(packed, path, 1.0)


@pytest.mark.host_independent
def test_a_model_that_is_not_auraflow_is_refused(packed, shapes, tmp_path):
    path = write(tmp_path / "lora.safetensors", shapes, SPELLINGS["<native>"][0])
    other = ModelPatcher(torch.nn.Linear(2, 2), packed.load_device, packed.offload_device)
    with pytest.raises(ValueError, match="The model is Linear, not AuraFlow: connect"):
        load_lora(other, path, 1.0)
