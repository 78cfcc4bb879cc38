"""The transformer's output, to judge a quantization by: in diffusers' class, with random inputs.

Errors of single weights say little: an error is carried on by all layers after it, and many are cancelled or blown up.
So the whole transformer runs, at several timesteps, and the error is that of its output.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ...loader.diffusers.transformer import AuraFlowTransformer2DModel, load_diffusers_transformer
from ...loader.files.auraflow import AURAFLOW
from ...loader.files.errors import ModelFileError
from ...loader.files.matching import match
from ...loader.weights.state_dict import open_checked
from ..checkpoints import Checkpoint, open_checkpoint
from ..convert import convert

HEAD_WIDTH = 256
FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16"}


@dataclass(frozen=True)
class Inputs:
    """Seeded normal noise in place of latents and of text features.

    Attributes:
        size: height and width of the latent, 8 times fewer than pixels.
        tokens: length of the text.
        timesteps: the noise levels, 1 for noise alone.
        seed: of the noise.
        device, dtype: what is computed on and in.
    """

    size: int = 32
    tokens: int = 64
    timesteps: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @torch.inference_mode()
    def outputs(self, model: AuraFlowTransformer2DModel) -> list[torch.Tensor]:
        """The output ``(1, 4, size, size)`` at each timestep."""
        generator = torch.Generator().manual_seed(self.seed)
        latent = torch.randn(1, 4, self.size, self.size, generator=generator).to(self.device, self.dtype)
        width = model.config.joint_attention_dim
        text = torch.randn(1, self.tokens, width, generator=generator).to(self.device, self.dtype)
        return [
            model(latent, text, torch.tensor([timestep], device=self.device), return_dict=False)[0]
            for timestep in self.timesteps
        ]


@contextmanager
def transformer(path: str | os.PathLike, inputs: Inputs) -> Iterator[AuraFlowTransformer2DModel]:
    """The model of a checkpoint on the inputs' device, in their dtype; of any width, with heads of 256.

    One that is no GGUF file is first copied into one of its own precision, in the folder for temporary files.

    Raises:
        ModelFileError: ``path`` is no sound checkpoint of AuraFlow, or there is no room for the copy.
    """
    with TemporaryDirectory() as folder:
        if Path(path).suffix.lower() != ".gguf":
            copy = Path(folder, "model.gguf")
            convert(path, copy, _float_type(open_checkpoint(path)), fixed={})
            path = copy
        dimensions = open_checked(path, AURAFLOW, fixed={})[1].dimensions
        _check_size(path, inputs.size, dimensions["positional_encoding_length"])
        model = load_diffusers_transformer(path, inputs.dtype, heads=dimensions["embedding_length"] // HEAD_WIDTH)
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                module.register_parameter(name, torch.nn.Parameter(weight.to(inputs.device), requires_grad=False))
        yield model


def _check_size(path: str | os.PathLike, size: int, positions: int) -> None:
    largest = 2 * math.isqrt(positions)
    if size > largest:
        raise ModelFileError(
            path,
            found=f"positions for a latent of {largest} × {largest}",
            expected=f"{size} × {size}",
            advice="Give a smaller --size.",
        )


def _float_type(checkpoint: Checkpoint) -> str:
    """The type that holds the checkpoint's weights as they are; bfloat16 has all numbers of plain fp8."""
    wanted = match(AURAFLOW, checkpoint.shapes, metadata=checkpoint.metadata, path=checkpoint.path, fixed={})
    dtypes = {checkpoint.dtype(source.name) for source in wanted.weights.values()}
    return next((name for dtype, name in FLOAT_TYPES.items() if dtype in dtypes), "BF16")


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """``‖output − reference‖ / ‖reference‖``."""
    return ((output.double() - reference.double()).norm() / reference.double().norm()).item()


def output_errors(a: str | os.PathLike, b: str | os.PathLike, inputs: Inputs) -> dict[float, float]:
    """The relative error of ``b``'s output to ``a``'s by timestep; errors are those of `transformer`."""
    with transformer(a, inputs) as model:
        reference = inputs.outputs(model)
    with transformer(b, inputs) as model:
        outputs = inputs.outputs(model)
    return {
        timestep: relative_error(*pair) for timestep, *pair in zip(inputs.timesteps, outputs, reference, strict=True)
    }
