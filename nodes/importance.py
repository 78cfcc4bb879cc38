"""The node Collect Importance for GGUF."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..quantizer.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from .feedback import show_line
from .sampling import IMATRICES, NO_FILE, check_auraflow, described, sample, sampling_inputs


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
                *sampling_inputs(),
                io.String.Input(
                    "filename_prefix",
                    default="AuraFlow",
                    tooltip="The file becomes output/imatrix/<prefix>_00001_.gguf, or has the next free number.",
                ),
                IMATRICES.input(
                    "continue_from", tooltip="An earlier file, to which these pictures' numbers are added."
                ),
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
        previous = IMATRICES.path(continue_from)
        matrix = read_imatrix(previous) if previous else ImportanceMatrix()
        with matrix.collecting(model.model.diffusion_model):
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
        if not matrix.sums:
            raise ValueError("Nothing was collected: none of the model's linear layers ran.")
        matrix.datasets.append(described(steps, sampler_name, scheduler, cfg, seed))
        path = IMATRICES.next_file(filename_prefix)
        write_imatrix(path, matrix)
        show_line(cls, path)
        return io.NodeOutput(latent, ui=ui.PreviewText(path))
