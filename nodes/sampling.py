"""What nodes that collect while they sample have in common: KSampler's inputs, and the files that they make."""

from __future__ import annotations

import os
from dataclasses import dataclass

import comfy.model_base
import comfy.samplers
import folder_paths
from comfy_api.latest import io

from nodes import common_ksampler

from ..loader.comfyui.int8 import exact
from ..loader.comfyui.modulation import without_cache
from ..loader.files.errors import ModelFileError

NO_FILE = "none"


@dataclass(frozen=True)
class OutputFolder:
    """A folder in ComfyUI's output folder, whose files a node makes and others take.

    Attributes:
        name: the folder's.
        suffix: of the files.
        maker: the display name of the node that makes them.
    """

    name: str
    suffix: str
    maker: str

    def input(self, input_id: str, **options) -> io.Combo.Input:
        """An input that takes one of the files, or none."""
        return io.Combo.Input(input_id, options=[NO_FILE, *self.files()], default=NO_FILE, **options)

    def path(self, name: str) -> str | None:
        """The file that the value of such an input means.

        Raises:
            ModelFileError: there is no such file.
        """
        if name == NO_FILE:
            return None
        if name not in self.files():
            raise ModelFileError(
                name,
                found=f"no file of that name in output/{self.name}",
                expected=f"a file made by {self.maker}",
                advice="Choose another one, or none.",
            )
        return os.path.join(self._path(), name)

    def files(self) -> list[str]:
        folder = self._path()
        names, _ = folder_paths.recursive_search(folder) if os.path.isdir(folder) else ((), {})
        return sorted(name for name in names if name.lower().endswith(self.suffix))

    def next_file(self, prefix: str) -> str:
        """The path of the next file with a prefix, ``<prefix>_00001_<suffix>``."""
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            os.path.join(self.name, prefix), folder_paths.get_output_directory()
        )
        return os.path.join(folder, f"{name}_{counter:05}_{self.suffix}")

    def _path(self) -> str:
        return os.path.join(folder_paths.get_output_directory(), self.name)


IMATRICES = OutputFolder("imatrix", ".gguf", "Collect Importance for GGUF")
CALIBRATIONS = OutputFolder("calibration", ".safetensors", "Collect Calibration for GGUF")


def sampling_inputs() -> list[io.Input]:
    """KSampler's inputs, and what they are for here."""
    return [
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
        io.Float.Input("cfg", default=3.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="AuraFlow: about 3.5."),
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
    ]


def check_auraflow(model) -> None:
    """Refuse a MODEL that is not AuraFlow."""
    if not isinstance(model.model, comfy.model_base.AuraFlow):
        raise ValueError(f"The model is {type(model.model).__name__}, not AuraFlow: connect an AuraFlow model.")


def sample(model, **options) -> dict:
    """The latents that KSampler gives, with all of the model's weights used in every step, exactly."""
    return common_ksampler(exact(without_cache(model)), **options)[0]


def described(steps: int, sampler_name: str, scheduler: str, cfg: float, seed: int) -> str:
    """How something was sampled, as a line for a file."""
    return f"{steps} steps of {sampler_name}, {scheduler}, CFG {cfg:g}, seed {seed}"
