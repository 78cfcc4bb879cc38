"""Products in int8 in ComfyUI: near the exact picture, beside all else that is done to a model, and off by default."""

import logging

import comfy.memory_management
import comfy.model_management
import pytest
import torch
from auraflow_gguf.loader.comfyui import model
from auraflow_gguf.loader.comfyui.int8 import LINEARS, exact, products_of, scale_bytes
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.kernels import int8 as kernels
from auraflow_gguf.loader.kernels import native
from auraflow_gguf.loader.kernels.native import build
from auraflow_gguf.loader.weights import int8_linear
from auraflow_gguf.loader.weights.int8_linear import with_row_scales
from auraflow_gguf.loader.weights.layout import is_packed, with_scales
from auraflow_gguf.nodes.model_loader import AuraFlowGGUFLoader
from auraflow_gguf.nodes.save import ModelCheckpoint
from auraflow_gguf.quantizer.convert import convert
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors.torch import save_file

from .aura_files import dense_state_dict, make_gguf
from .forward import CPU, forward, loaded, sampler_options
from .patches import dora, lora, lora_hooks, patched
from .sampling import relative_error, sample
from .small_auraflow import load_small, small_gguf

SETTING = {"size": 12, "tokens": 20}  # 36 and 28 rows: more than those that are exact
LINEAR = "single_layers.0.mlp.c_proj"
NAMES = (LINEAR, "double_layers.0.attn.w2k")
NEAR = 0.02  # random weights: no layer is spared


@pytest.fixture(scope="module", autouse=True)
def _in_c():
    """With C where there is a compiler: torch takes a minute to rotate these weights."""
    if build._compiler():
        build.build()
    native._library.cache_clear()
    kernels._in_c.cache_clear()


@pytest.fixture(scope="module")
def path():
    return small_gguf("Q4_0")


@pytest.fixture(scope="module")
def in_int8(path):
    return load_small(path, matrix_mult="int8")


@pytest.fixture(scope="module")
def plain(path):
    return load_small(path)


@pytest.fixture
def multiplied(monkeypatch):
    """How many products were made in int8."""
    calls = []
    original = kernels.linear_on_cpu
    monkeypatch.setattr(kernels, "linear_on_cpu", lambda *a: calls.append(a[1].shape) or original(*a))
    return calls


def once(patcher, how="full", **options):
    with loaded(patcher, how):
        return forward(patcher, **SETTING, **options)


@pytest.fixture(scope="module")
def expected(plain):
    return once(plain)


@pytest.fixture(scope="module")
def ours(in_int8):
    return once(in_int8)


def test_the_layers_are_multiplied_in_int8(in_int8, expected, multiplied):
    linears = {name: m for name, m in in_int8.model.diffusion_model.named_modules() if getattr(m, "int8", None)}
    assert len(linears) == 8 + 6 + 2 * (4 + 3)
    assert all(LINEARS.fullmatch(name) and m.weight._params.scale is not None for name, m in linears.items())
    out = once(in_int8)
    assert 1e-4 < relative_error(out, expected) < NEAR
    assert len(multiplied) == len(linears)


def test_the_same_numbers_in_low_vram(in_int8, ours, multiplied):
    assert torch.equal(once(in_int8, "lowvram"), ours)
    assert len(multiplied) == 28


def test_channels_that_stand_out_in_the_mlp_are_smoothed(path, tmp_path):
    """The same function with activations of 50 times the size in some of the MLP's channels."""
    weights = dense_state_dict(path)
    chosen = torch.arange(3, 1536, 100)
    for name, weight in weights.items():
        if name.endswith("c_fc2.weight"):
            weight[chosen] *= 50
            weights[name.replace("c_fc2", "c_proj")][:, chosen] /= 50
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "planted.safetensors")
    convert(tmp_path / "planted.safetensors", tmp_path / "planted.gguf", "Q8_0", fixed={})
    planted, exactly = (load_small(tmp_path / "planted.gguf", matrix_mult=kind) for kind in ("int8", "exact"))
    smoothed = {}
    for name, module in planted.model.diffusion_model.named_modules():
        if getattr(module, "int8", None) and module.weight._params.smoothing is not None:
            smoothed[name] = module.weight._params.smoothing
    assert smoothed.keys() == {f"{mlp}.c_proj" for mlp in MLPS}
    assert all(torch.equal(factors.gt(1).nonzero().flatten(), chosen) for factors in smoothed.values())
    assert scale_bytes(planted.model) == scale_bytes(load_small(path, matrix_mult="int8").model) + 4 * 1536 * len(MLPS)
    expected = once(exactly)
    error = relative_error(once(planted), expected)
    for module in map(planted.model.diffusion_model.get_submodule, smoothed):
        module.weight = torch.nn.Parameter(with_row_scales(module.weight, CPU), requires_grad=False)
    assert 1.5 * error < relative_error(once(planted), expected)


MLPS = [f"double_layers.0.mlp{stream}" for stream in "CX"] + [f"single_layers.{number}.mlp" for number in range(2)]


def test_left_alone_nothing_changes(path, plain, expected, multiplied):
    for given in (load_small(path, torch.float32, True, "exact"), plain):
        assert products_of(given.model) is None
        assert scale_bytes(given.model) == 0
        assert torch.equal(once(given), expected)
    packed = [p for p in plain.model.parameters() if is_packed(p)]
    assert all(p._params.scale is None for p in packed)
    assert multiplied == []


