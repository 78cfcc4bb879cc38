"""Errors of fitted files beside those of recipes at the same size, and pictures made by both.

On the folder of a model in diffusers' format, in which ``conditions.safetensors`` and ``words.json`` may give the texts
of prompts of three words (a shape, a colour, a background), as those of the small trained model do::

    python -c "import sys, dev; dev.register_pack(); from auraflow_gguf.benchmarks import fit; \\
               sys.exit(fit.main(sys.argv[1:]))" --model PATH --output FOLDER

With ``--calibration FILE`` any checkpoint will do. Errors are root mean squares of the output's relative error, on
evaluations that nothing was chosen by.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..quantizer.checkpoints import open_checkpoint
from ..quantizer.checkpoints.safetensors import SafetensorsCheckpoint
from ..quantizer.convert import convert
from ..quantizer.imatrix import ImportanceMatrix
from ..quantizer.quality.calibration import Calibration, read_calibration, write_calibration
from ..quantizer.quality.choice import Candidate, choose, squared_errors
from ..quantizer.quality.evaluation import Inputs, as_gguf, mean_square, transformer
from ..quantizer.quality.fit import EVALUATIONS, fit
from ..quantizer.quality.fitted import Wanted
from ..quantizer.quality.inputs import Fewer, Noise
from ..quantizer.quality.measuring import MEASURED, Subject

# The mixtures of K types as they were chosen by structure: base, c_proj, v and o, and modulation.
FORMER = {
    "Q2_K": ("Q2_K", "Q3_K", "Q3_K"),
    "Q3_K_M": ("Q3_K", "Q4_K", "Q4_K"),
    "Q4_K_M": ("Q4_K", "Q5_K", "Q5_K"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
}
PICTURED, PICTURES = ("Q2_K", "Q3_K_M", "Q4_K_M"), 3  # sizes, and how many prompts
STEPS, CFG = 24, 2.0
PROMPTS = (
    ("circle", "red", "black"),
    ("ring", "green", "navy"),
    ("square", "blue", "sand"),
    ("triangle", "yellow", "grey"),
    ("cross", "white", "black"),
    ("diamond", "magenta", "sand"),
)
SCALE, GAP = 4, 6  # of a picture's pixels, and between pictures


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fit", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder, or any checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the files, figures and pictures")
    parser.add_argument("--calibration", type=Path, help="inputs; without it the model's own prompts are sampled")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with as_gguf(options.model) as mapped:
        prompts = None if options.calibration else Prompts(options.model)
        inputs = Inputs(Noise(size=2), device=options.device, heads=options.heads)
        calibration = options.calibration or options.output / "calibration.safetensors"
        if prompts:
            heads = _heads(options)
            inputs = replace(inputs, heads=heads)
            with transformer(mapped, inputs) as model:
                write_calibration(calibration, prompts.calibration(model, inputs), overwrite=True)
        inputs = replace(inputs, source=read_calibration(calibration))
        rows = measure(options.model, mapped, options.output, inputs)
        (options.output / "fit.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        print(table(rows))
        if prompts:
            files = {"full": mapped}
            for row in rows:
                if row["recipe"] in PICTURED:
                    files[f"{row['recipe']} recipe"] = options.output / f"{row['recipe']}-former.gguf"
                    files[f"{row['recipe']} fitted"] = options.output / f"{row['recipe']}-fitted.gguf"
            pictures = {}
            for name, path in files.items():
                with transformer(path, inputs) as model:
                    pictures[name] = sampled(model, prompts, inputs)
            draw(pictures, options.output / "fit.png")
    return 0


def _heads(options: argparse.Namespace) -> int:
    from ..quantizer.quality.heads import head_count

    checkpoint = open_checkpoint(options.model)
    subject = Subject.of(checkpoint, ImportanceMatrix(), MEASURED)
    return head_count([checkpoint], subject.match.dimensions["embedding_length"], options.heads)


def former_rules(name: str) -> list[str]:
    """A former mixture as rules over its base type."""
    base, residual, modulation = FORMER[name]
    into_residual = ("mlp*.c_proj", "attn.w[12]v", "attn.w[12]o")
    return [
        *(f"*_layers.*.{pattern}={residual}" for pattern in into_residual),
        f"*_layers.*.mod*={modulation}",
        f"*_layers.*={base}",
        *(f"{module}=BF16" for module in ("t_embedder.*", "cond_seq_linear", "modF.1")),
    ]


def measure(source: Path, mapped: Path, folder: Path, inputs: Inputs) -> list[dict]:
    """A row for each former mixture: its size and error, and those at its size of the others."""
    checkpoint = open_checkpoint(source)
    subject = Subject.of(checkpoint, ImportanceMatrix(), MEASURED)
    count = sum(math.prod(weight.shape) for weight in subject.match.weights.values())
    heads = {"head_count": inputs.heads} if inputs.heads else None
    held_back = replace(inputs, source=Fewer(inputs.source.held_back(), EVALUATIONS))
    with transformer(mapped, held_back) as model:
        reference = held_back.outputs(model)

    def error(path: Path) -> float:
        with transformer(path, held_back) as model:
            return math.sqrt(mean_square(held_back.outputs(model), reference))

    rows = []
    for name, (base, *_) in FORMER.items():
        former, now, kinds, fitted = (folder / f"{name}-{kind}.gguf" for kind in ("former", "now", "kinds", "fitted"))
        options = {"overwrite": True, "fixed": heads}
        convert(source, former, base, tensor_types=former_rules(name), **options)
        size = former.stat().st_size
        convert(source, now, name, **options)
        made = fit(source, fitted, Wanted(size=size), inputs, overwrite=True, say=print)
        (kept,) = folder.glob("*.fit.json")
        rules = kind_rules(subject, json.loads(kept.read_text(encoding="utf-8")), size)
        convert(source, kinds, "BF16", tensor_types=rules, **options)
        files = {"former": former, "now": now, "kinds": kinds}
        rows.append(
            {
                "recipe": name,
                "bits": 8 * size / count,
                "bytes": {kind: path.stat().st_size for kind, path in files.items()} | {"fitted": made.size},
                "error": {kind: error(path) for kind, path in files.items()} | {"fitted": made.measured},
                "predicted": made.predicted,
                "types": made.types,
            }
        )
    return rows


def kind_rules(subject: Subject, kept: Mapping, size: int) -> list[str]:
    """Types for kinds of weights, the same in all layers, chosen for a file of ``size`` bytes."""
    kinds: dict[str, list] = {}
    for group in subject.groups:
        kind = group.kind.removeprefix("text ").removeprefix("image ") if group.layer else "embedders"
        kinds.setdefault(kind, []).append(group)
    candidates = {}
    for kind, groups in kinds.items():
        told = [squared_errors(kept["errors"][group.name], kept["rulers"][group.name]) for group in groups]
        names = set.intersection(*(set(errors) for errors in told))
        candidates[kind] = [
            Candidate(name, sum(subject.nbytes(group, name) for group in groups), sum(errors[name] for errors in told))
            for name in sorted(names)
        ]
        candidates[kind].append(Candidate("BF16", sum(subject.nbytes(group, None) for group in groups), 0.0))
    grouped = {name for group in subject.groups for name in group.weights}
    others = sum(4 * math.prod(weight.shape) for name, weight in subject.match.weights.items() if name not in grouped)
    chosen = choose(candidates, size - others - 32768)  # and a header
    return [
        f"{name.removesuffix('.weight')}={chosen[kind].type_name}"
        for kind, groups in kinds.items()
        for group in groups
        for name in group.weights
    ]


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| at the size of the former | bits a weight | former recipe | recipe now | one type a kind, chosen "
        "| each group for itself: `fit` |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        error, nbytes = row["error"], row["bytes"]
        now = f"{error['now']:.4f} ({nbytes['now'] / nbytes['former']:.2f} ×)"
        cells = (f"{error['former']:.4f}", now, f"{error['kinds']:.4f}", f"**{error['fitted']:.4f}**")
        lines.append(f"| `{row['recipe']}` | {row['bits']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Prompts:
    """The texts of `PROMPTS`, out of a model's folder."""

    def __init__(self, folder: Path):
        rows = SafetensorsCheckpoint(str(folder / "conditions.safetensors")).read("table")
        words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        self.texts = [rows[[words.index(word) for word in prompt]] for prompt in PROMPTS]
        self.empty = rows[-1:].expand(len(PROMPTS[0]), -1)
        self.size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["sample_size"]

    @torch.inference_mode()
    def sample(self, model, inputs: Inputs, number: int) -> tuple[list[float], torch.Tensor]:
        """The timesteps of a prompt's sampling by Euler's method, and the latents at each and at the end."""
        latent = torch.randn(1, 4, self.size, self.size, generator=torch.Generator().manual_seed(number))
        text = torch.stack([self.texts[number], self.empty]).to(inputs.device, inputs.dtype)
        timesteps, latents = [1 - step / STEPS for step in range(STEPS)], [latent]
        for timestep in timesteps:
            both = latents[-1].expand(2, -1, -1, -1).to(inputs.device, inputs.dtype)
            output = model(both, text, torch.tensor([timestep] * 2, device=inputs.device), return_dict=False)[0]
            conditional, unconditional = output.float().cpu().split(1)
            latents.append(latents[-1] - (unconditional + CFG * (conditional - unconditional)) / STEPS)
        return timesteps, torch.cat(latents)

    def calibration(self, model, inputs: Inputs) -> Calibration:
        calibration = Calibration()
        for number, prompt in enumerate(PROMPTS):
            timesteps, latents = self.sample(model, inputs, number)
            made = f"{STEPS} steps of euler, CFG {CFG:g}, seed {number}: {' '.join(prompt)}"
            texts = {"positive": self.texts[number], "negative": self.empty}
            calibration = calibration.adding(made, timesteps, latents[:-1], texts)
        return calibration


def sampled(model: torch.nn.Module, prompts: Prompts, inputs: Inputs) -> list[torch.Tensor]:
    """The pictures ``(height, width, 3) uint8`` that a model makes of the first prompts."""
    latents = [prompts.sample(model, inputs, number)[1][-1] for number in range(PICTURES)]
    return [((latent[:3] + 1) * 127.5).clamp(0, 255).round().byte().permute(1, 2, 0) for latent in latents]


def draw(pictures: Mapping[str, list[torch.Tensor]], target: Path) -> None:
    """Write the pictures as a PNG, a column for each name, with the name above it."""
    from PIL import Image, ImageDraw

    side = SCALE * len(next(iter(pictures.values()))[0])
    count = len(next(iter(pictures.values())))
    head = 16
    sheet = Image.new("RGB", (len(pictures) * (side + GAP) + GAP, head + count * (side + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, images) in enumerate(pictures.items()):
        left = GAP + column * (side + GAP)
        pen.text((left, 3), name, fill="black")
        for row, image in enumerate(images):
            picture = Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, head + GAP + row * (side + GAP)))
    sheet.save(target, optimize=True)
