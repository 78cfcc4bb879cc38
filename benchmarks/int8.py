"""What products in int8 cost: the output's error by type, and what each kind of linear adds to it.

On the folder of a small trained model in diffusers' format, as `fit` takes it, with prompts of its own::

    python -c "import sys, dev; dev.register_pack(); from auraflow_gguf.benchmarks import int8; \\
               sys.exit(int8.main(sys.argv[1:]))" --model PATH --output FOLDER

The same model is measured with planted outliers too: of 1 % of the MLP's hidden channels the activations are 50 times
as large, and ``c_proj`` takes that back. Errors are root mean squares of the output's relative error along the model's
own sampling. The integers are multiplied as float32, on any machine: what is measured is the picture, not the time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ..devtools.random_models import make_packed_auraflow
from ..loader.diffusers.modules import PackedLinear
from ..loader.kernels import int8
from ..quantizer.checkpoints import open_checkpoint
from ..quantizer.convert import convert
from ..quantizer.quality.calibration import read_calibration, write_calibration
from ..quantizer.quality.evaluation import Inputs, as_gguf, mean_square, transformer
from ..quantizer.quality.inputs import Fewer, Noise
from ..quantizer.recipe import recipe_for
from .fit import Prompts, draw, sampled

PARTS = ("trained", "outliers", "kinds", "pictures", "full width")
PICTURED = ("Q8_0", "Q4_K")  # and those of full width
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS")
EVALUATIONS = 24  # of all timesteps, prompts and sides of the CFG
OUTLIERS, TIMES = 0.01, 50.0

# The kinds of linears by what their diffusers' names end in; the first four are multiplied in int8.
KINDS = {
    "q and k": ("to_q", "to_k", "add_q_proj", "add_k_proj"),
    "v and o": ("to_v", "add_v_proj", "to_out.0", "to_add_out"),
    "c_fc1, c_fc2": ("linear_1", "linear_2"),
    "c_proj": ("out_projection",),
    "modulation": ("norm1.linear", "norm1_context.linear", "norm_out.linear"),
    "embedders and final": ("time_step_proj.linear_1", "time_step_proj.linear_2", "context_embedder", "proj_out"),
}
IN_INT8 = tuple(KINDS)[:4]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="int8", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder with prompts")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the files and figures")
    parser.add_argument(
        "--type", action="append", choices=TYPES, help="measure only this, beside what is there already"
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="likewise")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / "int8.json"
    results = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    types, parts = options.type or TYPES, options.part or PARTS
    with as_gguf(options.model) as trained:
        inputs = trained_inputs(options.model, trained, options.output / "calibration.safetensors")
        for part, source in (("trained", trained), ("outliers", None)):
            if part in parts:
                source = source or plant_outliers(options.model, options.output / "planted")
                results[part] = results.get(part, {}) | measure(source, options.output, part, inputs, types)
        if "kinds" in parts:
            results["kinds"] = measure_kinds(options.output / "trained-Q8_0.gguf", inputs)
        if "pictures" in parts:
            draw(pictures(options.model, trained, options.output, inputs), options.output / "int8.png")
        if "full width" in parts:
            results["full width"] = measure_full_width(options.output)
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    return 0


def trained_inputs(folder: Path, model: Path, kept: Path) -> Inputs:
    """Evaluations along the sampling of the model's own prompts, sampled once and kept in a calibration file."""
    heads = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_attention_heads"]
    inputs, prompts = Inputs(Noise(size=2), heads=heads), Prompts(folder)
    if not kept.exists():
        with transformer(model, inputs) as loaded:
            write_calibration(kept, prompts.calibration(loaded, inputs))
    return replace(inputs, source=Fewer(read_calibration(kept), EVALUATIONS))


def plant_outliers(folder: Path, target: Path) -> Path:
    """The model of a folder as float32 safetensors with outliers in its activations: the same function."""
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(folder)
    weights = {name: checkpoint.read(name).float() for name in checkpoint.shapes}
    generator = torch.Generator().manual_seed(0)
    for name, up in weights.items():
        if name.endswith("linear_2.weight") and ".ff" in name:
            chosen = torch.randperm(len(up), generator=generator)[: max(1, round(OUTLIERS * len(up)))]
            up[chosen] *= TIMES
            weights[name.replace("linear_2", "out_projection")][:, chosen] /= TIMES
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "diffusion_pytorch_model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def measure(source: Path, folder: Path, name: str, inputs: Inputs, types: Sequence[str]) -> dict[str, dict]:
    """By type: the error of its weights, what int8 adds, plain and rotated and smoothed, and the latter's in all."""
    with transformer(source, inputs) as model:
        reference = inputs.outputs(model)
    rows = {}
    for kind in types:
        path = folder / f"{name}-{kind}.gguf"
        rules = [f"*_layers.*={kind}"]
        convert(source, path, "BF16", tensor_types=rules, overwrite=True, fixed={"head_count": inputs.heads})
        rows[kind] = _errors(path, inputs, reference)
        print(name, kind, rows[kind], flush=True)
    return rows


def measure_kinds(path: Path, inputs: Inputs) -> dict[str, float]:
    """What int8 adds, rotated, when one kind of linears alone is multiplied so."""
    with transformer(path, inputs) as model:
        exact = inputs.outputs(model)
        added = {}
        for kind in KINDS:
            with _in_int8(model, _rotated, (kind,)):
                added[kind] = math.sqrt(mean_square(inputs.outputs(model), exact))
    print("kinds", added, flush=True)
    return added


