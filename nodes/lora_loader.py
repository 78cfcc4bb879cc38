"""The node Load AuraFlow LoRA."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..loader.comfyui.lora import load_lora
from .feedback import show_line
from .folders import file_names, fingerprint, full_path

logger = logging.getLogger(__name__)

LORA_FOLDER = "loras"


class AuraFlowLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowLoraLoader",
            display_name="Load AuraFlow LoRA",
            category="loaders/AuraFlow",
            description=(
                "Applies a LoRA to an AuraFlow model, packed or dense, whatever spelling its trainer used, "
                "and shows how many of its modules were found. Chain several to stack them."
            ),
            search_aliases=["lora", "auraflow lora", "pony v7 lora", "lycoris", "peft"],
            inputs=[
                io.Model.Input("model", tooltip="An AuraFlow or Pony V7 model."),
                io.Combo.Input(
                    "lora_name",
                    options=file_names(LORA_FOLDER),
                    tooltip="A file in models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the model. Negative values turn its effect round.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA applied.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **kwargs) -> str:
        return fingerprint(LORA_FOLDER, lora_name)

    @classmethod
    def execute(cls, model, lora_name: str, strength: float) -> io.NodeOutput:
        path = full_path(LORA_FOLDER, lora_name)
        patched, report = load_lora(model, path, strength)
        logger.log(logging.WARNING if report.unmatched else logging.INFO, "%s: %s", lora_name, report)
        show_line(cls, str(report))
        return io.NodeOutput(patched)
