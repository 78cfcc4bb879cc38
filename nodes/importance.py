"""The node Collect Importance for GGUF, and where its files are."""

from __future__ import annotations

import os

import comfy.model_base
import comfy.samplers
import folder_paths
from comfy_api.latest import io, ui

from nodes import common_ksampler

from ..loader.comfyui.modulation import without_cache
from ..loader.files.errors import ModelFileError
from ..quantizer.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from .feedback import show_line

NO_FILE = "none"
_SUBFOLDER = "imatrix"


def imatrix_input(input_id: str = "imatrix", **options) -> io.Combo.Input:
    """An input that takes one of the files in output/imatrix, or none."""
    return io.Combo.Input(input_id, options=[NO_FILE, *_files()], default=NO_FILE, **options)


def imatrix_path(name: str) -> str | None:
    """The file that the value of an `imatrix_input` means.

    Raises:
        ModelFileError: there is no such file.
    """
    if name == NO_FILE:
        return None
    if name not in _files():
        raise ModelFileError(
            name,
            found="no file of that name in output/imatrix",
            expected="a file made by Collect Importance for GGUF",
            advice="Choose another one, or none.",
        )
    return os.path.join(_folder(), name)


def _folder() -> str:
    return os.path.join(folder_paths.get_output_directory(), _SUBFOLDER)


def _files() -> list[str]:
    folder = _folder()
    names, _ = folder_paths.recursive_search(folder) if os.path.isdir(folder) else ((), {})
    return sorted(name for name in names if name.lower().endswith(".gguf"))


class AuraFlowGGUFImportance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowGGUFImportance",
            display_name="Collect Importance for GGUF",
            category="advanced/AuraFlow",
            description=(
                "Samples like KSampler, and saves how large the inputs of each linear were in output/imatrix, as an "
                "importance matrix in llama.cpp's format. Quantized with it, a model keeps best what pictures like "
                "these need. Use prompts and settings of your own, some tens of them: choose the last file in "
                "continue_from to add to it."
            ),
            search_aliases=["imatrix", "importance matrix", "calibration", "gguf"],
            inputs=[
                io.Model.Input("model", tooltip="An AuraFlow or Pony V7 model, at best the unquantized one."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The noise to start from: another one for each picture.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="As many as you would use for a picture."),
                io.Float.Input(
                    "cfg", default=3.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="AuraFlow: about 3.5."
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="The sampler you would use for a picture.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="The scheduler you would use for a picture.",
                ),
                io.Conditioning.Input("positive", tooltip="A prompt like those that the file is for."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show; may be of an empty text."),
                io.Latent.Input("latent_image", tooltip="The latents to sample from, of the size you would use."),
                io.String.Input(
                    "filename_prefix",
                    default="AuraFlow",
                    tooltip="The file becomes output/imatrix/<prefix>_00001_.gguf, or has the next free number.",
                ),
                imatrix_input("continue_from", tooltip="An earlier file, to which these pictures' numbers are added."),
            ],
            outputs=[io.Latent.Output(tooltip="What was sampled.")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive,
        negative,
        latent_image,
        filename_prefix: str,
        continue_from: str = NO_FILE,
    ) -> io.NodeOutput:
        if not isinstance(model.model, comfy.model_base.AuraFlow):
            raise ValueError(f"The model is {type(model.model).__name__}, not AuraFlow: connect an AuraFlow model.")
        previous = imatrix_path(continue_from)
        matrix = read_imatrix(previous) if previous else ImportanceMatrix()
        with matrix.collecting(model.model.diffusion_model):
            (latent,) = common_ksampler(
                without_cache(model), seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image
            )
        if not matrix.sums:
            raise ValueError("Nothing was collected: none of the model's linear layers ran.")
        matrix.datasets.append(f"{steps} steps of {sampler_name}, {scheduler}, CFG {cfg:g}, seed {seed}")
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            os.path.join(_SUBFOLDER, filename_prefix), folder_paths.get_output_directory()
        )
        path = os.path.join(folder, f"{name}_{counter:05}_.gguf")
        write_imatrix(path, matrix)
        show_line(cls, path)
        return io.NodeOutput(latent, ui=ui.PreviewText(path))
