"""The node Load AuraFlow (GGUF)."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..loader.comfyui.model import MATRIX_MULT, load_model
from .folders import MODEL_FOLDER, file_names, fingerprint, full_path

_COMPUTE_DTYPES = {
    "auto": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class AuraFlowGGUFLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowGGUFLoader",
            display_name="Load AuraFlow (GGUF)",
            category="loaders/AuraFlow",
            description=(
                "Loads an AuraFlow or Pony V7 transformer from a GGUF file of any quantization type. "
                "The weights stay packed in memory and are dequantized as they are used."
            ),
            search_aliases=["gguf", "auraflow", "pony v7", "unet loader gguf", "quantized model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=file_names(MODEL_FOLDER),
                    tooltip="A .gguf file in models/diffusion_models or models/unet, subfolders included.",
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(_COMPUTE_DTYPES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What the model computes in. auto is what ComfyUI would choose for the same model in "
                        "16 bit, and bfloat16 on a CPU that multiplies it in hardware. It does not change how much "
                        "memory the weights take."
                    ),
                ),
                io.Boolean.Input(
                    "modulation_cache",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Keeps modulation, a third of the weights, off the GPU: what it gives is computed once for "
                        "each timestep of the schedule, and kept. The picture stays the same."
                    ),
                ),
                io.Combo.Input(
                    "matrix_mult",
                    options=list(MATRIX_MULT),
                    default="exact",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "int8 multiplies rotated 8-bit weights and activations in the layers, for speed on GPUs and "
                        "CPUs that have int8 products; the picture changes a little. Memory stays that of the file. "
                        "Where it would not be faster, products are exact and the log says why."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The transformer, for any node that takes a MODEL.")],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        model_name: str,
        compute_dtype: str = "auto",
        modulation_cache: bool = True,
        matrix_mult: str = "exact",
    ) -> str:
        return f"{fingerprint(MODEL_FOLDER, model_name)} {compute_dtype} {modulation_cache} {matrix_mult}"

    @classmethod
    def execute(
        cls,
        model_name: str,
        compute_dtype: str = "auto",
        modulation_cache: bool = True,
        matrix_mult: str = "exact",
    ) -> io.NodeOutput:
        path = full_path(MODEL_FOLDER, model_name)
        return io.NodeOutput(load_model(path, _COMPUTE_DTYPES[compute_dtype], modulation_cache, matrix_mult))
