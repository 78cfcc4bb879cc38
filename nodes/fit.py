"""The node Fit GGUF to a size."""

from __future__ import annotations

import logging
import sys

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..quantizer.checkpoints import Checkpoint
from ..quantizer.quality.calibration import read_calibration
from ..quantizer.quality.inputs import Noise
from .convert import target_path
from .feedback import show_line, shown_progress
from .sampling import CALIBRATIONS, IMATRICES, NO_FILE, check_auraflow
from .save import ModelCheckpoint

logger = logging.getLogger(__name__)

GB = 10**9
RUNNING = 3 * GB  # what a GPU has to have besides the weights
DEFAULT, CPU = "default", "cpu"


class AuraFlowGGUFFit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowGGUFFit",
            display_name="Fit GGUF to a size",
            category="advanced/AuraFlow",
            description=(
                "Makes the best GGUF file for a size: measures what quantizing each part of the model does to its "
                "output, and gives each part the type that it needs. LoRAs and merges are baked in. This takes hours "
                "for a whole model, which is said at the node; interrupted, it goes on where it was, and another size "
                "takes seconds. Needs diffusers."
            ),
            search_aliases=["gguf", "quantize", "fit", "best size", "calibration"],
            inputs=[
                io.Model.Input("model", tooltip="An AuraFlow or Pony V7 model, at best the unquantized one."),
                CALIBRATIONS.input(
                    "calibration",
                    tooltip="What to measure with, a file of Collect Calibration for GGUF. none: noise, which tells "
                    "less.",
                ),
                io.Float.Input(
                    "size",
                    default=4.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    round=0.001,
                    tooltip="What the file takes at most, in GB of 1000 MB.",
                ),
                io.String.Input(
                    "output_name",
                    default="",
                    tooltip="The file's name in models/diffusion_models. Empty: AuraFlow and the size.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of that name."),
                io.Boolean.Input(
                    "quick",
                    default=False,
                    tooltip="Measure two types in place of four, on 4 evaluations in place of 16: an eighth of the "
                    "time.",
                ),
                IMATRICES.input("imatrix", tooltip="An importance matrix in output/imatrix.", optional=True),
                io.Combo.Input(
                    "device",
                    options=[DEFAULT, CPU],
                    default=DEFAULT,
                    optional=True,
                    advanced=True,
                    tooltip="What to measure on. default: ComfyUI's own, on which all weights have to have room.",
                ),
            ],
            outputs=[
                io.String.Output("path", tooltip="The file that was made."),
                io.String.Output("report", tooltip="Its error beside those of recipes, as a table."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        calibration: str,
        size: float,
        output_name: str = "",
        overwrite: bool = False,
        quick: bool = False,
        imatrix: str = NO_FILE,
        device: str = DEFAULT,
    ) -> io.NodeOutput:
        fit, wanted, inputs = _of_diffusers()
        check_auraflow(model)
        file = CALIBRATIONS.path(calibration)
        source = read_calibration(file) if file else Noise()
        target = target_path(output_name or f"AuraFlow-{size:g}GB", "diffusion_models")
        checkpoint = ModelCheckpoint(model)
        chosen = torch.device(CPU) if device == CPU else comfy.model_management.get_torch_device()
        _check_memory(checkpoint, chosen)

        def say(line: str) -> None:
            logger.info(line)
            show_line(cls, line)

        with torch.inference_mode(False), torch.no_grad():
            made = fit(
                checkpoint,
                target,
                wanted(size=round(size * GB)),
                inputs(source, str(chosen), check=comfy.model_management.throw_exception_if_processing_interrupted),
                name=target.stem,
                imatrix=IMATRICES.path(imatrix),
                quick=quick,
                overwrite=overwrite,
                say=say,
                progress=shown_progress(),
                copied=_unload,
            )
        report = made.table(target.name)
        if not file:
            report += "\n\nChosen and measured on noise, for want of a calibration file."
        show_line(cls, str(target))
        return io.NodeOutput(str(target), report, ui=ui.PreviewText(f"{target}\n\n{report}"))


def _of_diffusers() -> tuple:
    """What is there with diffusers alone, and other nodes do without.

    Raises:
        ModuleNotFoundError: it is not installed, with the command for it.
    """
    try:
        from ..quantizer.quality.evaluation import Inputs
        from ..quantizer.quality.fit import fit
        from ..quantizer.quality.fitted import Wanted
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}, into the Python that runs ComfyUI ({sys.executable}); then start ComfyUI again.",
            name=error.name,
        ) from error
    return fit, Wanted, Inputs


def _check_memory(checkpoint: Checkpoint, device: torch.device) -> None:
    """Refuse a device that all weights have no room on."""
    from ..quantizer.quality.copying import copy_size

    if device.type == CPU:
        return
    total, needed = comfy.model_management.get_total_memory(device), copy_size(checkpoint) + RUNNING
    if total < needed:
        raise ValueError(
            f"Measuring needs {needed / GB:.1f} GB on {device}, which has {total / GB:.1f} GB. Connect the model of a "
            "Q8_0 file, whose own error is small, or choose cpu as device, which takes very much longer."
        )


def _unload() -> None:
    """Free the memory of the device: from here on the model runs in diffusers' class, from its copy."""
    with torch.inference_mode():  # as ComfyUI has loaded them
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
