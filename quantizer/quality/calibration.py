"""Calibration files: what the transformer saw while pictures were sampled, a few timesteps of each.

A safetensors file of bfloat16 tensors::

    latents.<picture>   (timesteps, 4, height, width)   what the transformer got, at the timesteps that are kept
    text.<number>       (tokens, width)                 the text encoder's features, each text once

with the metadata ``format`` = ``auraflow-calibration``, ``version`` = ``1``, ``description``, a sentence, and
``pictures``, JSON: a list with an object a picture::

    {"made": "20 steps of euler, …",          how it was sampled
     "timesteps": [0.97, …],                  0 to 1, those of its latents
     "held_back": [false, …],                 which of them are for figures and not for choosing
     "positive": 0, "negative": 1}            its texts by number; null for a side that was not evaluated

Each timestep is one evaluation a side of the CFG. Of several pictures every third is held back, the second to begin
with; of a single one every other timestep.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ...loader.files.errors import ModelFileError, shown
from ..checkpoints.safetensors import SafetensorsCheckpoint
from ..writer import whole_file
from .inputs import Evaluation, Source

FORMAT, VERSION = "auraflow-calibration", "1"
CHANNELS = 4
TIMESTEPS = 4  # kept of each picture, which are 0.5 MB at 1024 × 1024; its prompt is 1 MB
ADVICE = "Collect one with the node Collect Calibration for GGUF."
SIDES = ("positive", "negative")


@dataclass(frozen=True)
class Picture:
    """What was kept of one sampling.

    Attributes:
        made: how it was sampled.
        timesteps: of its latents.
        held_back: which of them are for figures.
        latents: ``(timesteps, 4, height, width) bfloat16``, height and width even.
        texts: ``(tokens, width) bfloat16`` by side, of the sides that were evaluated.
    """

    made: str
    timesteps: tuple[float, ...]
    held_back: tuple[bool, ...]
    latents: torch.Tensor
    texts: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Calibration(Source):
    """Pictures' evaluations.

    Attributes:
        pictures: all of them.
        name: the file's.
        part: whether of each picture all timesteps count (None), or those that are held back or not.
    """

    pictures: tuple[Picture, ...] = ()
    name: str = ""
    part: bool | None = None

    @property
    def about(self) -> str:
        part = {None: "all of", False: "the part to choose by of", True: "the part that is held back of"}[self.part]
        return f"{part} {self.name}"

    def _kept(self) -> Iterator[tuple[Picture, int, str]]:
        for picture in self.pictures:
            for number, held_back in enumerate(picture.held_back):
                if self.part in (None, held_back):
                    yield from ((picture, number, side) for side in picture.texts)

    def evaluations(self, text_width: int) -> list[Evaluation]:
        evaluations: list[Evaluation] = []
        for picture, number, side in self._kept():
            text = picture.texts[side]
            if text.shape[-1] != text_width:
                raise _refused(self.name, f"texts of width {text.shape[-1]}", f"{text_width}, as the model has")
            latent = picture.latents[number : number + 1]
            evaluations.append(Evaluation(latent.float(), text[None].float(), picture.timesteps[number]))
        if not evaluations:
            raise _refused(self.name, "one timestep, of which no part can be held back", "at least two")
        return evaluations

    def choosing(self) -> Calibration:
        return replace(self, part=False)

    def held_back(self) -> Calibration:
        return replace(self, part=True)

    def largest(self) -> int:
        return max(max(picture.latents.shape[-2:]) for picture in self.pictures)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.part).encode())
        for picture in self.pictures:
            digest.update(repr((picture.timesteps, picture.held_back, sorted(picture.texts))).encode())
            for tensor in (picture.latents, *(picture.texts[side] for side in sorted(picture.texts))):
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def adding(
        self, made: str, timesteps: Sequence[float], latents: torch.Tensor, texts: dict[str, torch.Tensor]
    ) -> Calibration:
        """This with one more picture, and what is held back chosen anew.

        Args:
            made: how it was sampled.
            timesteps: those that it was evaluated at, without repetition; `TIMESTEPS` of them are kept.
            latents: ``(timesteps, 4, height, width)``; a last odd row or column, which completes no patch, is left out.
            texts: ``(tokens, width)`` by side, of those that were evaluated.
        """
        count = min(TIMESTEPS, len(timesteps))
        kept = [(2 * number + 1) * len(timesteps) // (2 * count) for number in range(count)]
        height, width = (size - size % 2 for size in latents.shape[-2:])
        picture = Picture(
            made,
            tuple(float(timesteps[number]) for number in kept),
            (False,) * count,
            latents[kept, :, :height, :width].to("cpu", torch.bfloat16),
            {side: text.to("cpu", torch.bfloat16) for side, text in texts.items()},
        )
        return replace(self, pictures=_split((*self.pictures, picture)))


def _split(pictures: tuple[Picture, ...]) -> tuple[Picture, ...]:
    """The pictures with what is held back chosen."""
    if len(pictures) == 1:
        every_other = tuple(number % 2 == 1 for number in range(len(pictures[0].timesteps)))
        return (replace(pictures[0], held_back=every_other),)
    return tuple(
        replace(picture, held_back=(place % 3 == 1,) * len(picture.timesteps)) for place, picture in enumerate(pictures)
    )


@dataclass
class Sampling:
    """What a transformer gets while one picture is sampled, by timestep, the first of a batch.

    Attributes:
        latents: ``(4, height, width)`` by timestep, all of one shape.
        texts: ``(tokens, width)`` by side.
    """

    latents: dict[float, torch.Tensor] = field(default_factory=dict)
    texts: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, latents: torch.Tensor, timesteps: torch.Tensor, texts: torch.Tensor, sides: Sequence[int]) -> None:
        """Add an evaluation of a batch that has the pictures once for each of ``sides``.

        Args:
            latents: ``(batch, 4, height, width)``.
            timesteps: ``(batch,)``, all equal.
            texts: ``(batch, tokens, width)``.
            sides: indices of `SIDES`.
        """
        shapes = {latent.shape for latent in self.latents.values()} or {latents.shape[1:]}
        if latents.shape[1:] not in shapes:  # a prompt for a part of the picture
            return
        step = len(latents) // len(sides)
        self.latents.setdefault(float(timesteps[0]), latents[0].to("cpu", torch.bfloat16))
        for place, side in enumerate(sides):
            if SIDES[side] not in self.texts:
                self.texts[SIDES[side]] = texts[place * step].to("cpu", torch.bfloat16)

    @contextmanager
    def collecting(self, model: torch.nn.Module) -> Iterator[None]:
        """Add what ComfyUI's transformer ``model`` gets, as long as the context lasts."""

        def add(_, args: tuple, options: dict) -> None:
            latents, timesteps = args[:2]
            texts = options["context"] if "context" in options else args[2]
            sides = options.get("transformer_options", {}).get("cond_or_uncond", [0])
            self.add(latents, timesteps, texts, sides)

        handle = model.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def added_to(self, calibration: Calibration, made: str) -> Calibration:
        """A calibration with this as one more picture."""
        latents = torch.stack(list(self.latents.values()))
        return calibration.adding(made, list(self.latents), latents, self.texts)


