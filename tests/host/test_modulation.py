"""The modulation cache gives what the blocks would compute, and keeps a third of the weights off the device."""

import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import torch
from auraflow_gguf.loader.comfyui import modulation
from auraflow_gguf.loader.comfyui.modulation import WRAPPER_KEY, mapped_linears, table_of, without_cache
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from comfy_extras.nodes_model_merging import ModelMergeSimple

from .forward import CPU, loaded, sampler_options
from .patches import MODULATION, diff, dora, loha, lora, lora_hooks, patched, state_of
from .sampling import QUICK, relative_error, sample
from .small_auraflow import HIDDEN, TEXT, load_small, small_gguf

SINGLE = ("single_layers.0.modCX", "single_layers.1.modCX")


@pytest.fixture(scope="module")
def model():
    return load_small(small_gguf("Q4_0"))


@pytest.fixture
def table(model):
    table = table_of(model.model)
    table.clear()
    table.passes = 0
    return table


def assert_cache_changes_nothing(model, **settings) -> torch.Tensor:
    """Samples with the cache and without, and gives what came out of the first."""
    passes = table_of(model.model).passes
    cached = sample(model, **QUICK | settings)
    used = table_of(model.model).passes
    assert relative_error(cached, sample(without_cache(model), **QUICK | settings)) < 1e-5
    assert table_of(model.model).passes == used >= passes
    return cached


@pytest.fixture
def shallow(model):
    """The model with blocks that do nothing but modulate, for what depends on timesteps alone."""
    inner, clone = model.model.diffusion_model, model.clone()

    def modulate(args, extra):
        shift, scale, _ = inner.single_layers[0].modCX(args["vec"])[:, None, : 3 * HIDDEN].chunk(3, dim=-1)
        return {"img": args["img"] * (1 + scale) + shift}

    clone.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 0)
    clone.set_model_patch_replace(modulate, "dit", "single_block", 0)
    return clone


@pytest.mark.host_independent
@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler(shallow, sampler):
    assert_cache_changes_nothing(shallow, sampler=sampler, cfg=1.0)


@pytest.mark.host_independent
@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_scheduler_takes_one_pass_over_the_weights(shallow, table, scheduler):
    assert_cache_changes_nothing(shallow, scheduler=scheduler, cfg=1.0)
    assert table.passes == 1


def test_a_schedule_that_was_seen_takes_none(model, table):
    first = sample(model, **QUICK)
    assert table.passes == 1
    assert len(table) == QUICK["steps"]
    assert torch.equal(sample(model, **QUICK), first)
    assert (
        torch.equal(sample(patched(model, lora, names=["single_layers.0.mlp.c_proj"]).clone(), **QUICK), first) is False
    )
    assert table.passes == 1
    assert_cache_changes_nothing(ModelSamplingAuraFlow().patch_aura(model, 6.0)[0])
    assert table.passes == 2


def test_the_table_is_bounded_and_goes_with_the_model(model, table, monkeypatch):
    monkeypatch.setattr(modulation, "MAX_ROWS", 5)
    sample(model, **QUICK, cfg=1.0)
    row = table.nbytes // len(table)
    assert row == 4 * HIDDEN * (1 + 4 * 6 + 2)  # float32: the vector, modC, modX, modCX twice, and modF
    for timestep in range(5):
        inner = model.model.diffusion_model
        with table.at([timestep / 5], inner, None, list, torch.float32, CPU):
            pass
    assert len(table) == 5
    comfy.model_management.unload_all_models()
    assert len(table) == 0
    assert table.vector is table.row is None


@pytest.mark.host_independent
def test_a_schedule_longer_than_the_table(shallow, table, monkeypatch):
    monkeypatch.setattr(modulation, "MAX_ROWS", 3)
    assert_cache_changes_nothing(shallow, steps=5)
    assert table.passes == 2
    assert len(table) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"denoise": 0.5, "steps": 4},
        {"noise_mask": torch.ones(1, 1, 4, 4).tril()},
        {"regions": [{"area": (2, 2, 0, 0)}, {"area": (2, 4, 2, 0), "strength": 0.5}, {}]},
        {"regions": [{"start_percent": 0.0, "end_percent": 0.5}, {}]},
        {"cfg": 1.0},
    ],
    ids=["image to image", "inpainting", "regional prompts", "timed prompts", "no guidance"],
)
def test_ways_to_sample(shallow, settings):
    assert_cache_changes_nothing(shallow, **settings)


