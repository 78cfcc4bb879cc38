"""A checkpoint to a GGUF file: each tensor is read, packed a few rows at a time, and written."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..loader.files.errors import ModelFileError, listed
from ..loader.files.gguf_file import open_gguf
from ..loader.files.matching import Match, Source, annotations, match
from ..loader.files.parts import PARTS, part_of
from ..loader.files.pile_t5 import PILE_T5_XL
from ..loader.quant_types import QUANT_TYPES
from .checkpoints import Checkpoint, open_checkpoint, swap_halves
from .imatrix import ImportanceMatrix, check_imatrix, read_imatrix
from .quantize import quantize
from .recipe import NEEDS_IMATRIX, RECIPES, Recipe, recipe_for
from .tokenizer import carried_tokenizer, find_tokenizer, read_tokenizer
from .writer import TensorSpec, file_size, write_gguf

logger = logging.getLogger(__name__)

# (weights written so far, weights in all)
Progress = Callable[[int, int], None]

CHUNK = 1 << 24  # weights packed at a time, 64 MB as float32
QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION

MAX_FLOAT16 = 65504.0
# Types whose numbers, or whose blocks' scales, reach as far as float32; all others hold a float16 in their place.
WIDE_TYPES = ("F32", "BF16", "MXFP4")

# What a source's metadata say of the model: GGUF's keys, and those of safetensors' modelspec.
DESCRIPTION = {
    "general.name": ("general.name", "modelspec.title"),
    "general.author": ("general.author", "modelspec.author"),
    "general.license": ("general.license", "modelspec.license"),
}


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    type_name: str | None = None,
    *,
    like: str | os.PathLike | None = None,
    overwrite: bool = False,
    tensor_types: Iterable[str] = (),
    imatrix: str | os.PathLike | None = None,
    part: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    progress: Progress | None = None,
    fixed: Mapping[str, int] | None = None,
) -> None:
    """Make the GGUF file ``target`` from a checkpoint: a transformer's in native spelling, a text encoder's in
    llama.cpp's.

    Args:
        source: what `open_checkpoint` takes, in either spelling, with any prefix.
        target: the file to be made.
        type_name: a name among `RECIPES`.
        like: in place of ``type_name`` a GGUF file of the same model, whose tensors' types are taken over.
        overwrite: replace a ``target`` that exists.
        tensor_types: rules ``PATTERN=TYPE`` that go before the recipe's.
        imatrix: an importance matrix, as `read_imatrix` takes it.
        part: what of ``source`` to convert, as `part_of` takes it.
        tokenizer: the text encoder's, a SentencePiece model that is written into the file; by default that of
            ``source`` or of a file beside it, if there is one.
        progress: called with the number of weights written so far and in all.
        fixed: passed to `match`.

    Raises:
        ValueError: ``type_name`` or ``tensor_types`` cannot be used.
        ModelFileError: ``source``, ``target``, ``imatrix`` or ``tokenizer`` cannot be used; ``target`` is then as it
            was.
    """
    if (type_name is None) == (like is None):
        raise ValueError("Give either a type or a file to be like.")
    if like is None:
        recipe, extra = recipe_for(type_name, tensor_types, imatrix=imatrix is not None), {}
    else:
        recipe = _recipe_like(like, tensor_types, imatrix=imatrix is not None)
        extra = {"quantize.like": os.path.basename(like)}
    if not os.fspath(target).lower().endswith(".gguf"):
        raise ModelFileError(
            target,
            found="no .gguf at its end",
            expected="the name of the .gguf file to make",
            advice="Give the file's name and not a folder's: ComfyUI lists GGUF files by that ending.",
        )
    checkpoint = open_checkpoint(source, part)
    if tokenizer and part_of(checkpoint.shapes, part) is not PILE_T5_XL:
        logger.warning(
            "The tokenizer %s has no effect: only a text encoder's file has one.", os.path.basename(tokenizer)
        )
    if like is not None:
        _check_alike(checkpoint, like, recipe, part)
    convert_checkpoint(
        checkpoint,
        target,
        recipe,
        name=model_name(source),
        overwrite=overwrite,
        imatrix=imatrix,
        part=part,
        tokenizer=tokenizer or find_tokenizer(source),
        progress=progress,
        fixed=fixed,
        extra=extra,
    )


def _recipe_like(path: str | os.PathLike, overrides: Iterable[str], *, imatrix: bool) -> Recipe:
    """The types of a GGUF file's tensors as a recipe, after the user's own rules."""
    file = open_gguf(path)
    found = match(part_of(file.shapes), file.shapes, metadata=file.metadata, path=file.path, fixed={})
    types = {native: file.tensors[source.name].type.name for native, source in found.weights.items()}
    unwritten = sorted({name for name in types.values() if name not in RECIPES})
    if unwritten:
        raise ModelFileError(
            path,
            found=f"tensors of {listed(unwritten)}",
            expected=f"types that can be written: {', '.join(name for name in RECIPES if name in QUANT_TYPES)}",
            advice="Choose a --type.",
        )
    own = recipe_for("F32", overrides, imatrix=imatrix).overrides
    needing = sorted({name for name in types.values() if name in NEEDS_IMATRIX})
    if needing and not imatrix:
        raise ModelFileError(
            path,
            found=f"tensors of {listed(needing)}",
            expected="types that can be made without an importance matrix",
            advice="Give one (--imatrix), or be like another file.",
        )
    rules = tuple((name.removesuffix(".weight"), types[name]) for name in types if name.endswith(".weight"))
    return Recipe("like", int(file.metadata.get("general.file_type", 0)), rules, own)


def _check_alike(checkpoint: Checkpoint, like: str | os.PathLike, recipe: Recipe, part: str | None) -> None:
    """Refuse a file to be like that has other tensors than the checkpoint."""
    architecture = part_of(checkpoint.shapes, part)
    found = match(architecture, checkpoint.shapes, metadata=checkpoint.metadata, path=checkpoint.path, fixed={})
    ours = {name.removesuffix(".weight") for name in found.weights if name.endswith(".weight")}
    theirs = {pattern for pattern, _ in recipe.rules}
    if ours != theirs:
        raise ModelFileError(
            like,
            found=f"other tensors: {listed(sorted(ours ^ theirs))}",
            expected=f"those of {os.path.basename(checkpoint.path)}",
            advice="Give a file of the same model, or of a fine-tune of it.",
        )


def convert_checkpoint(
    checkpoint: Checkpoint,
    target: str | os.PathLike,
    recipe: Recipe,
    *,
    name: str,
    overwrite: bool = False,
    imatrix: str | os.PathLike | None = None,
    part: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    progress: Progress | None = None,
    fixed: Mapping[str, int] | None = None,
    extra: Mapping[str, object] | None = None,
) -> None:
    """`convert`, of an opened checkpoint; ``name`` is the model's where its metadata have none, ``extra`` are further
    metadata to write."""
    check_is_no_source(checkpoint, target)
    plan = _plan(checkpoint, recipe, name, imatrix, part, tokenizer, fixed, extra)
    if plan.skipped:
        logger.info("left out: %d tensors of other parts, such as %s", len(plan.skipped), plan.skipped[0])
    _warn_of_generation_loss(checkpoint, plan.sources)
    if plan.uncovered:
        logger.warning(
            "%s has no moments for %s: quantized without.", os.path.basename(imatrix), listed(plan.uncovered)
        )

    total, done = sum(tensor.size for tensor in plan.sources), 0

    def packed(tensor: TensorSpec) -> Iterator[memoryview]:
        nonlocal done
        for rows, piece in _pack(checkpoint, plan.sources[tensor], tensor, plan.matrix.moments(tensor.name)):
            yield piece
            done += rows * tensor.shape[-1]
            if progress:
                progress(done, total)

    write_gguf(target, plan.metadata, list(plan.sources), packed, overwrite=overwrite)


def check_is_no_source(checkpoint: Checkpoint, target: str | os.PathLike) -> None:
    """Refuse to write over a file that is read."""
    if os.path.exists(target) and any(os.path.samefile(file, target) for file in checkpoint.files):
        raise ModelFileError(
            target,
            found="the source of the conversion under this name",
            expected="another file",
            advice="Choose another name for the result.",
        )


def planned_size(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    name: str,
    imatrix: str | os.PathLike | None = None,
    fixed: Mapping[str, int] | None = None,
    extra: Mapping[str, object] | None = None,
) -> int:
    """Bytes of the file that `convert_checkpoint` would make; errors are its."""
    plan = _plan(checkpoint, recipe, name, imatrix, None, None, fixed, extra)
    return file_size(plan.metadata, list(plan.sources))


@dataclass(frozen=True)
class _Plan:
    """What a conversion writes, before a weight is read.

    Attributes:
        metadata: the file's.
        sources: where the weights of each tensor come from, in the file's order.
        matrix: the importance matrix, empty if there is none.
        uncovered: tensors that are quantized and that it has no moments for.
        skipped: see `Match`.
    """

    metadata: dict[str, object]
    sources: dict[TensorSpec, Source]
    matrix: ImportanceMatrix
    uncovered: list[str]
    skipped: tuple[str, ...]


def _plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    name: str,
    imatrix: str | os.PathLike | None,
    part: str | None,
    tokenizer: str | os.PathLike | None,
    fixed: Mapping[str, int] | None,
    extra: Mapping[str, object] | None,
) -> _Plan:
    architecture = part_of(checkpoint.shapes, part)
    found = match(architecture, checkpoint.shapes, metadata=checkpoint.metadata, path=checkpoint.path, fixed=fixed)
    unused = recipe.unused_rules(found.weights)
    if unused:
        raise ModelFileError(
            checkpoint.path,
            found=f"no tensor that fits {', '.join(map(repr, unused))}",
            expected=f"native names, such as {min(found.weights)}, with * for any text",
            advice="Correct the pattern.",
        )
    sources = {
        TensorSpec(
            architecture.written_name(native),
            source.shape,
            recipe.type_of(native, source.shape, checkpoint.dtype(source.name)),
        ): source
        for native, source in sorted(found.weights.items(), key=lambda item: _natural_order(item[0]))
    }
    metadata = _metadata(checkpoint, found, recipe, name)
    matrix, uncovered = ImportanceMatrix(), []
    if imatrix is not None:
        matrix, uncovered = _fitting_imatrix(imatrix, sources)
        metadata |= _imatrix_metadata(imatrix, matrix)
    if architecture.name == PILE_T5_XL.name:
        size = found.dimensions["vocabulary_size"]
        metadata |= read_tokenizer(tokenizer, size) if tokenizer else carried_tokenizer(checkpoint.metadata)
    return _Plan(metadata | dict(extra or {}), sources, matrix, uncovered, found.skipped)


def _fitting_imatrix(path: str | os.PathLike, tensors: Iterable[TensorSpec]) -> tuple[ImportanceMatrix, list[str]]:
    """The importance matrix, and the quantized tensors that it does not cover."""
    matrix = read_imatrix(path)
    quantized = [tensor for tensor in tensors if tensor.type.block_size > 1]
    missing = check_imatrix(
        matrix,
        path,
        columns={tensor.name: tensor.shape[-1] for tensor in quantized},
        required={tensor.name: tensor.type.name for tensor in quantized if tensor.type.name in NEEDS_IMATRIX},
    )
    return matrix, missing


def _pack(
    checkpoint: Checkpoint, source: Source, tensor: TensorSpec, moments: np.ndarray | None
) -> Iterator[tuple[int, memoryview]]:
    """A tensor's packed bytes, in pairs of a number of rows and their bytes."""
    stored = checkpoint.packed(source.name)
    if stored and stored[0] == tensor.type:
        rows = swap_halves(stored[1]) if source.swap_halves else stored[1]
        yield len(rows), memoryview(rows.numpy())
        return
    values = checkpoint.read(source.name).reshape(source.shape)
    values = swap_halves(values) if source.swap_halves else values
    columns = source.shape[-1]
    for chunk in values.reshape(-1, columns).split(max(1, CHUNK // columns)):
        yield len(chunk), memoryview(_quantize(chunk.float(), tensor, checkpoint.path, moments))


def _quantize(rows: torch.Tensor, tensor: TensorSpec, path: str, moments: np.ndarray | None) -> np.ndarray:
    """``(rows, columns) float32`` → ``(rows, row_bytes) uint8``, as ggml packs them; checks that they can be."""
    low, high = (bound.item() for bound in rows.aminmax())
    limit = torch.finfo(torch.float32).max if tensor.type.name in WIDE_TYPES else MAX_FLOAT16
    if not (-limit <= low and high <= limit):  # so that NaN is refused too
        raise ModelFileError(
            path,
            found=f"values from {low:g} to {high:g} in {tensor.name}",
            expected=f"numbers between ±{limit:g}, as {tensor.type.name} can hold",
            advice="The checkpoint is damaged if it has NaN or infinity; larger numbers fit BF16.",
        )
    return quantize(rows, tensor.type, moments)


def _warn_of_generation_loss(checkpoint: Checkpoint, sources: Mapping[TensorSpec, Source]) -> None:
    lossy: set[str] = set()
    for tensor, source in sources.items():
        stored = checkpoint.packed(source.name)
        if stored and stored[0] != tensor.type:
            lossy.add(stored[0].name)
    if lossy:
        logger.warning(
            "%s is quantized already (%s): quantized again, it loses more than the original checkpoint would.",
            os.path.basename(checkpoint.path),
            ", ".join(sorted(lossy)),
        )


def _metadata(checkpoint: Checkpoint, found: Match, recipe: Recipe, name: str) -> dict[str, object]:
    architecture = found.architecture
    metadata = annotations(replace(found, spelling=architecture.written)) | {"general.name": name}
    metadata |= {f"{architecture.name}.{key}": value for key, value in architecture.conventions.items()}
    for key, source_keys in DESCRIPTION.items():
        given = [value for value in map(checkpoint.metadata.get, source_keys) if isinstance(value, str) and value]
        if given:
            metadata[key] = given[0]
    return metadata | {
        "general.file_type": recipe.file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.source.header_sha256": checkpoint.fingerprint(),
    }


def _imatrix_metadata(path: str | os.PathLike, matrix: ImportanceMatrix) -> dict[str, object]:
    """What llama.cpp's quantizer writes of the importance matrix."""
    return {
        "quantize.imatrix.file": os.path.basename(path),
        "quantize.imatrix.dataset": ", ".join(matrix.datasets),
        "quantize.imatrix.entries_count": len(matrix.sums),
        "quantize.imatrix.chunks_count": matrix.chunks,
    }


def part_in(source: str | os.PathLike) -> str:
    """Which of the `PARTS` of ``source`` is converted when none is asked for.

    Raises:
        ModelFileError: ``source`` is no checkpoint.
    """
    architecture = part_of(open_checkpoint(source).shapes)
    return next(name for name, part in PARTS.items() if part is architecture)


def model_name(source: str | os.PathLike) -> str:
    """A model's name from its path: the file's, or the folder's, above ``transformer`` or ``text_encoder``."""
    path = Path(os.path.abspath(source))
    if path.name in PARTS:
        path = path.parent
    if path.is_dir():
        return path.name
    name = re.sub(r"-\d{5}-of-\d{5}$", "", re.split(r"\.safetensors|\.[^.]*$", path.name)[0])
    # in every diffusers folder the file has the same name
    return model_name(path.parent) if path.parent.name in PARTS else name


def _natural_order(name: str) -> list[str | int]:
    """A sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in name.split(".")]
