"""The transformer's output, to judge a quantization by, in diffusers' class.

Errors of single weights say little: an error is carried on by all layers after it, and many are cancelled or blown up.
So the whole transformer runs, at several timesteps, and the error is that of its output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from tempfile import gettempdir

import torch

from ...loader.diffusers.transformer import AuraFlowTransformer2DModel, load_diffusers_transformer
from ...loader.files.auraflow import AURAFLOW
from ...loader.files.matching import Match, match
from ..checkpoints import Checkpoint, open_checkpoint
from ..unfinished import unfinished_folder
from .copying import check_room, copy_as_it_is, copy_size
from .heads import head_count
from .inputs import Evaluation, Noise, Source, check_size


@dataclass(frozen=True)
class Inputs:
    """What the transformer is run on.

    Attributes:
        source: the latents, texts and timesteps.
        device, dtype: what is computed on and in.
        heads: the number of attention heads, where no file says it.
        check: called before each evaluation, and often in long work between them; what it raises ends the work.
    """

    source: Source = field(default_factory=Noise)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    heads: int | None = None
    check: Callable[[], None] = lambda: None

    @torch.inference_mode()
    def output(self, model: AuraFlowTransformer2DModel, evaluation: Evaluation) -> torch.Tensor:
        """The output ``(1, 4, height, width)`` of one evaluation."""
        self.check()
        return model(
            evaluation.latent.to(self.device, self.dtype),
            evaluation.text.to(self.device, self.dtype),
            torch.tensor([evaluation.timestep], device=self.device),
            return_dict=False,
        )[0]

    def outputs(self, model: AuraFlowTransformer2DModel) -> list[torch.Tensor]:
        """The output ``(1, 4, height, width)`` of each evaluation."""
        return [self.output(model, each) for each in self.source.evaluations(model.config.joint_attention_dim)]

    def timesteps(self, model: AuraFlowTransformer2DModel) -> list[float]:
        """The timestep of each evaluation."""
        return [evaluation.timestep for evaluation in self.source.evaluations(model.config.joint_attention_dim)]


@contextmanager
def transformer(path: str | os.PathLike, inputs: Inputs) -> Iterator[AuraFlowTransformer2DModel]:
    """The model of a checkpoint on the inputs' device, in their dtype; of any width.

    One that is no GGUF file is first copied into one of its own precision, in the folder for temporary files.

    Raises:
        ModelFileError: ``path`` is no sound checkpoint of AuraFlow, there is no room for the copy, or nothing says the
            number of attention heads.
    """
    checkpoint = open_checkpoint(path)
    dimensions = _match(checkpoint).dimensions
    check_size(inputs.source, checkpoint.path, dimensions["positional_encoding_length"])
    heads = head_count([checkpoint], dimensions["embedding_length"], inputs.heads)
    with as_gguf(path) as mapped:
        model = load_diffusers_transformer(mapped, inputs.dtype, heads=heads)
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                module.register_parameter(name, torch.nn.Parameter(weight.to(inputs.device), requires_grad=False))
        yield model


@contextmanager
def as_gguf(path: str | os.PathLike) -> Iterator[Path]:
    """A checkpoint as a GGUF file, which can be mapped: itself, or a copy in the folder for temporary files as long as
    the context lasts. What a killed process has left there is removed."""
    if Path(path).suffix.lower() == ".gguf":
        yield Path(path)
        return
    checkpoint, folder = open_checkpoint(path), gettempdir()
    size = copy_size(checkpoint)
    advice = "Free some space, set TMPDIR to a folder on another disk, or convert it to BF16 and give that file."
    check_room(
        folder, {f"a copy of {os.path.basename(checkpoint.path)} as a GGUF file, which can be mapped": size}, advice
    )
    with unfinished_folder(Path(folder, "auraflow-gguf")) as unfinished:
        yield copy_as_it_is(checkpoint, unfinished / "model.gguf")


def _match(checkpoint: Checkpoint) -> Match:
    return match(AURAFLOW, checkpoint.shapes, metadata=checkpoint.metadata, path=checkpoint.path, fixed={})


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """``‖output − reference‖ / ‖reference‖``."""
    return ((output.double() - reference.double()).norm() / reference.double().norm()).item()


def mean_square(outputs: Iterable[torch.Tensor], references: Iterable[torch.Tensor]) -> float:
    """The mean of the squares of the relative errors of several outputs."""
    return mean(relative_error(*pair) ** 2 for pair in zip(outputs, references, strict=True))


def output_errors(a: str | os.PathLike, b: str | os.PathLike, inputs: Inputs) -> dict[float, float]:
    """The relative error of ``b``'s output to ``a``'s by timestep, the mean where one has several evaluations.

    What one file says of the number of heads holds for both. Errors are those of `transformer`.
    """
    checkpoints = [open_checkpoint(path) for path in (a, b)]
    hidden = _match(checkpoints[0]).dimensions["embedding_length"]
    inputs = replace(inputs, heads=head_count(checkpoints, hidden, inputs.heads))
    with transformer(a, inputs) as model:
        reference = inputs.outputs(model)
        timesteps = inputs.timesteps(model)
    with transformer(b, inputs) as model:
        outputs = inputs.outputs(model)
    errors: dict[float, list[float]] = {}
    for timestep, *pair in zip(timesteps, outputs, reference, strict=True):
        errors.setdefault(timestep, []).append(relative_error(*pair))
    return {timestep: mean(values) for timestep, values in errors.items()}
