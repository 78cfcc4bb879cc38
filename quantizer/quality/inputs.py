"""What the transformer is run on: evaluations, from noise or from a calibration file."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from ...loader.files.errors import ModelFileError


@dataclass(frozen=True)
class Evaluation:
    """What the transformer sees once.

    Attributes:
        latent: ``(1, 4, height, width)``.
        text: ``(1, tokens, width)``, the text encoder's features.
        timestep: the noise level, 1 for noise alone.
    """

    latent: torch.Tensor
    text: torch.Tensor
    timestep: float


class Source(ABC):
    """Evaluations of one kind of inputs, in two parts: one to choose by, and one held back for the figures."""

    about: str
    """What they are, for a person."""

    @abstractmethod
    def evaluations(self, text_width: int) -> list[Evaluation]:
        """All of them, for a model of this width of text features.

        Raises:
            ModelFileError: they were made with a model of another width.
        """

    @abstractmethod
    def choosing(self) -> Source:
        """Those to choose by."""

    @abstractmethod
    def held_back(self) -> Source:
        """Those for the figures, which nothing is chosen by."""

    @abstractmethod
    def largest(self) -> int:
        """The larger side of the largest latent."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what the evaluations depend on."""


@dataclass(frozen=True)
class Noise(Source):
    """Seeded normal noise in place of latents and of text features.

    Attributes:
        size: height and width of the latent, 8 times fewer than pixels.
        tokens: length of the text.
        timesteps: the noise levels.
        seed: of the noise.
    """

    size: int = 32
    tokens: int = 64
    timesteps: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
    seed: int = 0

    @property
    def about(self) -> str:
        return "noise in place of latents and texts, for want of a calibration file"

    def evaluations(self, text_width: int) -> list[Evaluation]:
        generator = torch.Generator().manual_seed(self.seed)
        latent = torch.randn(1, 4, self.size, self.size, generator=generator)
        text = torch.randn(1, self.tokens, text_width, generator=generator)
        return [Evaluation(latent, text, timestep) for timestep in self.timesteps]

    def choosing(self) -> Noise:
        return self

    def held_back(self) -> Noise:
        return replace(self, seed=self.seed + 1)

    def largest(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


@dataclass(frozen=True)
class Fewer(Source):
    """At most ``count`` of another source's evaluations, evenly over pictures, timesteps and sides."""

    source: Source
    count: int

    @property
    def about(self) -> str:
        return f"{self.source.about}, {self.count} evaluations at most"

    def evaluations(self, text_width: int) -> list[Evaluation]:
        every = self.source.evaluations(text_width)
        if len(every) <= self.count:
            return every
        step = len(every) / self.count
        places = [int(place * step + place * step / self.count) + place % 2 for place in range(self.count)]
        return [every[place] for place in dict.fromkeys(min(place, len(every) - 1) for place in places)]

    def choosing(self) -> Source:
        return replace(self, source=self.source.choosing())

    def held_back(self) -> Source:
        return replace(self, source=self.source.held_back())

    def largest(self) -> int:
        return self.source.largest()

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.count} {self.source.fingerprint()}".encode()).hexdigest()


def check_size(source: Source, path: str, positions: int) -> None:
    """Check that a model has a position for each patch of the latents.

    Args:
        source: what the model is to run on.
        path: the model, for the message.
        positions: how many it encodes, a square number.
    """
    largest = 2 * round(positions**0.5)
    if source.largest() > largest:
        raise ModelFileError(
            path,
            found=f"positions for a latent of {largest} × {largest}",
            expected=f"{source.largest()} × {source.largest()}",
            advice="Give smaller noise (--size, of fit --noise-size), or a calibration of smaller pictures.",
        )
