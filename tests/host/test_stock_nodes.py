"""ComfyUI's own ways to patch and save a model, on packed weights beside the same weights dense."""

import comfy.hooks
import comfy.model_detection
import comfy.sd
import comfy.utils
import pytest
import torch
from auraflow_gguf.loader.weights.layout import is_packed
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_model_advanced import ModelComputeDtype, ModelSamplingAuraFlow
from comfy_extras.nodes_model_merging import ModelMergeBlocks, ModelMergeSimple, ModelSave

from .forward import forward, loaded, sampler_options
from .patches import MORE_LINEARS, diff, dora, lora, lora_hooks, noise, outputs, patched, shapes_of, state_of
from .sampling import QUICK, relative_error, sample
from .small_auraflow import load_small, small_dense_twin, small_gguf, small_patcher


@pytest.fixture(scope="module")
def packed():
    return load_small(small_gguf("Q4_0"))


@pytest.fixture(scope="module")
def dense():
    return small_dense_twin(small_gguf("Q4_0"))


@pytest.fixture(scope="module")
def base(packed):
    """The packed model's latents, without patches."""
    return sample(packed, **QUICK)


@pytest.mark.parametrize("strengths", [pytest.param((1.0,), marks=pytest.mark.host_independent), (0.2, 1.5)], ids=str)
@pytest.mark.parametrize("kind", [lora, pytest.param(dora, marks=pytest.mark.host_independent)], ids=["lora", "dora"])
def test_lora_hooks_with_keyframes(packed, dense, base, kind, strengths):
    expected = sample(dense, hooks=lora_hooks(packed, kind, strengths), **QUICK)
    hooked = sample(packed, hooks=lora_hooks(packed, kind, strengths), **QUICK)
    assert relative_error(hooked, expected) < 1e-5
    assert relative_error(hooked, base) > 1e-3
    assert relative_error(sample(packed, **QUICK), base) == 0


@pytest.mark.parametrize(
    ("patch", "hook"),
    [(lora, dora), *(pytest.param(patch, lora, marks=pytest.mark.host_independent) for patch in (diff, lora))],
    ids=lambda kind: kind.__name__,
)
def test_hooks_over_patches(packed, dense, patch, hook):
    """What a hook changes is the patched weight: beside it, and (DoRA) where its norm counts."""
    expected = sample(patched(dense, patch), hooks=lora_hooks(packed, hook), **QUICK)
    model = patched(packed, patch)
    assert relative_error(sample(model, hooks=lora_hooks(packed, hook), **QUICK), expected) < 1e-5
    without = sample(model, **QUICK)
    assert relative_error(without, expected) > 1e-3
    assert relative_error(without, sample(patched(dense, patch), **QUICK)) < 1e-5


def test_hook_of_another_model(packed, dense, base):
    """Create Hook Model as LoRA: the difference of two models, of which one is packed."""
    other = {f"diffusion_model.{name}.weight": noise(*shape) for name, shape in shapes_of(packed).items()}

    def hooks():
        return comfy.hooks.create_hook_model_as_lora(other, None, 0.5, 0.0)

    expected = sample(dense, hooks=hooks(), **QUICK)
    assert relative_error(sample(packed, hooks=hooks(), **QUICK), expected) < 1e-5
    assert relative_error(base, expected) > 1e-3


@pytest.mark.host_independent
def test_model_sampling(packed, dense, base):
    def shifted(model):
        return sample(ModelSamplingAuraFlow().patch_aura(model, 6.0)[0], **QUICK)

    expected = shifted(dense)
    assert relative_error(shifted(packed), expected) < 1e-5
    assert relative_error(base, expected) > 1e-3


def test_compute_dtype(packed, dense):
    """ModelComputeDtype on weights that show another type as theirs."""

    def computed(model):
        return sample(ModelComputeDtype().patch(patched(model, lora), "bf16")[0], **settings)

    settings = QUICK | {"steps": 1}
    exact = sample(patched(packed, lora), **settings)
    assert relative_error(computed(packed), exact) < 2 * relative_error(computed(dense), exact)
    assert torch.equal(sample(patched(packed, lora), **settings), exact)


def test_bypass_lora(packed, dense, base):
    """The host's own way beside the weight, by injections, on top of ours."""
    names = ("double_layers.0.attn.w2k", "final_linear")
    state = state_of(packed, lora, names)

    def bypassing(model):
        return comfy.sd.load_bypass_lora_for_models(patched(model, lora), None, state, 0.7, 0.0)[0]

    expected = sample(patched(patched(dense, lora), lora, 0.7, names), **QUICK)
    assert relative_error(sample(bypassing(packed), **QUICK), expected) < 1e-5
    assert relative_error(base, expected) > 1e-3


