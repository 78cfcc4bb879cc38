"""Patches on packed weights give what they give on the same weights when these are dense."""

import functools

import comfy.lora
import comfy.model_management
import pytest
import torch
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.comfyui.patcher import GGUFModelPatcher
from auraflow_gguf.loader.comfyui.weight_patches import WeightPatches
from auraflow_gguf.loader.weights.layout import is_packed

from .aura_files import make_gguf
from .forward import CPU, MODES, forward, loaded
from .patches import IN_EVERY_HOST, KINDS, diff, dora, loha, lora, lora_alpha, noise, outputs, patched, shapes_of
from .sampling import QUICK, relative_error, sample
from .small_auraflow import load_small, small_dense_twin, small_gguf


@pytest.fixture(scope="module")
def path():
    return small_gguf("Q4_0")


@pytest.fixture(scope="module")
def packed(path):
    return load_small(path)


@pytest.fixture(scope="module")
def wide():
    """Of full width, so that final_linear is large enough to stay packed, for what is counted and not computed."""
    return load_model(make_gguf("Q4_0"), torch.float32)


@pytest.fixture(scope="module")
def dense(path):
    return small_dense_twin(path)


def assert_equal_to(actual: dict, expected: dict, *, but_not_to: dict | None = None, mode: str) -> None:
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-5, (name, mode)
        if but_not_to is not None:
            assert relative_error(actual[name], but_not_to[name]) > 1e-3, (name, mode)


@pytest.fixture(scope="module")
def base(packed):
    with loaded(packed, "full"):
        return outputs(packed)


@pytest.mark.parametrize(
    ("strength", "modes"),
    [(1.0, MODES), pytest.param(-0.6, ["full"], marks=pytest.mark.host_independent)],
    ids=["1", "-0.6"],
)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.__name__, marks=[] if kind in IN_EVERY_HOST else [pytest.mark.host_independent])
        for kind in KINDS
    ],
)
def test_every_kind_equals_dense_in_every_mode(packed, dense, base, kind, strength, modes):
    with loaded(patched(dense, kind, strength), "full") as twin:
        expected = outputs(twin)
    model = patched(packed, kind, strength)
    for mode in modes:
        with loaded(model, mode):
            assert_equal_to(outputs(model), expected, but_not_to=base, mode=mode)
    with loaded(model.clone(), "full") as clone:
        assert_equal_to(outputs(clone), expected, mode="clone")
    with loaded(packed, "full"):
        again = outputs(packed)
    assert all(torch.equal(again[name], value) for name, value in base.items())


@pytest.mark.parametrize("kinds", [(lora, lora_alpha), (lora, loha), (lora, diff), (dora, lora)], ids=str)
def test_stacked_patches_equal_dense(packed, dense, kinds):
    def stack(patcher):
        return patched(patched(patcher, kinds[0], 0.8), kinds[1], -0.5)

    with loaded(stack(dense), "full") as twin:
        expected = outputs(twin)
    model = stack(packed)
    for mode in MODES:
        with loaded(model, mode):
            assert_equal_to(outputs(model), expected, mode=mode)


@pytest.mark.parametrize("kind", [lora, diff], ids=lambda kind: kind.__name__)
def test_the_whole_model_equals_dense(packed, dense, kind):
    with loaded(patched(dense, kind), "full") as twin:
        expected = forward(twin)
    for mode in ("full", "lowvram"):
        with loaded(patched(packed, kind), mode) as model:
            assert relative_error(forward(model), expected) < 1e-5, mode


def test_strength_zero_is_the_base_and_a_strength_comes_back_bit_by_bit(packed):
    settings = QUICK | {"steps": 1}
    base = sample(packed, **settings)
    first = sample(patched(packed, lora, 0.7), **settings)
    assert relative_error(first, base) > 1e-3
    assert relative_error(sample(patched(packed, lora, 0.0), **settings), base) < 1e-5
    assert relative_error(sample(patched(packed, lora, -0.7), **settings), first) > 1e-3
    assert torch.equal(sample(patched(packed, lora, 0.7), **settings), first)
    assert torch.equal(sample(packed, **settings), base)


