"""*Save AuraFlow as GGUF* of a MODEL that is on the accelerator makes the file that the CPU's makes."""

import contextlib
from dataclasses import replace
from pathlib import Path

import comfy.model_management as management
import folder_paths
import pytest
from auraflow_gguf.nodes.save import AuraFlowGGUFSave
from auraflow_gguf.quantizer.convert import PARTS

from ..host.patches import lora, patched
from ..host.small_auraflow import load_small, small_gguf
from .dynamic_vram import dynamic_vram
from .host_on_device import device_memory, on_the_cpu
from .pictures import picture


@pytest.fixture
def save(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setitem(PARTS, "transformer", replace(PARTS["transformer"], fixed={}))  # of any width

    def bytes_of(model) -> bytes:
        return Path(AuraFlowGGUFSave.execute(model, "Q8_0", "model").args[0]).read_bytes()

    return bytes_of


@pytest.mark.parametrize(("patcher", "mode"), [("static", "half"), ("dynamic", "full")])
def test_a_model_with_a_lora_on_the_device(on_cpu, save, patcher, mode):
    with on_the_cpu(management):
        expected, without = save(patched(on_cpu, lora)), save(on_cpu)
    with dynamic_vram() if patcher == "dynamic" else contextlib.nullcontext():
        model = load_small(small_gguf("Q4_0"))
        with_lora = patched(model, lora)
        with device_memory(management, model, mode):
            picture(with_lora)
            assert model.loaded_size() > 0
            assert save(with_lora) == expected
            assert save(model) == without != expected