def test_a_batch_of_different_timesteps(model, table):
    generator = torch.Generator().manual_seed(0)
    latent, context = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 6, TEXT, generator=generator)
    sigmas = torch.tensor([0.9, 0.4, 0.9])
    with loaded(model, "full"):
        cached, expected = (
            model.model.apply_model(latent, sigmas, c_crossattn=context, transformer_options=options)
            for options in (sampler_options(model), {})
        )
    assert len(table) == 2
    assert relative_error(cached, expected) < 1e-5


@pytest.mark.parametrize("kind", [lora, dora, diff], ids=lambda kind: kind.__name__)
def test_patched_modulation_has_rows_of_its_own(shallow, table, kind):
    base = assert_cache_changes_nothing(shallow)
    changed = assert_cache_changes_nothing(patched(shallow, kind, names=(MODULATION,)))
    assert relative_error(changed, base) > 1e-3
    assert table.passes == 2
    assert torch.equal(sample(shallow, **QUICK), base)
    assert table.passes == 2


def test_hooks_on_modulation_that_change_in_mid_run(shallow):
    base = assert_cache_changes_nothing(shallow, steps=4)
    hooked = assert_cache_changes_nothing(shallow, steps=4, hooks=lora_hooks(shallow, lora, (0.2, 1.5), (MODULATION,)))
    assert relative_error(hooked, base) > 1e-3
    assert torch.equal(sample(shallow, **QUICK | {"steps": 4}), base)


@pytest.mark.host_independent
def test_merged_modulation(shallow):
    merged = ModelMergeSimple().merge(patched(shallow, lora, names=(MODULATION,)), shallow, 0.3)[0]
    assert relative_error(assert_cache_changes_nothing(merged), sample(shallow, **QUICK)) > 1e-3


def test_bypass_lora(shallow):
    bypassed, _ = comfy.sd.load_bypass_lora_for_models(shallow, None, state_of(shallow, lora, (MODULATION,)), 1.0, 0.0)
    assert relative_error(assert_cache_changes_nothing(bypassed), sample(shallow, **QUICK)) > 1e-3


def test_a_block_patch_that_changes_the_vector(model):
    def half(args, extra):
        return extra["original_block"](args | {"vec": args["vec"] / 2})

    changed = model.clone()
    changed.set_model_patch_replace(half, "dit", "single_block", 0)
    assert relative_error(assert_cache_changes_nothing(changed), sample(model, **QUICK)) > 1e-3


def test_compiled_in_one_graph(model):
    with_patches = patched(patched(model, lora), loha)
    compiled = with_patches.clone()
    # the attention that ComfyUI takes on a CPU breaks graphs by itself
    options = compiled.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
    set_torch_compile_wrapper(compiled, backend="eager", fullgraph=True)
    assert relative_error(sample(compiled, **QUICK), sample(with_patches, **QUICK)) < 1e-5


@pytest.mark.host_independent
def test_another_compute_type_and_another_loader(model):
    base = sample(model, **QUICK)
    half = load_small(small_gguf("Q4_0"), torch.bfloat16)
    cached = sample(half, **QUICK)
    assert relative_error(cached, sample(without_cache(half), **QUICK)) < 2e-3
    assert relative_error(cached, base) > 1e-3
    assert torch.equal(sample(model, **QUICK), base)


def test_modulation_is_not_counted_nor_moved(model):
    whole = load_small(small_gguf("Q4_0"), modulation_cache=False)
    assert table_of(whole.model) is None
    linears = mapped_linears(model.model)
    assert sorted(linears) == [
        f"diffusion_model.{name}.1" for name in ("double_layers.0.modC", "double_layers.0.modX", "modF", *SINGLE)
    ]
    mapped = sum(linear.weight.nbytes for linear in linears.values())
    assert model.model_size() == whole.model_size() - mapped
    for mode in ("full", "lowvram"):
        with loaded(model, mode):
            assert model.loaded_size() <= model.model_size()
    assert sample(whole, **QUICK).equal(sample(without_cache(model), **QUICK))
    whole.model.to("meta")
    fresh = load_small(small_gguf("Q4_0"))
    fresh.model.to("meta")
    for linear in mapped_linears(fresh.model).values():
        assert linear.weight.device == CPU
    assert fresh.model.diffusion_model.single_layers[0].attn.w1q.weight.device.type == "meta"


def test_clones_share_the_table_and_their_wrapper_can_be_taken_off(model, table):
    clone = model.clone()
    assert table_of(clone.model) is table
    assert WRAPPER_KEY in clone.wrappers[WrappersMP.APPLY_MODEL]
    assert not without_cache(clone).get_wrappers(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    sample(clone, **QUICK)
    sample(model, **QUICK)
    assert table.passes == 1
