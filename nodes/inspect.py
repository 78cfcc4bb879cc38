"""The node Inspect AuraFlow GGUF. web/inspect.js draws what it finds."""

from __future__ import annotations

import dataclasses

import folder_paths
from comfy_api.latest import io

from ..loader.errors import ModelFileError
from ..quantizer.inspection import Description, describe, report, verify
from .convert import shown_progress
from .folders import MODEL_FOLDER, fingerprint


class AuraFlowGGUFInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowGGUFInspect",
            display_name="Inspect AuraFlow GGUF",
            category="advanced/AuraFlow",
            description=(
                "Shows what a GGUF file is: its type by group of weights, bits per weight, size, the memory that it "
                "takes on the GPU, what it says about itself, and what is wrong with it."
            ),
            search_aliases=["gguf", "inspect", "model info", "bits per weight", "verify"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(MODEL_FOLDER),
                    tooltip="A .gguf file in models/diffusion_models or models/unet, subfolders included.",
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
        return f"{fingerprint(MODEL_FOLDER, model_name)} {check_numbers}"

    @classmethod
    def execute(cls, model_name: str, check_numbers: bool = False) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(MODEL_FOLDER, model_name)
        try:
            description = describe(path)
            problems = verify(path, progress=shown_progress()) if check_numbers else []
        except ModelFileError as error:
            # What is wrong with a file is what this node is asked for: it shows it and does not fail.
            panel = {"file": model_name, "refusal": {"found": error.found, "expected": error.expected}}
            panel["refusal"]["advice"] = error.advice
            return io.NodeOutput(str(error), ui={"inspection": [panel]})
        lines = [report(description)]
        if check_numbers:
            lines += problems or ["No NaN and no infinity in any weight."]
        panel = {"file": model_name, "checked": check_numbers, "problems": problems, **panel_entries(description)}
        return io.NodeOutput("\n".join(lines), ui={"inspection": [panel]})


def panel_entries(description: Description) -> dict[str, object]:
    """A description as JSON values for the panel; sizes in bytes."""
    groups = [dataclasses.asdict(group) | {"bits_per_weight": group.bits_per_weight} for group in description.groups]
    return {
        "model": description.model,
        "spelling": description.spelling,
        "prefix": description.prefix,
        "dimensions": description.dimensions,
        "annotated": description.annotated,
        "metadata": {key: str(value) for key, value in description.metadata.items()},
        "skipped": description.skipped,
        "groups": groups[:-1],
        "total": groups[-1],
        "memory": description.memory,
    }
