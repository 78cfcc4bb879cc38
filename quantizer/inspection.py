"""What a GGUF file of AuraFlow or its text encoder holds, and whether its numbers are sound."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import gguf
import torch

from ..loader.files.auraflow import AURAFLOW
from ..loader.files.gguf_file import GGUFFile, TensorInfo, open_gguf
from ..loader.files.matching import Match, annotations, match
from ..loader.files.parts import part_of
from ..loader.files.pile_t5 import PILE_T5_XL

# Of each model; the first pattern that fits a native name decides.
GROUPS = {
    AURAFLOW.name: {
        "attention": "*_layers.*.attn.*",
        "MLP": "*_layers.*.mlp*",
        "modulation": "*mod[CXF]*",
        "embedders, output": "*",
    },
    PILE_T5_XL.name: {
        "attention": "*.SelfAttention.*",
        "MLP": "*.DenseReluDense.*",
        "embedding": "shared.weight",
        "norms": "*",
    },
}
REPORTED_METADATA = (
    "general.name",
    "general.author",
    "general.license",
    "general.file_type",
    "general.source.header_sha256",
    "quantize.fit.tool",
    "quantize.fit.inputs",
    "quantize.fit.predicted_error",
    "quantize.fit.measured_error",
    "quantize.like",
)
TILE = 1 << 22  # weights dequantized at a time


@dataclass(frozen=True)
class Group:
    """Weights of one purpose: how many, the bytes they take packed, and how many tensors have each type."""

    name: str
    weights: int
    nbytes: int
    types: dict[str, int]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Description:
    """What `describe` found in a file.

    Attributes:
        model: what the tensors make up.
        architecture: its name in ``general.architecture``.
        spelling, prefix, dimensions: see `Match`.
        annotated: whether the file's metadata describe the architecture.
        metadata: those of `REPORTED_METADATA` that it has.
        skipped: number of tensors that are no part of the model.
        groups: the weights by purpose, and last all of them.
    """

    path: str
    model: str
    architecture: str
    spelling: str
    prefix: str
    dimensions: dict[str, int]
    annotated: bool
    metadata: dict[str, object]
    skipped: int
    groups: tuple[Group, ...]

    @property
    def total(self) -> Group:
        return self.groups[-1]

    @property
    def texts(self) -> dict[str, str]:
        """The metadata for a person: beside the number of a file type llama.cpp's name for it."""
        texts = {key: str(value) for key, value in self.metadata.items()}
        number = self.metadata.get("general.file_type")
        if number in list(gguf.LlamaFileType):
            texts["general.file_type"] += f" ({gguf.LlamaFileType(number).name.removeprefix('MOSTLY_')})"
        return texts

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that the weights take on the GPU, fully loaded: with the modulation cache, which leaves the
        modulation's weights where they are, and without it."""
        modulation = sum(group.nbytes for group in self.groups if group.name == "modulation")
        return {"with_cache": self.total.nbytes - modulation, "without_cache": self.total.nbytes}


def describe(path: str | os.PathLike, *, fixed: Mapping[str, int] | None = None) -> Description:
    """Say what a GGUF file is; ``fixed`` is passed to `match`.

    Raises:
        ModelFileError: the file is damaged, or neither an AuraFlow transformer nor its text encoder.
    """
    file, found = _open(path, fixed)
    infos = {name: file.tensors[source.name] for name, source in found.weights.items()}
    groups = GROUPS[found.architecture.name]
    by_group: dict[str, list[TensorInfo]] = {group: [] for group in groups}
    for name, info in infos.items():
        by_group[next(group for group, pattern in groups.items() if fnmatchcase(name, pattern))].append(info)
    by_group["all"] = list(infos.values())
    return Description(
        path=file.path,
        model=found.architecture.title,
        architecture=found.architecture.name,
        spelling=found.spelling,
        prefix=found.prefix,
        dimensions=found.dimensions,
        annotated=any(key in file.metadata for key in list(annotations(found))[1:]),
        metadata={key: file.metadata[key] for key in REPORTED_METADATA if key in file.metadata},
        skipped=len(found.skipped),
        groups=tuple(_group(name, members) for name, members in by_group.items()),
    )


def report(description: Description) -> str:
    """A description as lines of text: what the file is, its metadata, and a table of its groups."""
    prefix = f" after {description.prefix!r}" if description.prefix else ""
    lines = [f"{description.path}: {description.model}, {description.spelling} names{prefix}"]
    lines += [f"  {key}: {value}" for key, value in (description.dimensions | description.texts).items()]
    if not description.annotated:
        lines.append("  not annotated: made by an older or another converter")
    if description.skipped:
        lines.append(f"  {description.skipped} tensors of other parts")
    lines.append(f"{'':20}{'weights':>16}{'GB':>8}{'bits':>7}  types")
    for group in description.groups:
        types = ", ".join(f"{name} × {count}" for name, count in group.types.items())
        sizes = f"{group.weights:16,}{group.nbytes / 1e9:8.2f}{group.bits_per_weight:7.2f}"
        lines.append(f"{group.name:20}{sizes}  {types}")
    cached, whole = description.memory.values()
    without = f" with the modulation cache, {whole / 1e9:.2f} GB without" if cached < whole else ""
    lines.append(f"VRAM: {cached / 1e9:.2f} GB for the weights{without}, and what running takes.")
    return "\n".join(lines)


def _group(name: str, infos: list[TensorInfo]) -> Group:
    types: dict[str, int] = {}
    for info in infos:
        types[info.type.name] = types.get(info.type.name, 0) + 1
    return Group(
        name,
        weights=sum(torch.Size(info.shape).numel() for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        types=types,
    )


def verify(
    path: str | os.PathLike,
    *,
    progress: Callable[[int, int], None] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> list[str]:
    """Check a GGUF file as a whole: its structure, its tensors against the model and its annotations, and each number.

    Args:
        path: the file.
        progress: called with the number of weights checked so far and in all.
        fixed: passed to `match`.

    Returns:
        A sentence for each tensor with NaN or infinity in it, such as those that a damaged scale gives.

    Raises:
        ModelFileError: the structure, the tensors or the annotations are wrong.
    """
    file, found = _open(path, fixed)
    problems = []
    total, done = sum(torch.Size(source.shape).numel() for source in found.weights.values()), 0
    for source in found.weights.values():
        info = file.tensors[source.name]
        blocks = file.packed(source.name).reshape(-1, info.type.type_size)
        bad = 0
        for tile in blocks.split(TILE // info.type.block_size):
            bad += int((~torch.isfinite(info.type.dequantize_blocks(tile)).all(dim=1)).sum())
            done += len(tile) * info.type.block_size
            if progress:
                progress(done, total)
        if bad:
            what = "blocks" if info.type.block_size > 1 else "numbers"
            problems.append(f"{source.name} ({info.type.name}): {bad} of {len(blocks)} {what} have NaN or infinity.")
    return problems


def _open(path: str | os.PathLike, fixed: Mapping[str, int] | None) -> tuple[GGUFFile, Match]:
    file = open_gguf(path)
    return file, match(part_of(file.shapes), file.shapes, metadata=file.metadata, path=file.path, fixed=fixed)
