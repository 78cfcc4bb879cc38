"""Dynamic VRAM: the picture is the CPU's while weights are taken away at any moment, and nothing is used after that."""

import comfy.model_management as management
import pytest
from auraflow_gguf.loader.comfyui.patcher import GGUFModelPatcherDynamic
from auraflow_gguf.loader.comfyui.text_encoder import load_text_encoder

from ..host.aura_files import TEXT_SIZES, make_text_encoder_gguf
from ..host.patches import lora, patched
from ..host.sampling import QUICK, relative_error, sample
from ..host.small_auraflow import load_small, small_gguf
from .dynamic_vram import dynamic_vram
from .host_on_device import device_memory, on_the_cpu
from .pictures import picture, picture_with_every_kind, picture_with_hooks, picture_with_lora
from .simulated import accelerator
from .test_text_encoder import conditionings

CHANCE = 0.3


@pytest.fixture
def at_random():
    """Weights are taken away at random."""
    with dynamic_vram(CHANCE) as library:
        before = library.evictions
        yield
        assert library.evictions > before


@pytest.fixture
def model():
    with dynamic_vram():
        made = load_small(small_gguf("Q4_0"))
        assert type(made) is GGUFModelPatcherDynamic
        yield made


def test_the_picture_is_the_cpus_and_what_is_resident_is_not_moved_again(model, expected):
    with device_memory(management, model, "full"):
        assert relative_error(picture(model), expected(picture)) < 1e-5
        accelerator.reset()
        assert relative_error(picture(model), expected(picture)) < 1e-5
        assert accelerator.counters().to_device < 1 << 20


@pytest.mark.parametrize("mode", ["full", "half"])
def test_weights_disappear_between_layers(model, expected, at_random, mode):
    with device_memory(management, model, mode):
        assert relative_error(picture(model), expected(picture)) < 1e-5
        assert relative_error(picture_with_lora(model), expected(picture_with_lora)) < 1e-5
        assert relative_error(picture(model), expected(picture)) < 1e-5


def test_every_kind_of_patch(model, expected, at_random):
    assert relative_error(picture_with_every_kind(model), expected(picture_with_every_kind)) < 1e-5


def test_hooks_with_keyframes(model, expected):
    """For which the host takes a static clone."""
    assert relative_error(picture_with_hooks(model), expected(picture_with_hooks)) < 1e-5


def test_interrupted_and_run_again(model, expected, at_random):
    def interrupt(step, *_):
        management.interrupt_current_processing()

    with pytest.raises(management.InterruptProcessingException):
        sample(patched(model, lora), **QUICK, callback=interrupt)
    assert relative_error(picture(model), expected(picture)) < 1e-5


def test_the_text_encoder(at_random):
    def load():
        return load_text_encoder(make_text_encoder_gguf("Q8_0"), fixed=TEXT_SIZES)

    clip = load()
    assert type(clip.patcher) is GGUFModelPatcherDynamic
    ours = conditionings(clip)
    with on_the_cpu(management):
        theirs = conditionings(load())
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))