def test_transformer_options(packed, dense):
    """A patch of another node that replaces a block."""

    def halved(model):
        def block(args, extra):
            out = extra["original_block"](args)
            return {**out, "img": 0.5 * out["img"]}

        clone = patched(model, lora)
        clone.set_model_patch_replace(block, "dit", "double_block", 0)
        return sample(clone, **QUICK)

    ours = halved(packed)
    assert relative_error(ours, halved(dense)) < 1e-5
    assert relative_error(ours, sample(patched(packed, lora), **QUICK)) > 1e-3


WHOLE = ["diffusion_model"]
BLOCKS = ["diffusion_model.double_layers.0", "diffusion_model.single_layers.0"]


@pytest.mark.host_independent
@pytest.mark.parametrize("keys", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_compiled_once_for_all_sizes(packed, keys):
    """What TorchCompileModel does, over a LoRA, with a backend that needs no compiler: in one graph for each module,
    of whatever size after the second. A LoRA's products are MKL's, whose bits depend on how many threads share them."""
    plain = patched(packed, lora).clone(disable_dynamic=True)
    compiled = plain.clone()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    set_torch_compile_wrapper(compiled, backend="aot_eager", fullgraph=True, keys=keys)
    options = without_graph_breaks(sampler_options(compiled))
    with loaded(compiled, "full"):
        for size in (4, 6, 10, 8):
            expected = forward(plain, size=size, options=options | {"wrappers": {}})
            assert relative_error(forward(compiled, size=size, options=options), expected) < 1e-6
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * len(keys)


def test_compiled_in_low_vram(packed):
    compiled = packed.clone(disable_dynamic=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    set_torch_compile_wrapper(compiled, backend="aot_eager", keys=WHOLE)
    options = without_graph_breaks(sampler_options(compiled))
    with loaded(compiled, "lowvram"):
        expected = forward(packed, options=options | {"wrappers": {}})
        assert torch.equal(forward(compiled, options=options), expected)
    assert not torch._dynamo.utils.counters["graph_break"]


def without_graph_breaks(options: dict) -> dict:
    """With another attention than ComfyUI's on a CPU, which breaks graphs by itself."""
    return options | {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}


def assert_like(patcher, expected: dict[str, torch.Tensor], how: str) -> None:
    with loaded(patcher, how):
        for name, output in outputs(patcher, MORE_LINEARS).items():
            assert relative_error(output, expected[name]) < 1e-5, name


def test_merged_by_blocks_with_a_dense_model(packed, dense):
    """Weight by weight, each when it is used: in no block, in blocks of either kind, in modulation."""
    ratios = {"cond_seq_linear.": 0.3, "double_layers.": 0.9, "single_layers.0.mlp": 0.0}

    def merged(model, other):
        return ModelMergeBlocks().merge(patched(model, diff, names=MORE_LINEARS), other, **ratios)[0]

    twin = merged(dense, dense)
    with loaded(twin, "lowvram"):
        expected = outputs(twin, MORE_LINEARS)
    for one, other in ((packed, dense), (dense, packed)):
        assert_like(merged(one, other), expected, "lowvram")
    with loaded(packed, "full"):
        plain = outputs(packed, MORE_LINEARS)
    for name, output in plain.items():
        assert (relative_error(output, expected[name]) > 1e-3) == (not name.startswith("single_layers.0.mlp"))


def test_merged_and_saved_and_loaded_again(packed, dense, tmp_path):
    def merged(model):
        return ModelMergeSimple().merge(patched(model, lora), model, 0.3)[0]

    twin = merged(dense)
    with loaded(twin, "lowvram"):
        expected = outputs(twin, MORE_LINEARS)
    with loaded(packed, "full"):
        assert relative_error(outputs(packed)["cond_seq_linear"], expected["cond_seq_linear"]) > 1e-3
    both = merged(packed)
    assert_like(both, expected, "full")

    node = ModelSave()
    node.output_dir = str(tmp_path)
    node.save(both, "merged")
    (saved,) = tmp_path.glob("merged*.safetensors")
    weights = comfy.utils.load_torch_file(str(saved))
    assert not any(is_packed(weight) for weight in weights.values())
    prefix = comfy.model_detection.unet_prefix_from_state_dict(weights)
    assert comfy.model_detection.detect_unet_config(weights, prefix)["n_double_layers"] == 1
    again = small_patcher({name.removeprefix(prefix): weight for name, weight in weights.items()})
    assert_like(again, expected, "full")
