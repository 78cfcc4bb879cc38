"""The MODEL on the accelerator gives the CPU's picture: whole, half and hardly in its memory, patched, hooked,
interrupted, out of memory, moved in mid-run, and beside another model."""

import comfy.model_management as management
import pytest
import torch

from ..host.patches import diff, lora, patched
from ..host.sampling import QUICK, relative_error, sample
from ..host.small_auraflow import load_small, small_gguf
from .host_on_device import SIZE, device_memory
from .pictures import picture, picture_with_every_kind, picture_with_hooks, picture_with_lora
from .simulated import accelerator

DEVICE = torch.device("simulated", 0)
MODES = ("full", "half", "lowvram")


@pytest.fixture(scope="module")
def model():
    return load_small(small_gguf("Q4_0"))


@pytest.mark.parametrize("mode", MODES)
def test_the_picture_is_the_cpus(model, expected, mode):
    with device_memory(management, model, mode):
        assert relative_error(picture(model), expected(picture)) < 1e-5
        resident = model.loaded_size() / model.model_size()
        assert {"full": resident == 1, "half": 0.2 < resident < 0.8, "lowvram": resident < 0.1}[mode]
        assert model.load_device == DEVICE


def test_a_weight_that_is_not_waited_for_is_found(model, monkeypatch):
    """The device tells when the stream that computes uses what the stream that offloads still writes."""
    monkeypatch.setattr(management, "sync_stream", lambda device, stream: None)
    with (
        device_memory(management, model, "lowvram"),
        pytest.raises(RuntimeError, match="has not waited for that stream"),
    ):
        picture(model)
    accelerator.synchronize(DEVICE)


def test_what_is_loaded_is_moved_once(model):
    """Each packed byte once, and in the second run none."""
    with device_memory(management, model, "full"):
        accelerator.reset()
        picture(model)
        small = 1 << 20
        modulation = sum(p.nbytes for p in model.model.parameters()) - model.model_size()
        assert 0 <= accelerator.counters().to_device - model.model_size() - modulation < small
        accelerator.reset()
        picture(model)
        assert accelerator.counters().to_device < small


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_patch(model, expected, mode):
    with device_memory(management, model, mode):
        assert relative_error(picture_with_every_kind(model), expected(picture_with_every_kind)) < 1e-5
    assert relative_error(expected(picture_with_every_kind), expected(picture)) > 1e-3


@pytest.mark.parametrize("mode", ["full", "half"])
def test_hooks_with_keyframes(model, expected, mode):
    with device_memory(management, model, mode):
        assert relative_error(picture_with_hooks(model), expected(picture_with_hooks)) < 1e-5


def test_a_lora_after_a_partial_unload_and_the_model_without_it(model, expected):
    with device_memory(management, model, "full"):
        with_lora = patched(patched(model, lora), diff, names=("single_layers.0.mlp.c_proj",))
        first = picture(with_lora)
        assert with_lora.partially_unload(model.offload_device, model.model_size() // 2) > 0
        with accelerator.limited(int(management.minimum_inference_memory()) + model.model_size() // 2):
            assert relative_error(picture(with_lora), first) < 1e-5
        assert relative_error(picture(model), expected(picture)) < 1e-5
        assert relative_error(picture_with_lora(model), expected(picture_with_lora)) < 1e-5


def test_clones_in_turn(model, expected):
    with device_memory(management, model, "half"):
        strong = patched(model, lora, 2.0)
        first = picture(strong)
        assert relative_error(first, expected(picture_with_lora)) > 1e-3
        assert relative_error(picture_with_lora(model), expected(picture_with_lora)) < 1e-5
        assert relative_error(picture(strong), first) < 1e-5
        assert relative_error(picture(model), expected(picture)) < 1e-5


def test_interrupted_and_run_again(model, expected):
    def interrupt(step, *_):
        management.interrupt_current_processing()

    with device_memory(management, model, "half"):
        with_lora = patched(model, lora)
        with pytest.raises(management.InterruptProcessingException):
            sample(with_lora, **QUICK, callback=interrupt)
        assert relative_error(picture(model), expected(picture)) < 1e-5


def test_out_of_memory_in_a_step(model, expected):
    """The error is the one that the host knows, and the next run has all that it had before."""

    def with_little_memory(apply_model, arguments):
        with accelerator.limited(accelerator.counters().allocated + (1 << 20)):
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    clone = patched(model, lora)
    clone.set_model_unet_function_wrapper(with_little_memory)
    with device_memory(management, model, "full"):
        with pytest.raises(management.OOM_EXCEPTION, match="simulated:0 is out of memory"):
            picture(clone)
        assert relative_error(picture_with_lora(model), expected(picture_with_lora)) < 1e-5


def test_memory_taken_away_between_steps(model, expected):
    freed = []

    def take(step, *_):
        before = accelerator.counters().allocated
        management.free_memory(management.get_free_memory(DEVICE) + model.model_size() // 3, DEVICE)
        freed.append(before - accelerator.counters().allocated)

    with device_memory(management, model, "full"):
        clone = patched(model, lora)
        assert relative_error(sample(clone, **QUICK, callback=take), expected(picture_with_lora)) < 1e-5
    assert max(freed) >= model.model_size() // 4


def test_two_models_in_turn_where_one_fits(model, expected):
    other = load_small(small_gguf("Q4_0"))
    with device_memory(management, model, "full"):
        size = int(management.minimum_inference_memory() + model.model_size() * 1.2)
        with accelerator.limited(size):
            for _ in range(2):
                assert relative_error(picture(model), expected(picture)) < 1e-5
                assert relative_error(picture_with_lora(other), expected(picture_with_lora)) < 1e-5
            assert accelerator.counters().peak < SIZE
