"""The node Inspect AuraFlow GGUF. web/inspect.js draws what it finds."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ..loader.files.errors import ModelFileError
from ..quantizer.inspection import Description, describe, report, verify
from ..quantizer.quality.layers import Layers, layer_report, layers_of
from .feedback import shown_progress
from .folders import MODEL_FOLDER, TEXT_ENCODER_FOLDER, file_names, fingerprint, full_path

_TEXT_ENCODERS = "text_encoders/"  # before the names of text encoders, which may be those of transformers too


class AuraFlowGGUFInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowGGUFInspect",
            display_name="Inspect AuraFlow GGUF",
            category="advanced/AuraFlow",
            description=(
                "Shows what a GGUF file is: its type by group and by layer, bits per weight, size, the memory "
                "that it takes on the GPU, what it says about itself, and what is wrong with it."
            ),
            search_aliases=["gguf", "inspect", "model info", "bits per weight", "verify"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[
                        *file_names(MODEL_FOLDER),
                        *(f"{_TEXT_ENCODERS}{name}" for name in file_names(TEXT_ENCODER_FOLDER)),
                    ],
                    tooltip="A .gguf file in models/diffusion_models, or a text encoder's in models/text_encoders.",
                ),
                io.Boolean.Input(
                    "check_numbers",
                    default=False,
                    tooltip="Also dequantize every weight and look for NaN and infinity. Takes up to a minute.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="The same as text, for a note or a bug report.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, check_numbers: bool = False) -> str:
        return f"{fingerprint(*_located(model_name))} {check_numbers}"

    @classmethod
    def execute(cls, model_name: str, check_numbers: bool = False) -> io.NodeOutput:
        path = full_path(*_located(model_name))
        try:
            description, layers = describe(path), layers_of(path)
            problems = verify(path, progress=shown_progress()) if check_numbers else []
        except ModelFileError as error:
            # What is wrong with a file is what this node is asked for: it shows it and does not fail.
            panel = {"file": model_name, "refusal": {"found": error.found, "expected": error.expected}}
            panel["refusal"]["advice"] = error.advice
            return io.NodeOutput(str(error), ui={"inspection": [panel]})
        lines = [report(description)] + ([layer_report(layers)] if layers else [])
        if check_numbers:
            lines += problems or ["No NaN and no infinity in any weight."]
        panel = {
            "file": model_name,
            "checked": check_numbers,
            "problems": problems,
            **panel_entries(description, layers),
        }
        return io.NodeOutput("\n".join(lines), ui={"inspection": [panel]})


def _located(model_name: str) -> tuple[str, str]:
    """ComfyUI's key of the folder that a choice is in, and its name there. A transformer may be in a subfolder that is
    called as the text encoders' folder is."""
    name = model_name.removeprefix(_TEXT_ENCODERS)
    if name == model_name or model_name in file_names(MODEL_FOLDER):
        return MODEL_FOLDER, model_name
    return TEXT_ENCODER_FOLDER, name


def panel_entries(description: Description, layers: Layers | None) -> dict[str, object]:
    """A description, and a transformer's layers, as JSON values for the panel; sizes in bytes."""
    groups = [dataclasses.asdict(group) | {"bits_per_weight": group.bits_per_weight} for group in description.groups]
    return {
        "model": description.model,
        "architecture": description.architecture,
        "spelling": description.spelling,
        "prefix": description.prefix,
        "dimensions": description.dimensions,
        "annotated": description.annotated,
        "metadata": description.texts,
        "skipped": description.skipped,
        "groups": groups[:-1],
        "total": groups[-1],
        "memory": description.memory,
        "layers": dataclasses.asdict(layers) if layers else None,
    }