def write_calibration(path: str | os.PathLike, calibration: Calibration, *, overwrite: bool = False) -> None:
    """Write a calibration as a file, whole or not at all.

    Raises:
        ModelFileError: ``path`` exists, or cannot be written.
    """
    texts: list[torch.Tensor] = []

    def number_of(text: torch.Tensor) -> int:
        known = (number for number, other in enumerate(texts) if torch.equal(other, text))
        number = next(known, len(texts))
        if number == len(texts):
            texts.append(text)
        return number

    pictures = [
        {
            "made": picture.made,
            "timesteps": picture.timesteps,
            "held_back": picture.held_back,
            **{side: number_of(picture.texts[side]) if side in picture.texts else None for side in SIDES},
        }
        for picture in calibration.pictures
    ]
    tensors = {f"latents.{number}": picture.latents for number, picture in enumerate(calibration.pictures)}
    tensors |= {f"text.{number}": text for number, text in enumerate(texts)}
    header: dict[str, object] = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION,
            "description": "What AuraFlow's transformer saw while pictures were sampled, to measure quantization.",
            "pictures": json.dumps(pictures),
        }
    }
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head = head.ljust(-(-len(head) // 8) * 8)
    with whole_file(path, len(head) + 8 + end, overwrite=overwrite) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def read_calibration(path: str | os.PathLike) -> Calibration:
    """Read a calibration file.

    Raises:
        ModelFileError: it is none, of a newer version, damaged, or holds numbers that are no inputs.
    """
    if not os.path.isfile(path):
        raise _refused(path, "no such file", "a calibration file")
    checkpoint = SafetensorsCheckpoint(os.fspath(path))
    if checkpoint.metadata.get("format") != FORMAT:
        raise _refused(path, "a safetensors file of something else", "a calibration file")
    version = checkpoint.metadata.get("version")
    if version != VERSION:
        raise _refused(path, f"version {shown(version)} of calibration files", f"version {VERSION}")
    try:
        entries = json.loads(checkpoint.metadata["pictures"])
        pictures = tuple(_picture(checkpoint, number, entry) for number, entry in enumerate(entries))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise _refused(
            path, f"a table of pictures that cannot be read ({shown(error)})", "a calibration file"
        ) from error
    if not pictures:
        raise _refused(path, "no pictures", "at least one")
    return Calibration(pictures, os.path.basename(path))


def _picture(checkpoint: SafetensorsCheckpoint, number: int, entry: dict) -> Picture:
    latents = _finite(checkpoint, f"latents.{number}")
    timesteps, held_back = tuple(map(float, entry["timesteps"])), tuple(map(bool, entry["held_back"]))
    texts = {side: _finite(checkpoint, f"text.{entry[side]}") for side in SIDES if entry[side] is not None}
    count, channels, *sides = latents.shape if latents.dim() == 4 else (0, 0)
    if channels != CHANNELS or any(side < 2 or side % 2 for side in sides):
        raise _refused(checkpoint.path, f"latents of shape {tuple(latents.shape)}", "(timesteps, 4, even, even)")
    if not count == len(timesteps) == len(held_back) or not all(0 <= timestep <= 1 for timestep in timesteps):
        raise _refused(checkpoint.path, f"{count} latents at timesteps {timesteps}", "one from 0 to 1 for each")
    if not texts or any(text.dim() != 2 or not len(text) for text in texts.values()):
        raise _refused(checkpoint.path, f"no texts for picture {number}", "(tokens, width) of one side at least")
    return Picture(str(entry["made"]), timesteps, held_back, latents, texts)


def _finite(checkpoint: SafetensorsCheckpoint, name: str) -> torch.Tensor:
    if name not in checkpoint.shapes or checkpoint.dtype(name) != torch.bfloat16:
        raise _refused(checkpoint.path, f"no {name} in bfloat16", "all inputs that its table names")
    values = checkpoint.read(name)
    if not torch.isfinite(values).all():
        raise _refused(checkpoint.path, f"NaN or infinity in {name}", "finite numbers")
    return values


def _refused(path: str | os.PathLike, found: str, expected: str) -> ModelFileError:
    return ModelFileError(path, found=found, expected=expected, advice=ADVICE)
