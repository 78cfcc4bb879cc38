"""What goes over the bus, and what stays on the device: each byte once, and of a LoRA nothing but its own factors."""

import contextlib

import comfy.memory_management
import comfy.model_management as management
import pytest
from auraflow_gguf.benchmarks.traffic import figures
from auraflow_gguf.loader.comfyui.ops import is_in_map
from auraflow_gguf.loader.weights.layout import is_packed

from ..host.patches import diff, loha, lora, noise, patched, shapes_of
from ..host.sampling import QUICK, relative_error
from ..host.small_auraflow import load_small, small_gguf
from .dynamic_vram import dynamic_vram
from .host_on_device import device_memory
from .pictures import picture
from .simulated import accelerator

LINEARS = [f"single_layers.{layer}.{name}" for layer in (0, 1) for name in ("attn.w1q", "mlp.c_fc1", "mlp.c_proj")]
SMALL = 1 << 16  # what a picture moves besides: latents, conditioning, timesteps
PAGE = 1 << 19


@pytest.fixture
def library():
    with dynamic_vram(page=PAGE) as library:
        yield library


@pytest.fixture
def model(library):
    return load_small(small_gguf("Q4_0"))


def factors(model) -> dict:
    """Those of LoRAs beside the weights that are loaded, by their linear."""
    linears = (m for m in model.model.modules() if getattr(m, "low_rank", None) and not m.stays_mapped)
    return {linear: linear.low_rank for linear in linears}


def nbytes(factors: dict) -> int:
    return sum(one.nbytes for one in factors.values())


def moved_by(model) -> int:
    accelerator.reset()
    picture(model)
    return accelerator.counters().to_device


@pytest.mark.parametrize(("share", "kind"), [(0.5, lora), (1, lora), (1, loha)])
def test_another_strength_of_a_lora_moves_its_factors_alone(library, model, share, kind):
    """Besides them, what does not fit goes over the bus in each step, as it does without a LoRA."""
    library.room = int(share * model.model_size()) // PAGE * PAGE + (share == 1) * PAGE
    with device_memory(management, model, "full"):
        moved_by(model)
        in_each_run = moved_by(model)
        offloaded = model.model_size() - library.room
        assert in_each_run < SMALL if share == 1 else in_each_run > 0.9 * QUICK["steps"] * offloaded
        bare = sum(p.nbytes for p in model.model.diffusion_model.parameters(recurse=False))  # loaded again
        for strength in (0.5, 0.8):
            changed = patched(model, kind, strength, LINEARS)
            moved = moved_by(changed) - in_each_run
            assert len(factors(model)) == len(LINEARS)
            assert abs(moved - nbytes(factors(model))) < SMALL + bare
            assert abs(moved_by(changed) - in_each_run) < SMALL
        assert abs(moved_by(model) - in_each_run) < SMALL + bare


def picture_with_strong_lora(model):
    return picture(patched(model, lora, 0.8, LINEARS))


@pytest.mark.parametrize("mode", ["full", "half"])
def test_the_static_patcher_changes_the_factors_alone_too(expected, mode):
    model = load_small(small_gguf("Q4_0"))
    # With half of the memory a small weight may come to fit as well.
    margin = SMALL if mode == "full" else SMALL + model.model_size() // 32
    with device_memory(management, model, mode):
        for _ in range(2):
            picture(patched(model, lora, 0.5, LINEARS))
        for kind in (lora, loha) if mode == "full" else (lora,):
            other = patched(model, kind, 0.8, LINEARS)
            at_first, again = moved_by(other), moved_by(other)
            assert len(factors(model)) == len(LINEARS)
            assert abs(at_first - again - nbytes(factors(model))) < margin
            if mode == "full":
                assert model.loaded_size() == model.model_size() + nbytes(factors(model))
        assert mode == "half" or moved_by(model) < SMALL
        assert relative_error(picture(model), expected(picture)) < 1e-5
        assert relative_error(picture_with_strong_lora(model), expected(picture_with_strong_lora)) < 1e-5
        with_diff = picture(patched(model, diff, 0.8, LINEARS))  # for which ComfyUI loads anew
        assert relative_error(picture(model), expected(picture)) < 1e-5 < relative_error(with_diff, expected(picture))


def test_the_factors_of_one_lora_are_on_the_device_at_a_time(model):
    with device_memory(management, model, "full"):
        picture(patched(model, lora, 0.5, LINEARS))
        before, changed = accelerator.counters().allocated, patched(model, lora, 0.8, LINEARS)
        accelerator.reset()
        management.load_models_gpu([changed])
        largest = max(one.nbytes for one in factors(model).values())
        assert accelerator.counters().peak < before + 3 * largest < before + nbytes(factors(model))


