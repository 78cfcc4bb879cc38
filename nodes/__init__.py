"""The nodes of the pack, one file each, and the extension that hands them to ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .calibration import AuraFlowGGUFCalibration
from .convert import AuraFlowGGUFConvert
from .fit import AuraFlowGGUFFit
from .folders import register_gguf_folders
from .importance import AuraFlowGGUFImportance
from .inspect import AuraFlowGGUFInspect
from .lora_loader import AuraFlowLoraLoader
from .model_loader import AuraFlowGGUFLoader
from .replacements import register_replacements
from .save import AuraFlowGGUFSave
from .services import running_server
from .text_encoder_loader import AuraFlowGGUFTextEncoderLoader


class AuraFlowGGUFExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_gguf_folders()
        server = running_server()
        if server is not None:
            server.app.on_startup.append(self._all_packs_are_loaded)

    async def _all_packs_are_loaded(self, _: object) -> None:
        register_gguf_folders()  # with the folders that the others have added
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            AuraFlowGGUFLoader,
            AuraFlowGGUFTextEncoderLoader,
            AuraFlowLoraLoader,
            AuraFlowGGUFConvert,
            AuraFlowGGUFSave,
            AuraFlowGGUFImportance,
            AuraFlowGGUFCalibration,
            AuraFlowGGUFFit,
            AuraFlowGGUFInspect,
        ]
