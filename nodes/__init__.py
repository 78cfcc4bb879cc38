"""The nodes of the pack, one file each, and the extension that hands them to ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .calibration import AuraFlowGGUFCalibration
from .convert import AuraFlowGGUFConvert
from .folders import register_gguf_folders
from .importance import AuraFlowGGUFImportance
from .inspect import AuraFlowGGUFInspect
from .lora_loader import AuraFlowLoraLoader
from .model_loader import AuraFlowGGUFLoader
from .replacements import offer_replacements
from .save import AuraFlowGGUFSave
from .text_encoder_loader import AuraFlowGGUFTextEncoderLoader


class AuraFlowGGUFExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_gguf_folders()
        offer_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            AuraFlowGGUFLoader,
            AuraFlowGGUFTextEncoderLoader,
            AuraFlowLoraLoader,
            AuraFlowGGUFConvert,
            AuraFlowGGUFSave,
            AuraFlowGGUFImportance,
            AuraFlowGGUFCalibration,
            AuraFlowGGUFInspect,
        ]
