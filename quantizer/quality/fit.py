"""The best file for a size: types are measured on the model itself, chosen, written, and measured once more.

Each group of weights is quantized alone, at a few types, and the transformer's output compared with the unquantized
model's (`measuring`); from that the types are chosen (`choice`); the file is written as `convert` writes it, and its
error measured on inputs that nothing was chosen by, beside those of the recipes of nearest size.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...loader.files.auraflow import AURAFLOW
from ...loader.files.errors import ModelFileError
from ...loader.quant_types import QUANT_TYPES
from ..checkpoints import Checkpoint, open_checkpoint
from ..checkpoints.gguf import GGUFCheckpoint
from ..convert import check_is_no_source, convert_checkpoint, model_name, planned_size
from ..imatrix import ImportanceMatrix, read_imatrix
from ..recipe import NEEDS_IMATRIX, RECIPES, Recipe, parse_rule
from ..unfinished import unfinished_folder
from ..writer import check_target, set_float
from .choice import Candidate, choose, squared_errors
from .copying import check_room, copy_as_it_is, copy_size
from .evaluation import Inputs, mean_square, transformer
from .fitted import Beside, Fitted, Wanted
from .groups import Group
from .heads import head_count
from .inputs import Fewer, check_size
from .measurements import Measurements, kept_measurements
from .measuring import MEASURED, MEASURED_QUICKLY, WRITTEN, Progress, Subject, measure

EVALUATIONS, QUICK_EVALUATIONS = 16, 4  # at most, of each part of the inputs
BESIDE = tuple(name for name in RECIPES if "_K" in name or name == "Q8_0")
NEAREST = 2  # of them that a file is compared with
FIT = "quantize.fit."  # before the keys of annotations


def fit(
    source: str | os.PathLike | Checkpoint,
    target: str | os.PathLike,
    wanted: Wanted,
    inputs: Inputs,
    *,
    name: str | None = None,
    imatrix: str | os.PathLike | None = None,
    measured: Sequence[str] = (),
    quick: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
    copied: Callable[[], None] = lambda: None,
) -> Fitted:
    """Make the GGUF file ``target`` of a checkpoint, with the types that measure best at its size.

    Args:
        source: what `open_checkpoint` takes, at best in 16 or 32 bit, or such a checkpoint; an AuraFlow of any width.
        target: the file to be made. The measurements are kept in its folder; so is, meanwhile, a copy of a source that
            is no GGUF file.
        wanted: what it shall be.
        inputs: what the transformer is run on; at best in float32, whose rounding is no error of a quantization.
        name: the model's, if ``source`` has none; by default that of the source's file.
        imatrix: an importance matrix, to measure and to write with.
        measured: the types that groups are measured at; () for `MEASURED`.
        quick: measure at fewer types, and on fewer evaluations.
        overwrite: replace a ``target`` that exists.
        say: is told what is about to be done, and what it costs.
        progress: called with the work of measuring done so far and in all.
        copied: called when a ``source`` that is no file is needed no longer.

    Raises:
        ValueError: ``wanted`` or ``measured`` cannot be used, in a sentence for the user.
        ModelFileError: a file cannot be used, or no choice of types is so small; ``target`` is then as it was.
        Whatever ``inputs.check`` raises; what was measured until then is kept.
    """
    measured = tuple(measured) or (MEASURED_QUICKLY if quick else MEASURED)
    for type_name in measured:
        needs = type_name in NEEDS_IMATRIX and imatrix is None
        if type_name not in QUANT_TYPES or type_name not in RECIPES or needs:
            raise ValueError(f"{type_name} cannot be measured: it is no type that can be written, or needs an imatrix.")
    unknown = [type_name for type_name in wanted.types if type_name not in WRITTEN]
    if unknown:
        raise ValueError(f"{unknown[0]} is not the type of a tensor. These are: {', '.join(WRITTEN)}.")
    for rule in (*wanted.at_least, *wanted.at_most):
        parse_rule(rule)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    name = name or model_name(source)
    matrix = read_imatrix(imatrix) if imatrix is not None else ImportanceMatrix()
    subject = Subject.of(checkpoint, matrix, measured, wanted.types or WRITTEN)
    heads = head_count([checkpoint], subject.match.dimensions["embedding_length"], inputs.heads)
    count = QUICK_EVALUATIONS if quick else EVALUATIONS
    choosing = replace(inputs, source=Fewer(inputs.source.choosing(), count), heads=heads)
    held_back = replace(inputs, source=Fewer(inputs.source.held_back(), EVALUATIONS), heads=heads)
    target = Path(os.path.abspath(target))
    fitting = _Fitting(name, target, wanted, subject, imatrix, heads, inputs.check)
    fitting.check(overwrite, (choosing, held_back))
    with unfinished_folder(target) as folder:
        mapped = Path(checkpoint.path)
        if not fitting.is_mapped:
            say(f"Copying the model into a GGUF file of {copy_size(checkpoint) / 1e9:.2f} GB, which can be mapped.")
            mapped = copy_as_it_is(checkpoint, folder / "copy.gguf", fitting.go_on)
        if not checkpoint.files:  # a model in memory, of which nothing is needed now but its copy
            metadata, checkpoint = checkpoint.metadata, open_checkpoint(mapped)
            checkpoint.metadata = metadata
            fitting = replace(fitting, subject=Subject.of(checkpoint, matrix, measured, wanted.types or WRITTEN))
            copied()
        kept = kept_measurements(
            checkpoint,
            name,
            target.parent,
            {
                "inputs_sha256": [part.source.fingerprint() for part in (choosing, held_back)],
                "imatrix_sha256": hashlib.sha256(Path(imatrix).read_bytes()).hexdigest() if imatrix else None,
                "dtype": str(inputs.dtype),
                "heads": heads,
            },
            {"inputs": choosing.source.about},
        )
        measure(fitting.subject, mapped, choosing, kept, say, progress)
        return fitting.write(folder, mapped, kept, choosing, held_back, overwrite, say)


@dataclass(frozen=True)
class _Fitting:
    name: str
    target: Path
    wanted: Wanted
    subject: Subject
    imatrix: str | os.PathLike | None
    heads: int
    interrupt: Callable[[], None]

    def go_on(self, *_: int) -> None:
        """A progress callback that shows nothing."""
        self.interrupt()

    @property
    def is_mapped(self) -> bool:
        """Whether the transformer can run on the checkpoint's own file."""
        return isinstance(self.subject.checkpoint, GGUFCheckpoint)

    @property
    def fixed(self) -> dict[str, int] | None:
        """AuraFlow's own widths are checked as such; others are written with the number of heads."""
        dimensions = {**self.subject.match.dimensions, "head_count": self.heads}
        auraflows = all(dimensions[name] == length for name, length in AURAFLOW.fixed.items())
        return None if auraflows else {"head_count": self.heads}

    @property
    def weights(self) -> int:
        return sum(math.prod(source.shape) for source in self.subject.match.weights.values())

    @property
    def limit(self) -> int:
        """Bytes of the file, at most."""
        return self.wanted.size if self.wanted.size is not None else int(self.wanted.bits * self.weights / 8)

    def check(self, overwrite: bool, inputs: Sequence[Inputs]) -> None:
        """Refuse before the work begins what cannot work."""
        if self.target.suffix.lower() != ".gguf":
            raise ModelFileError(
                self.target,
                found="no .gguf at its end",
                expected="the name of the .gguf file to make",
                advice="Give the file's name and not a folder's: ComfyUI lists GGUF files by that ending.",
            )
        dimensions = self.subject.match.dimensions
        for part in inputs:
            part.source.evaluations(dimensions["text_embedding_length"])
            check_size(part.source, self.subject.checkpoint.path, dimensions["positional_encoding_length"])
        self.wanted.check([_module(name) for group in self.subject.groups for name in group.weights])
        smallest = {}
        for group in self.subject.groups:
            allowed = self.allowed(group)
            if not allowed:
                raise ValueError(f"No type is left for {group.name} by the rules and the types that may be chosen.")
            smallest[group.name] = min((self.subject.nbytes(group, name), name or "") for name in allowed)[1]
        least = self.size(self.recipe(smallest))
        if least > self.limit:
            raise self.too_small(least)
        check_is_no_source(self.subject.checkpoint, self.target)
        check_target(os.fspath(self.target), self.limit, overwrite)
        room = {
            "the file": self.limit,
            "a recipe's file to compare it with": max((size for _, size in self.nearest()), default=0),
        }
        if not self.is_mapped:
            room["a copy of the source as a GGUF file, which can be mapped"] = copy_size(self.subject.checkpoint)
        check_room(self.target.parent, room, "Free some space, or make the file on another disk.")

    def too_small(self, least: int) -> ModelFileError:
        return ModelFileError(
            self.target,
            found=f"a wanted size of {self.limit / 1e9:.3f} GB",
            expected=f"{least / 1e9:.3f} GB or more, which the smallest types that may be chosen take",
            advice="Give a larger size, or lower floors; types coarser than all that are measured (--measure) cannot "
            "be chosen.",
        )

    def allowed(self, group: Group) -> list[str | None]:
        """Types of a group by the person's rules; None is to keep it in 16 bit."""
        modules = [_module(name) for name in group.weights]
        return self.wanted.allowed(modules, self.subject.types(group))

    def recipe(self, types: Mapping[str, str]) -> Recipe:
        """The types by group as rules, with the file type of most weights."""
        shares: dict[str, int] = {}
        rules = []
        for group in self.subject.groups:
            name = types[group.name]
            shares[name or "BF16"] = shares.get(name or "BF16", 0) + self.subject.weights(group)
            rules += [(_module(weight), name) for weight in group.weights if name]
        return Recipe("fit", RECIPES[max(shares, key=shares.get)].file_type, tuple(rules))

    def annotations(self, inputs: str, predicted: float, groups: Mapping[str, float]) -> dict[str, object]:
        """What a file says of how it was made; what it measures is filled in later."""
        return {
            f"{FIT}tool": "auraflow-gguf fit",
            f"{FIT}inputs": inputs,
            f"{FIT}predicted_error": predicted,
            f"{FIT}measured_error": 0.0,
            f"{FIT}groups": list(groups),
            f"{FIT}group_errors": list(groups.values()),
        }

    def size(self, recipe: Recipe, extra: Mapping[str, object] | None = None) -> int:
        """Bytes of the file."""
        options = {"name": self.name, "imatrix": self.imatrix, "fixed": self.fixed}
        return planned_size(self.subject.checkpoint, recipe, **options, extra=extra)

    def convert(self, target: Path, recipe: Recipe, extra: Mapping[str, object] | None = None) -> None:
        options = {"name": self.name, "imatrix": self.imatrix, "fixed": self.fixed}
        convert_checkpoint(self.subject.checkpoint, target, recipe, **options, extra=extra, progress=self.go_on)

    def chosen(self, errors: Mapping[str, Mapping[str, float]], inputs: str) -> dict[str, Candidate]:
        """The candidate of each group, so that all of the file has the size that is wanted."""
        candidates = {}
        for group in self.subject.groups:
            known = {None: 0.0, **errors[group.name]}
            candidates[group.name] = [
                Candidate(name or "", self.subject.nbytes(group, name), known[name])
                for name in self.allowed(group)
                if name in known
            ]
            if not candidates[group.name]:
                raise ValueError(
                    f"No type is left for {group.name}: {', '.join(self.subject.measured)} were measured, and what "
                    "coarser ones do is not known. Change the rules, the types, or what is measured."
                )
        smallest = {group: min(entries, key=lambda entry: entry.nbytes) for group, entries in candidates.items()}
        recipe = self.recipe({group: entry.type_name for group, entry in smallest.items()})
        least = self.size(recipe, self.annotations(inputs, 0.0, dict.fromkeys(candidates, 0.0)))
        others = least - sum(entry.nbytes for entry in smallest.values())
        chosen = choose(candidates, self.limit - others)
        if chosen is None:
            raise self.too_small(least)
        return chosen

    def write(
        self,
        folder: Path,
        mapped: Path,
        kept: Measurements,
        choosing: Inputs,
        held_back: Inputs,
        overwrite: bool,
        say: Callable[[str], None],
    ) -> Fitted:
        """Choose, write into ``folder``, measure the file and its neighbours, and give it its name."""
        errors = {
            group.name: squared_errors(
                {name: kept.errors[group.name][name] for name in self.subject.measurable(group)},
                kept.rulers[group.name],
            )
            for group in self.subject.groups
        }
        inputs = choosing.source.about
        chosen = self.chosen(errors, inputs)
        types = {group: entry.type_name for group, entry in chosen.items()}
        recipe = self.recipe(types)
        predicted = math.sqrt(sum(entry.error for entry in chosen.values()))
        extra = self.annotations(inputs, predicted, {group: math.sqrt(entry.error) for group, entry in chosen.items()})
        beside = self.nearest()
        unmeasured = [name for name, _ in beside if name not in kept.files]
        made, other = folder / "fitted.gguf", folder / "recipe.gguf"
        say(f"Writing {self.size(recipe, extra) / 1e9:.3f} GB; predicted error {predicted:.5f}.")
        self.convert(made, recipe, extra)
        say(f"Measuring {', '.join(['it', *unmeasured])} on {held_back.source.about}.")
        with transformer(mapped, held_back) as model:
            reference = held_back.outputs(model)
        measured = math.sqrt(_error_of(made, held_back, reference))
        set_float(made, f"{FIT}measured_error", measured)
        for name in unmeasured:
            self.convert(other, RECIPES[name])
            kept.files[name] = _error_of(other, held_back, reference)
            other.unlink()
            kept.save()
        size = made.stat().st_size
        check_target(os.fspath(self.target), 0, overwrite)
        os.replace(made, self.target)
        recipes = (
            Beside(name, nbytes, self.predicted(RECIPES[name], errors), math.sqrt(kept.files[name]))
            for name, nbytes in beside
        )
        return Fitted(size, self.weights, types, predicted, measured, tuple(recipes))

    def nearest(self) -> list[tuple[str, int]]:
        """Recipes of nearest size and their sizes, the smaller ones first; of those of one size the first."""
        sizes: dict[int, str] = {}
        for name in BESIDE:
            sizes.setdefault(self.size(RECIPES[name]), name)
        nearest = sorted(sizes, key=lambda size: abs(size - self.limit))[:NEAREST]
        return [(sizes[size], size) for size in sorted(nearest)]

    def predicted(self, recipe: Recipe, errors: Mapping[str, Mapping[str, float]]) -> float | None:
        """The error of a recipe, by the measurements of the groups."""
        total = 0.0
        for group in self.subject.groups:
            for name in group.weights:
                source = self.subject.match.weights[name]
                type_name = recipe.type_of(name, source.shape, self.subject.checkpoint.dtype(source.name)).name
                known = {"F16": 0.0, "BF16": 0.0, "F32": 0.0, **errors[group.name]}
                if type_name not in known:
                    return None
                total += known[type_name] * math.prod(source.shape) / self.subject.weights(group)
        return math.sqrt(total)


def _error_of(path: Path, inputs: Inputs, reference: list[torch.Tensor]) -> float:
    with transformer(path, inputs) as model:
        return mean_square(inputs.outputs(model), reference)


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