def loha_of_rank_16(name, shape):
    out, into = shape
    sizes = {"hada_w1_a": (out, 16), "hada_w1_b": (16, into), "hada_w2_a": (out, 16), "hada_w2_b": (16, into)}
    return {f"{name}.{key}": noise(*size) for key, size in sizes.items()}


@pytest.mark.parametrize("patcher", ["static", "dynamic"])
def test_of_a_loha_its_own_factors_are_on_the_device(patcher):
    """They are multiplied out, to a LoRA of rank 256, for one linear at a time."""
    with dynamic_vram(page=PAGE) if patcher == "dynamic" else contextlib.nullcontext():
        model = load_small(small_gguf("Q4_0"))
        with device_memory(management, model, "full"):
            picture(patched(model, lora, names=LINEARS))
            accelerator.reset()
            picture(patched(model, lora, names=LINEARS))
            before, held = accelerator.counters(), nbytes(factors(model))
            with_loha = patched(model, loha_of_rank_16, names=LINEARS)
            picture(with_loha)
            sides = [sum(shape) * 4 for shape in shapes_of(model, LINEARS).values()]  # bytes in float32
            own = sum(2 * 16 * side for side in sides)
            assert nbytes(factors(model)) == own
            others = accelerator.counters().allocated - own
            assert abs(others - (before.allocated - held)) < PAGE  # a buffer of the host's
            accelerator.reset()
            picture(with_loha)
            assert accelerator.counters().peak - own < before.peak - held + 256 * max(sides) + SMALL


def in_the_file(model) -> dict[str, int]:
    """Where weights lie in their file's map, by name: those that do."""
    parameters = {name: p for name, p in model.model.named_parameters() if is_in_map(p)}
    return {name: getattr(p, "_qdata", p).data_ptr() for name, p in parameters.items()}


@pytest.mark.parametrize(("patcher", "mode"), [("static", "full"), ("static", "half"), ("dynamic", "full")])
def test_what_is_unloaded_lies_in_the_file_again(patcher, mode):
    """And takes no memory of its own, page-locked or not, however often."""
    with dynamic_vram(page=PAGE) if patcher == "dynamic" else contextlib.nullcontext():
        model = load_small(small_gguf("Q4_0"))
        before = in_the_file(model)
        for _ in range(2):
            with device_memory(management, model, mode):
                with_lora = patched(model, lora, 0.5, LINEARS)
                picture(with_lora)
                assert patcher == "dynamic" or len(in_the_file(model)) < len(before)
                model.partially_unload(model.offload_device, model.loaded_size() // 2)
                picture(model)
            assert in_the_file(model) == before
            assert management.TOTAL_PINNED_MEMORY == 0


@pytest.mark.skipif(not hasattr(comfy.memory_management, "TensorFileSlice"), reason="this ComfyUI has no file reader")
def test_each_byte_is_read_of_the_file_once(library, model):
    """By ComfyUI's reader, a whole weight at a time, whether it stays on the device or not."""
    library.room = model.model_size() // 2 // PAGE * PAGE
    linears = [m for m in model.model.modules() if hasattr(m, "stays_mapped") and not m.stays_mapped]
    size = sum(m.weight.nbytes for m in linears if is_packed(m.weight))
    with device_memory(management, model, "full"):
        before = library.read
        picture(model)
        assert size <= library.read - before < size + SMALL
        before = library.read
        picture(patched(model, lora, 0.5, LINEARS))
        assert library.read == before


@pytest.mark.parametrize("patcher", ["static", "dynamic"])
def test_the_figures_of_the_benchmark(patcher):
    with dynamic_vram(page=PAGE) if patcher == "dynamic" else contextlib.nullcontext() as library:
        model = load_small(small_gguf("Q4_0"))
        room = model.model_size() * 2 // 3
        reserve = int(management.minimum_inference_memory())
        with device_memory(management, model, "full"), accelerator.limited(room + reserve):
            row = figures(model, room, accelerator, library)
        assert row["model_bytes"] - room == row["least_bytes"] <= row["step_bytes"] + SMALL
        assert row["least_bytes"] < row["step_bytes"] < row["model_bytes"] <= row["first_bytes"]
        assert row["strength_bytes"] - row["lora_step_bytes"] - row["factors_bytes"] < SMALL
        assert row["peak_bytes"] < room + reserve
