"""The node Save AuraFlow as GGUF."""

from __future__ import annotations

import os

import comfy.lora
import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy_api.latest import io, ui

from ..loader.quant_types import QUANT_TYPES
from ..loader.quant_types.base import QuantType
from ..loader.weights.layout import is_packed
from ..loader.weights.state_dict import DENSE_DTYPES
from ..quantizer.checkpoints import Checkpoint
from ..quantizer.checkpoints.checkpoint import FLOAT_TYPES
from ..quantizer.recipe import recipe_for
from .convert import rules, tensor_types_input, type_input
from .feedback import show_line, shown_progress
from .sampling import IMATRICES, NO_FILE

_PREFIX = "diffusion_model."


def _key_patches(patcher: ModelPatcher) -> dict[str, list]:
    """What `ModelPatcher.get_key_patches` gives, which fails on weights that ComfyUI itself has quantized: their scales
    are in the state dict, but are no attributes of a module."""
    weights = {}
    for name in patcher.model_state_dict(_PREFIX):
        try:
            weight, _, make_dense = get_key_weight(patcher.model, name)
        except AttributeError:
            continue
        if name in patcher.backup:
            weight = patcher.backup[name].weight
        if name in patcher.hook_backup:
            weight, _ = patcher.hook_backup[name]
        weights[name] = [(weight, make_dense or _as_it_is), *patcher.patches.get(name, ())]
    return weights


def _as_it_is(weight: torch.Tensor, inplace: bool) -> torch.Tensor:
    return weight


class ModelCheckpoint(Checkpoint):
    """The weights of a MODEL with its patches (LoRAs, merges) applied, each when it is read.

    ``dtype`` is what a weight is stored in; one that is packed or patched is read in float32.
    """

    def __init__(self, patcher: ModelPatcher):
        self.path = "MODEL"
        self.files = ()
        self.metadata = {}
        self._device = patcher.load_device
        # the unpatched weight and what makes it dense, then its patches
        self._weights = _key_patches(patcher)
        self.shapes = {name: tuple(weight.shape) for name, ((weight, _), *_) in self._weights.items()}

    def dtype(self, name: str) -> torch.dtype:
        (weight, _), *_ = self._weights[name]
        return DENSE_DTYPES.get(weight._params.quant_type, torch.float32) if is_packed(weight) else weight.dtype

    def exact_type(self, name: str) -> str:
        """ggml's type that holds a weight as it is; one that is patched is rounded to the 16 bit that ComfyUI computes
        with, and in which `fit` keeps weights."""
        (weight, _), *patches = self._weights[name]
        if is_packed(weight):
            return "BF16" if patches else weight._params.quant_type
        return FLOAT_TYPES.get(weight.dtype, "BF16")

    def read(self, name: str) -> torch.Tensor:
        (weight, make_dense), *patches = self._weights[name]
        if is_packed(weight):
            rows = QUANT_TYPES[weight._params.quant_type].dequantize(weight._qdata.to(self._device))
            dense = rows.reshape(weight.shape)
        else:
            dense = make_dense(weight.to(self._device), inplace=False).detach()
        if patches:
            dense = comfy.lora.calculate_weight(patches, dense.to(torch.float32, copy=True), name)
        return dense.cpu()

    def packed(self, name: str) -> tuple[QuantType, torch.Tensor] | None:
        (weight, _), *patches = self._weights[name]
        if patches or not is_packed(weight) or weight._params.quant_type in DENSE_DTYPES:
            return None
        return QUANT_TYPES[weight._params.quant_type], weight._qdata.cpu()


class AuraFlowGGUFSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowGGUFSave",
            display_name="Save AuraFlow as GGUF",
            category="advanced/AuraFlow",
            description=(
                "Saves a model as a GGUF file, with its LoRAs and merges baked in. Weights that have the type already "
                "and no patch are copied as they are; all others are quantized."
            ),
            search_aliases=["gguf", "quantize", "export model", "bake lora", "merge"],
            inputs=[
                io.Model.Input("model", tooltip="An AuraFlow or Pony V7 model, packed or dense."),
                type_input(),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/AuraFlow",
                    tooltip="In the output folder. Load AuraFlow (GGUF) finds files in output/diffusion_models.",
                ),
                IMATRICES.input("imatrix", tooltip="An importance matrix in output/imatrix.", optional=True),
                tensor_types_input(),
            ],
            outputs=[io.String.Output("path", tooltip="The file that was made.")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, type: str, filename_prefix: str, imatrix: str = NO_FILE, tensor_types: str = ""
    ) -> io.NodeOutput:
        from ..quantizer.convert import convert_checkpoint  # needs libgguf, the other nodes do not

        imatrix_file = IMATRICES.path(imatrix)
        recipe = recipe_for(type, rules(tensor_types), imatrix=imatrix_file is not None)
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        target = os.path.join(folder, f"{name}_{counter:05}_.gguf")
        convert_checkpoint(
            ModelCheckpoint(model), target, recipe, name=name, imatrix=imatrix_file, progress=shown_progress()
        )
        show_line(cls, target)
        return io.NodeOutput(target, ui=ui.PreviewText(target))
