"""ComfyUI's own ways to patch and save a model, on packed weights beside the same weights dense."""

import comfy.hooks
import comfy.sd
import comfy.utils
import pytest
import utils.extra_config  # noqa: F401 (as main.py does, before ComfyUI's nodes put another utils on sys.path)
from auraflow_gguf.loader.layout import is_packed
from auraflow_gguf.loader.model import load_model
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave

from .aura_files import load_dense, make_gguf
from .forward import forward, loaded
from .sampling import relative_error, sample
from .test_patcher import LINEARS, diff, dora, lora, patched

QUICK = {"steps": 2, "size": 8, "tokens": 6}


@pytest.fixture(scope="module")
def packed():
    return load_model(make_gguf("Q4_0"))


@pytest.fixture(scope="module")
def dense():
    return load_dense(make_gguf("Q4_0"))


def lora_hooks(kind, strengths=(1.0,)):
    """What Create Hook LoRA makes, with a keyframe for each strength, spread over the steps."""
    state = {}
    for name, shape in LINEARS.items():
        state |= kind(f"diffusion_model.{name}", shape)
    hooks = comfy.hooks.create_hook_lora(state, 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for number, strength in enumerate(strengths):
        keyframes.add(comfy.hooks.HookKeyframe(strength, start_percent=number / len(strengths)))
    hooks.set_keyframes_on_hooks(keyframes)
    return hooks


@pytest.mark.parametrize("strengths", [(1.0,), (0.2, 1.5)], ids=str)
@pytest.mark.parametrize("kind", [lora, dora], ids=lambda kind: kind.__name__)
def test_lora_hooks_with_keyframes(packed, dense, kind, strengths):
    base = sample(packed, **QUICK)
    expected = sample(dense, hooks=lora_hooks(kind, strengths), **QUICK)
    hooked = sample(packed, hooks=lora_hooks(kind, strengths), **QUICK)
    assert relative_error(hooked, expected) < 1e-5
    assert relative_error(hooked, base) > 1e-3
    assert relative_error(sample(packed, **QUICK), base) == 0


def test_hooks_over_a_lora(packed, dense):
    expected = sample(patched(dense, diff), hooks=lora_hooks(lora), **QUICK)
    assert relative_error(sample(patched(packed, diff), hooks=lora_hooks(lora), **QUICK), expected) < 1e-5


def test_model_sampling(packed, dense):
    def shifted(model):
        return sample(ModelSamplingAuraFlow().patch_aura(model, 6.0)[0], **QUICK)

    assert relative_error(shifted(packed), shifted(dense)) < 1e-5
    assert relative_error(shifted(packed), sample(packed, **QUICK)) > 1e-3


def test_merged_and_saved_and_loaded_again(packed, dense, tmp_path):
    def merged(model):
        return ModelMergeSimple().merge(patched(model, lora), model, 0.3)[0]

    with loaded(merged(dense), "full") as twin:
        expected = forward(twin)
    with loaded(packed, "full"):
        assert relative_error(forward(packed), expected) > 1e-3
    both = merged(packed)
    with loaded(both, "full"):
        assert relative_error(forward(both), expected) < 1e-5

    node = ModelSave()
    node.output_dir = str(tmp_path)
    node.save(both, "merged")
    (saved,) = tmp_path.glob("merged*.safetensors")
    weights = comfy.utils.load_torch_file(str(saved))
    assert not any(is_packed(weight) for weight in weights.values())
    again = comfy.sd.load_diffusion_model_state_dict(weights)
    with loaded(again, "full"):
        assert relative_error(forward(again), expected) < 1e-5
