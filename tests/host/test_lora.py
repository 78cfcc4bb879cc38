"""LoRA files in every spelling: loaded by our node's function, and by ComfyUI where it maps the spelling."""

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch
from auraflow_gguf.loader.comfyui.lora import load_lora
from auraflow_gguf.loader.files.auraflow import AURAFLOW
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.nodes.save import ModelCheckpoint
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file

from .forward import forward, loaded
from .sampling import relative_error
from .small_auraflow import HIDDEN, load_small, small_dense_twin, small_gguf

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
    return load_small(small_gguf("Q4_0"))


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
    pairs = {name: factors(shapes, name) for name in MODULES}
    return forward_with({name: up @ down for name, (up, down) in pairs.items()})


def forward_with(changes: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the dense model gives with these sums onto its weights."""
    dense = small_dense_twin(small_gguf("Q4_0")).clone()
    dense.add_patches({f"diffusion_model.{name}.weight": (change,) for name, change in changes.items()})
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
    tensors["lycoris_single_layers_7_attn_w1q.lora_up.weight"] = torch.zeros(HIDDEN, 4)
    tensors["lycoris_single_layers_7_attn_w1q.lora_down.weight"] = torch.zeros(4, HIDDEN)
    save_file(tensors, path)
    _, report = load_lora(packed, path, 1.0)
    assert str(report) == "matched 4 of 5 modules; not in this model: lycoris_single_layers_7_attn_w1q"


@pytest.mark.host_independent
def test_a_flux_lora_is_not_applied_to_the_modules_of_the_same_name(packed, tmp_path):
    modules = ("single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.proj_mlp")
    tensors = {
        f"transformer.{name}.lora_{letter}.weight": torch.zeros(HIDDEN, 4) for name in modules for letter in "AB"
    }
    save_file(tensors, tmp_path / "flux.safetensors")
    with pytest.raises(ModelFileError, match=r"found a Flux or Chroma LoRA \(.*proj_mlp\).*are another model's"):
        load_lora(packed, tmp_path / "flux.safetensors", 1.0)


def test_an_adapter_of_any_name_compiled_modules_and_what_is_not_applied(packed, shapes, expected, tmp_path):
    path = write(tmp_path / "lora.safetensors", shapes, SPELLINGS["base_model.model.<native>"][0])
    tensors = comfy.utils.load_torch_file(str(path))
    renamed = {name.replace(".weight", ".my_style.weight"): tensor for name, tensor in tensors.items()}
    renamed = {name.replace("layers.0.", "layers.0._orig_mod."): tensor for name, tensor in renamed.items()}
    unknown = f"base_model.model.{MODULES[0]}.lora_C"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in renamed.items()} | {unknown: torch.ones(HIDDEN)}, path)
    model, report = load_lora(packed, path, 1.0)
    assert str(report) == f"matched 4 of 4 modules; not applied: {unknown}"
    with loaded(model, "full"):
        assert relative_error(forward(model), expected) < 1e-5


def test_compiled_modules_in_underscores(packed, shapes, tmp_path):
    path = write(tmp_path / "lora.safetensors", shapes, lambda n: f"lycoris__orig_mod_{_underscored(_diffusers(n))}")
    assert str(load_lora(packed, path, 1.0)[1]) == "matched 4 of 4 modules"


FUSED = {
    "joint_transformer_blocks.0.attn.to_qkv": [f"double_layers.0.attn.w2{letter}" for letter in "qkv"],
    "joint_transformer_blocks.0.attn.to_added_qkv": [f"double_layers.0.attn.w1{letter}" for letter in "qkv"],
    "single_transformer_blocks.0.attn.to_qkv": [f"single_layers.0.attn.w1{letter}" for letter in "qkv"],
}


@pytest.fixture(scope="module")
def fused_factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(3 * HIDDEN, 4, generator=generator) * 0.1, torch.randn(4, HIDDEN, generator=generator) * 0.1)
        for name in FUSED
    }


@pytest.fixture(scope="module")
def fused_expected(fused_factors):
    """The dense model with the fused LoRA merged by hand."""
    changes = {}
    for name, keys in FUSED.items():
        up, down = fused_factors[name]
        changes |= {key: rows @ down for key, rows in zip(keys, up.split(HIDDEN), strict=True)}
    return forward_with(changes)


@pytest.mark.parametrize(
    "spell",
    [
        lambda n: f"transformer.{n}.lora_{{}}.weight",
        lambda n: f"base_model.model.{n}.lora_{{}}.default.weight",
        lambda n: f"_orig_mod.{n}.lora_{{}}.weight",
        lambda n: f"lycoris_{_underscored(n)}.lora_{{}}.weight",
        lambda n: f"lora_transformer_{_underscored(n)}.lora_{{}}.weight",
        lambda n: f"lora_unet_{_underscored(n)}.lora_{{}}.weight",
    ],
)
def test_fused_projections_go_to_their_three_weights(packed, fused_factors, fused_expected, tmp_path, spell):
    tensors = {}
    for name, (up, down) in fused_factors.items():
        peft = "." in spell("").split(".lora_")[0]
        tensors[spell(name).format("B" if peft else "up")] = up
        tensors[spell(name).format("A" if peft else "down")] = down
    save_file(tensors, tmp_path / "lora.safetensors")
    model, report = load_lora(packed, tmp_path / "lora.safetensors", 1.0)
    assert str(report) == "matched 3 of 3 modules"
    with loaded(model, "full"):
        assert relative_error(forward(model), fused_expected) < 1e-5


def test_a_weight_that_a_file_changes_twice_has_both_changes(packed, fused_factors, tmp_path):
    """By its own module and by the fused one; also by a LoKr that is cut into three."""
    generator = torch.Generator().manual_seed(6)
    name = "single_transformer_blocks.0.attn.to_qkv"
    up, down = fused_factors[name]
    own = torch.randn(HIDDEN, 2, generator=generator), torch.randn(2, HIDDEN, generator=generator)
    w1, w2 = torch.randn(16, 4, generator=generator), torch.randn(96, 128, generator=generator)
    tensors = {f"transformer.{name}.lora_B.weight": up, f"transformer.{name}.lora_A.weight": down}
    tensors |= {f"lycoris_{_underscored(name)}.lokr_w1": w1, f"lycoris_{_underscored(name)}.lokr_w2": w2}
    tensors["transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight"] = own[0]
    tensors["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"] = own[1]
    save_file(tensors, tmp_path / "lora.safetensors")
    model, report = load_lora(packed, tmp_path / "lora.safetensors", 0.5)
    assert str(report) == "matched 3 of 3 modules"
    key = "diffusion_model.single_layers.0.attn.w1k.weight"
    change = comfy.lora.calculate_weight(model.patches[key], torch.zeros(HIDDEN, HIDDEN), key)
    rows = slice(HIDDEN, 2 * HIDDEN)
    expected = 0.5 * (up[rows] @ down + torch.kron(w1, w2)[rows] + own[0] @ own[1])
    assert relative_error(change, expected) < 1e-5


def test_a_fused_module_that_cannot_be_cut_is_refused(packed, tmp_path):
    name = "transformer.joint_transformer_blocks.0.attn.to_added_qkv"
    save_file({f"{name}.oft_blocks": torch.zeros(8, 192, 192)}, tmp_path / "oft.safetensors")
    with pytest.raises(ModelFileError, match=r"^oft.*to_added_qkv, which has oft_blocks, .* without fused projections"):
        load_lora(packed, tmp_path / "oft.safetensors", 1.0)


@pytest.mark.parametrize(
    ("module", "rows", "name", "own"),
    [
        ("single_transformer_blocks.0.attn.to_v", HIDDEN, "single_layers.0.attn.w1v", lambda rows: rows),
        (
            "single_transformer_blocks.0.attn.to_qkv",
            3 * HIDDEN,
            "single_layers.0.attn.w1v",
            lambda rows: rows[-HIDDEN:],
        ),
        ("norm_out.linear", 2 * HIDDEN, "modF.1", lambda rows: rows.roll(HIDDEN, 0)),
    ],
)
def test_a_dora_of_peft_is_applied_by_its_own_formula(packed, tmp_path, module, rows, name, own):
    path, generator = tmp_path / "dora.safetensors", torch.Generator().manual_seed(7)
    up, down = torch.randn(rows, 4, generator=generator) * 0.01, torch.randn(4, HIDDEN, generator=generator)
    magnitude = torch.rand(rows, 1, generator=generator) + 0.5
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector.default.weight": magnitude.flatten()}
    save_file({f"base_model.model.{module}.{key}": tensor for key, tensor in tensors.items()}, path)
    model, report = load_lora(packed, path, 0.75)
    assert str(report) == "matched 1 of 1 modules"
    key = f"diffusion_model.{name}.weight"
    weight = ModelCheckpoint(packed).read(key).float()
    changed = weight + own(up) @ down
    expected = weight + 0.75 * (own(magnitude) * changed / changed.norm(dim=1, keepdim=True) - weight)
    assert relative_error(ModelCheckpoint(model).read(key), expected) < 1e-5
    if len(model.patches) > 1:  # the twin has but one
        return
    twin = packed.clone()
    twin.add_patches({key: ("set", (expected,))})
    outputs = []
    for patched in (model, twin):
        with loaded(patched, "lowvram"):
            outputs.append(forward(patched))
    assert relative_error(*outputs) < 1e-5


def test_a_dora_of_peft_on_what_is_no_lora_is_refused(packed, tmp_path):
    module = "base_model.model.single_transformer_blocks.0.attn.to_v"
    tensors = {f"{module}.diff": torch.ones(8, 8), f"{module}.lora_magnitude_vector": torch.ones(8)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match="with PEFT's magnitudes of DoRA"):
        load_lora(packed, tmp_path / "x.safetensors", 1.0)


def test_a_change_of_a_bias_alone_is_matched(packed, tmp_path):
    change = torch.ones(HIDDEN)
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
