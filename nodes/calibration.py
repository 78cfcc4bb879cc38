"""The node Collect Calibration for GGUF."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..quantizer.quality.calibration import Calibration, Sampling, read_calibration, write_calibration
from .feedback import show_line
from .sampling import CALIBRATIONS, NO_FILE, check_auraflow, described, sample, sampling_inputs


class AuraFlowGGUFCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AuraFlowGGUFCalibration",
            display_name="Collect Calibration for GGUF",
            category="advanced/AuraFlow",
            description=(
                "Samples like KSampler, and saves in output/calibration what the transformer gets at four steps, "
                "about 1.5 MB a picture. Fit GGUF to a size measures quantizations with it. Use "
                "four to eight prompts and settings of your own: choose the last file in continue_from to add to it."
            ),
            search_aliases=["calibration", "fit", "sensitivity", "gguf"],
            inputs=[
                *sampling_inputs(),
                io.String.Input(
                    "filename_prefix",
                    default="AuraFlow",
                    tooltip="The file: output/calibration/<prefix>_00001_.safetensors, or with the next free number.",
                ),
                CALIBRATIONS.input("continue_from", tooltip="An earlier file, to which this picture is added."),
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
        check_auraflow(model)
        previous = CALIBRATIONS.path(continue_from)
        calibration = read_calibration(previous) if previous else Calibration()
        sampling = Sampling()
        with sampling.collecting(model.model.diffusion_model):
            latent = sample(
                model,
                seed=seed,
                steps=steps,
                cfg=cfg,
                sampler_name=sampler_name,
                scheduler=scheduler,
                positive=positive,
                negative=negative,
                latent=latent_image,
            )
        if not sampling.latents:
            raise ValueError("Nothing was collected: the model's transformer did not run.")
        path = CALIBRATIONS.next_file(filename_prefix)
        made = described(steps, sampler_name, scheduler, cfg, seed)
        write_calibration(path, sampling.added_to(calibration, made))
        show_line(cls, path)
        return io.NodeOutput(latent, ui=ui.PreviewText(path))