@pytest.fixture(scope="module")
def whole():
    """A file of full width, as the loader knows it."""
    return make_gguf("Q4_0")


def test_the_loader_multiplies_in_int8(whole, multiplied):
    ours, plain = (
        load_model(whole, torch.float32, matrix_mult=kind, int8_even_if_slower=True) for kind in model.MATRIX_MULT[::-1]
    )
    assert 1e-4 < relative_error(once(ours), once(plain)) < NEAR
    assert len(multiplied) == 21
    again = ours.cached_patcher_init[0](*ours.cached_patcher_init[1])
    assert scale_bytes(again.model) == scale_bytes(ours.model) > 0


def test_what_differs_in_two_loads(whole):
    prints = {AuraFlowGGUFLoader.fingerprint_inputs(whole.name, matrix_mult=kind) for kind in model.MATRIX_MULT}
    assert len(prints) == 2
    with pytest.raises(ValueError, match="expected one of exact, int8"):
        load_model(whole, matrix_mult="fp8")


def test_where_it_would_be_slower_it_is_exact_and_says_so_once(whole, caplog, monkeypatch):
    monkeypatch.setattr(int8_linear.int8, "refused_by_cpu", lambda: "the CPU has no int8 products")
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: CPU)
    with caplog.at_level(logging.INFO, logger="auraflow_gguf"):
        refused = load_model(whole, torch.float32, matrix_mult="int8")
        with loaded(refused, "full"):
            forward(refused, size=4, tokens=2)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == f"{whole.name}: its matrix products are exact, not int8: the CPU has no int8 products"
    assert products_of(refused.model) is None


def test_scales_are_counted_and_saving_sees_exact_weights(in_int8, plain):
    rows = sum(m.weight.shape[0] for n, m in plain.model.diffusion_model.named_modules() if LINEARS.fullmatch(n))
    assert in_int8.model_size() - plain.model_size() == scale_bytes(in_int8.model) == 4 * rows
    key = f"diffusion_model.{LINEAR}.weight"
    ours, theirs = (ModelCheckpoint(patched(p, lora, names=NAMES)) for p in (in_int8, plain))
    assert torch.equal(ours.read(key), theirs.read(key))
    unpatched = "diffusion_model.double_layers.0.attn.w2q.weight"
    assert torch.equal(ours.packed(unpatched)[1], theirs.packed(unpatched)[1])


@pytest.mark.parametrize(("kind", "in_int8_too"), [(lora, True), (dora, False)])
def test_patches(in_int8, plain, expected, multiplied, kind, in_int8_too):
    out = once(patched(in_int8, kind, names=NAMES), "lowvram")
    assert len(multiplied) == (28 if in_int8_too else 26)
    theirs = once(patched(plain, kind, names=NAMES), "lowvram")
    assert relative_error(out, theirs) < min(NEAR, relative_error(out, expected) / 3)


def test_hooks_and_the_modulation_cache(in_int8, plain):
    settings = {"steps": 1, "size": 12, "tokens": 20, "cfg": 1.0}
    hooks = lora_hooks(plain, lora, names=NAMES)
    ours, theirs = (sample(p, hooks=hooks, **settings) for p in (in_int8, plain))
    assert relative_error(ours, theirs) < NEAR
    assert relative_error(ours, sample(in_int8, **settings)) > 3 * relative_error(ours, theirs)


def test_collecting_sees_exact_products(in_int8, plain, multiplied):
    out = []
    for patcher in (exact(in_int8), plain):
        with loaded(patcher, "full"):
            options = sampler_options(patcher)
            out.append(forward(patcher, **SETTING, options=options))
    assert torch.equal(*out)
    assert multiplied == []
    assert exact(plain) is plain
    assert products_of(in_int8.model).on


def test_gradients_are_exact(in_int8, plain):
    outs = []
    for patcher in (in_int8, plain):
        linear = patcher.model.diffusion_model.get_submodule(LINEAR)
        with torch.inference_mode(False):
            input = torch.ones(20, linear.in_features, requires_grad=True)
            outs.append(linear(input).detach())
    assert torch.equal(*outs)


def test_compiled_in_one_graph(in_int8):
    settings = {"steps": 1, "size": 12, "tokens": 20, "cfg": 1.0}
    eager = in_int8.clone()
    # ComfyUI's own for CPUs breaks graphs by itself; and another one's roundings become steps of integers
    options = eager.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
    compiled = eager.clone()
    set_torch_compile_wrapper(compiled, backend="eager", fullgraph=True)
    assert relative_error(sample(compiled, **settings), sample(eager, **settings)) < 1e-5


def test_dynamic_vram_gathers_scales_with_the_weight(in_int8):
    plain = in_int8.model.diffusion_model.get_submodule(LINEAR).weight
    original = with_scales(plain, plain._params.scale, torch.rand(plain.shape[1]))
    geometries = comfy.memory_management.tensors_to_geometries([original, None])
    buffer = torch.zeros(comfy.memory_management.vram_aligned_size(geometries), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered([original, None], buffer)
    weight, _ = comfy.memory_management.interpret_gathered_like(geometries, buffer)
    assert torch.equal(weight._params.scale, original._params.scale)
    assert torch.equal(weight._params.smoothing, original._params.smoothing)
    assert torch.equal(weight._qdata, original._qdata)