def measure_full_width(folder: Path) -> dict[str, float]:
    """What int8 adds to AuraFlow of 1 double and 1 single layer of random weights, by type."""
    inputs, added = Inputs(Noise(timesteps=(0.9, 0.5, 0.1))), {}
    for kind in PICTURED:
        path = folder / f"wide-{kind}.gguf"
        make_packed_auraflow(path, recipe_for("BF16", [f"*_layers.*={kind}"]), 1, 1)
        with transformer(path, inputs) as model:
            exact = inputs.outputs(model)
            with _in_int8(model, _rotated):
                added[kind] = math.sqrt(mean_square(inputs.outputs(model), exact))
    print("full width", added, flush=True)
    return added


def pictures(folder: Path, trained: Path, output: Path, inputs: Inputs) -> dict[str, list[torch.Tensor]]:
    """Pictures of the model's prompts: of full precision, and of two types exactly and in int8."""
    prompts, columns = Prompts(folder), {}
    with transformer(trained, inputs) as model:
        columns["full precision"] = sampled(model, prompts, inputs)
    for kind in PICTURED:
        with transformer(output / f"trained-{kind}.gguf", inputs) as model:
            columns[f"{kind}, exact"] = sampled(model, prompts, inputs)
            with _in_int8(model, _rotated):
                columns[f"{kind}, int8"] = sampled(model, prompts, inputs)
    return columns


def _errors(path: Path, inputs: Inputs, reference: list[torch.Tensor]) -> dict[str, float]:
    with transformer(path, inputs) as model:
        exact = inputs.outputs(model)
        with _in_int8(model, _rotated):
            rotated = inputs.outputs(model)
        with _in_int8(model, _plain):
            plain = inputs.outputs(model)
    errors = {
        "own": mean_square(exact, reference),
        "adds_plain": mean_square(plain, exact),
        "adds_rotated": mean_square(rotated, exact),
        "total_rotated": mean_square(rotated, reference),
    }
    return {name: math.sqrt(value) for name, value in errors.items()}


@contextmanager
def _in_int8(model: torch.nn.Module, product: Callable, kinds: tuple[str, ...] = IN_INT8) -> Iterator[None]:
    """Has the linears of some kinds multiply by ``product(linear, its input's weight)``, any number of rows."""
    endings = tuple(ending for kind in kinds for ending in KINDS[kind])
    changed = []
    for name, module in model.named_modules():
        in_a_layer = ".ff" in name or ".attn" in name
        listed = name.endswith(endings) and (in_a_layer or not {"linear_1", "linear_2"} >= {name.rpartition(".")[2]})
        if "time_step_proj" in name and "embedders and final" in kinds:
            listed = True
        if listed and isinstance(module, PackedLinear):
            before = name.replace("out_projection", "linear_2")
            module.forward = product(module, model.get_submodule(before) if before != name else None)
            changed.append(module)
    if not changed:
        raise ValueError(f"None of the model's packed linears is one of {', '.join(kinds)}.")
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _rotated(linear: PackedLinear, before: PackedLinear | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """As `int8.linear_on_cpu` without int8 products, but for the weight, which is turned once and not in every use."""
    packed, quant_type, smoothing = linear.packed, linear.quant_type, None
    if before:
        sizes, _ = int8.norms(before.packed, before.quant_type)
        smoothing = int8.smoothing_of(sizes, int8.norms(packed, quant_type)[1])
    scales = int8.row_scales(packed, quant_type, smoothing)
    weight = int8.int8_weight(packed, quant_type, scales, smoothing).float()
    return _product(linear, weight, scales, lambda rows: int8.rotated(int8.smoothed(rows, smoothing)))


def _plain(linear: PackedLinear, before: PackedLinear | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same without rotation and smoothing."""
    weight = linear.weight.dequantize().clone()
    scales = int8.scales_of(weight)
    return _product(linear, int8.rounded_(weight, scales), scales, torch.clone)


def _product(
    linear: PackedLinear, weight: torch.Tensor, scales: torch.Tensor, turned: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    def product(input: torch.Tensor) -> torch.Tensor:
        rows = turned(input.reshape(-1, input.shape[-1]))
        row_scales = int8.scales_of(rows)
        out = (int8.rounded_(rows, row_scales) @ weight.T).mul_(row_scales[:, None] * scales)
        out = out if linear.bias is None else out + linear.bias
        return out.view(*input.shape[:-1], -1)

    return product


def table(results: dict) -> str:
    """The rows as Markdown."""
    lines = [
        "| weights | their own error | int8 adds, plain | int8 adds, rotated | all in all | "
        "outliers: own | int8 adds, plain | rotated and smoothed | all in all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("own", "adds_plain", "adds_rotated", "total_rotated")
    rows = {part: results.get(part, {}) for part in ("trained", "outliers", "kinds")}
    for kind in (kind for kind in TYPES if kind in rows["trained"] and kind in rows["outliers"]):
        cells = [f"{rows[part][kind][name]:.4f}" for part in ("trained", "outliers") for name in names]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", "| kind, alone in int8 | int8 adds |", "|---|---|"]
    lines += [f"| {kind} | {error:.4f} |" for kind, error in rows["kinds"].items()]
    return "\n".join(lines)