def test_weights_stay_packed_but_for_those_that_memory_allows_to_keep_patched(wide):
    model = patched(patched(wide, lora), diff, names=["double_layers.0.attn.w2k"])
    inner = model.model.diffusion_model
    with_lora, with_diff = inner.cond_seq_linear, inner.double_layers[0].attn.w2k
    for mode in ("lowvram", "full"):
        with loaded(model, mode):
            assert with_lora.low_rank is not None
            assert is_packed(with_lora.weight)
            if mode == "lowvram":
                assert isinstance(with_diff.weight_function[0], WeightPatches)
                assert is_packed(with_diff.weight)
            else:
                assert not with_diff.weight_function
                assert not is_packed(with_diff.weight)
                dense = with_diff.weight.nbytes * (1 - 18 / (32 * 4))  # Q4_0 has 18 bytes for 32 weights
                factors = with_lora.low_rank.nbytes + inner.final_linear.low_rank.nbytes
                assert model.loaded_size() == wide.model_size() + factors + dense
    assert is_packed(with_diff.weight)
    for module in wide.model.modules():
        assert getattr(module, "low_rank", None) is None
        assert not getattr(module, "weight_function", None)


@pytest.mark.parametrize("kind", [lora, dora, diff], ids=lambda kind: kind.__name__)
def test_patches_on_a_weight_so_small_that_it_is_loaded_dense(kind):
    packed = load_small(small_gguf("Q2_K", "final_linear=Q2_K"))
    linear, names = packed.model.diffusion_model.final_linear, ("final_linear",)
    assert not is_packed(linear.weight)  # 3 KB
    model = patched(packed, kind, names=names)
    key = "diffusion_model.final_linear.weight"
    changed = comfy.lora.calculate_weight(model.patches[key], linear.weight.detach().clone(), key)
    expected = {names[0]: noise(5, linear.in_features) @ changed.T}
    for mode in MODES:
        with loaded(model, mode):
            assert_equal_to(outputs(model, names), expected, mode=mode)


def test_factors_count_in_what_a_full_load_may_take(wide):
    model = patched(wide, functools.partial(lora, rank=2048))
    factors = sum(2048 * sum(shape) * 4 for shape in shapes_of(wide).values())
    try:
        model.partially_load(CPU, extra_memory=model.model_size() + 1)
        assert model.model.model_lowvram
        assert model.loaded_size() <= model.model_size() + 1
        model.unpatch_model(CPU)
        model.partially_load(CPU, extra_memory=model.model_size() + 2 * factors)
        assert not model.model.model_lowvram
    finally:
        model.unpatch_model(CPU)


def test_a_weight_that_is_pinned_has_memory_of_its_own(path, monkeypatch):
    """As long as it is. Page-locking needs a GPU: what ComfyUI would lock is looked at."""
    model = load_small(path)
    pinned = []
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 1 << 40)
    monkeypatch.setattr(comfy.model_management, "pin_memory", lambda weight: pinned.append(weight) or locked)
    monkeypatch.setattr(comfy.model_management, "unpin_memory", lambda weight: weight is pinned[-1])
    module, key = model.model.diffusion_model.single_layers[0].mlp.c_proj, "single_layers.0.mlp.c_proj.weight"
    before = module.weight
    assert before._qdata.untyped_storage().nbytes() > before._qdata.nbytes
    locked = True
    for _ in range(2):  # once is enough
        model.pin_weight_to_device(f"diffusion_model.{key}")
        weight = pinned[0]
        assert module.weight is weight is pinned[-1]
        assert weight._qdata.untyped_storage().nbytes() == weight._qdata.nbytes
        assert torch.equal(weight._qdata, before._qdata)
    model.unpin_weight(f"diffusion_model.{key}")
    assert module.weight is before
    locked = False
    model.pin_weight_to_device(f"diffusion_model.{key}")
    assert module.weight is before


def test_the_factors_count_as_loaded_memory(packed):
    model = patched(packed, lambda name, shape: lora(name, shape, rank=256))
    model.unpatch_model(torch.device("cpu"))
    limit = packed.model_size() // 2
    model.patch_model(torch.device("cpu"), lowvram_model_memory=limit)
    try:
        factors = [m.low_rank.nbytes for m in model.model.modules() if getattr(m, "low_rank", None)]
        assert 0.1 * limit < sum(factors) < model.loaded_size() <= limit
    finally:
        model.unpatch_model(torch.device("cpu"))


def test_a_lora_for_weights_of_another_shape_is_refused(packed):
    state = lora("diffusion_model.double_layers.0.attn.w2k", (512, 256))
    model = packed.clone()
    model.add_patches(comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(model.model, {})))
    with pytest.raises(ValueError, match=r"w2k.weight as a weight of 512 × 256, but it has 512 × 512: .*another model"):
        sample(model, **QUICK)
    assert sample(packed, **QUICK).isfinite().all()


def test_clones_keep_the_class_and_can_be_made_anew(packed, path):
    assert isinstance(packed.clone(), GGUFModelPatcher)
    factory, arguments = packed.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert torch.equal(sample(again, **QUICK), sample(packed, **QUICK))
