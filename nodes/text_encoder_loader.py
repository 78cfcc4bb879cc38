"""The node Load AuraFlow Text Encoder (GGUF)."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..loader.comfyui.text_encoder import load_text_encoder
from .folders import TEXT_ENCODER_FOLDER, file_names, fingerprint, full_path


class AuraFlowGGUFTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowGGUFTextEncoderLoader",
            display_name="Load AuraFlow Text Encoder (GGUF)",
            category="loaders/AuraFlow",
            description=(
                "Loads Pile-T5-XL, the text encoder of AuraFlow and Pony V7, from a GGUF file of any quantization "
                "type. The weights stay packed in memory and are dequantized as they are used."
            ),
            search_aliases=["gguf", "auraflow", "pony v7", "clip loader gguf", "pile t5", "text encoder"],
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=file_names(TEXT_ENCODER_FOLDER),
                    tooltip="A .gguf file in models/text_encoders or models/clip, subfolders included.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder, for any node that takes a CLIP.")],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder_name: str) -> str:
        return fingerprint(TEXT_ENCODER_FOLDER, text_encoder_name)

    @classmethod
    def execute(cls, text_encoder_name: str) -> io.NodeOutput:
        path = full_path(TEXT_ENCODER_FOLDER, text_encoder_name)
        return io.NodeOutput(load_text_encoder(path, folder_paths.get_folder_paths("embeddings")))
