"""ComfyUI's *MultiGPU CFG Split*: two devices give the picture of one, each with weights and a table of its own."""

import contextlib
import importlib.util

import comfy.model_management as management
import pytest
from auraflow_gguf.loader.comfyui.modulation import table_of

from ..host.patches import lora, patched
from ..host.sampling import relative_error
from ..host.small_auraflow import load_small, small_gguf
from .dynamic_vram import dynamic_vram
from .host_on_device import device_memory
from .pictures import picture, picture_with_lora
from .simulated import accelerator

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("comfy_extras.nodes_multigpu") is None, reason="this ComfyUI has no node for two devices"
)


@pytest.mark.parametrize(("patcher", "mode"), [("static", "full"), ("static", "lowvram"), ("dynamic", "full")])
def test_two_devices_give_the_picture_of_one(expected, patcher, mode):
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    with dynamic_vram() if patcher == "dynamic" else contextlib.nullcontext():
        model = load_small(small_gguf("Q4_0"))
        with device_memory(management, model, mode):
            both = MultiGPUCFGSplitNode.execute(patched(model, lora), 2).result[0]
            (other,) = both.get_additional_models_with_key("multigpu")
            accelerator.reset(1)
            assert relative_error(picture(both), expected(picture_with_lora)) < 1e-5
            assert accelerator.counters(1).to_device >= model.model_size()
            tables = [table_of(one.model) for one in (both, other)]
            for device, table in enumerate(tables):
                assert {part.device.index for row in table._rows.values() for part in row} == {device}
            assert relative_error(picture(both), expected(picture_with_lora)) < 1e-5
            assert [table.passes for table in tables] == [1, 1]
