"""The command ``auraflow-gguf``; also ``python cli.py`` from the pack's folder, without installing anything."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import re
import sys
import time
from pathlib import Path

OK, BAD_FILE, USAGE = 0, 1, 2  # exit codes; argparse exits with 2 itself
INTERRUPTED = 130

WORST = 10  # tensors that compare shows
MEASURED_TYPES = ("Q3_K", "Q4_K", "Q5_K", "Q6_K")  # of sensitivity
OPTIONAL = ("libgguf", "diffusers", "sentencepiece")  # packages that some commands need, and say so


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # code pages of Windows lack "…" and most files' names
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    from .loader.files.errors import ModelFileError

    try:
        return options.command(options, parser)
    except (ModelFileError, OSError) as error:
        print(f"auraflow-gguf: {error}", file=sys.stderr)
        return BAD_FILE
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nauraflow-gguf: interrupted; no unfinished file was left.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="auraflow-gguf",
        description="Make and examine GGUF files of AuraFlow and Pony V7 transformers, and of their text encoder.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="make a GGUF file from a checkpoint")
    convert.add_argument("source", help="safetensors file or index, diffusers folder, .ckpt, .pt or .gguf")
    convert.add_argument("target", help="the .gguf file to make")
    types = convert.add_mutually_exclusive_group(required=True)
    types.add_argument("--type", help="Q8_0, Q4_K_M, IQ4_XS, BF16, …; an unknown one lists them all")
    types.add_argument("--like", metavar="FILE", help="the types of this GGUF file, of the same model or a fine-tune")
    convert.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="PATTERN=TYPE",
        help="a type for the tensors that fit, before the recipe's: 'single_layers.*.mlp.c_proj=Q6_K'; repeatable",
    )
    convert.add_argument(
        "--part",
        choices=("transformer", "text_encoder"),
        help="what to convert of a source that has both; without it the transformer",
    )
    convert.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.model to write into a text encoder, if not beside the source"
    )
    convert.add_argument("--imatrix", metavar="FILE", help="an importance matrix: what the weights' errors matter")
    convert.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
    convert.set_defaults(command=_convert)

    inspect = commands.add_parser("inspect", help="say what a GGUF file holds")
    inspect.add_argument("file")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="check a GGUF file's structure and all of its numbers")
    verify.add_argument("file")
    verify.set_defaults(command=_verify)

    compare = commands.add_parser("compare", help="say how far two checkpoints are apart, weight by weight")
    compare.add_argument("a", metavar="A", help="the reference: anything that convert takes")
    compare.add_argument("b", metavar="B", help="the other, such as a GGUF file made from it")
    compare.add_argument("--forward", action="store_true", help="compare the outputs of the transformers too")
    compare.add_argument("--json", action="store_true", help="for programs")
    _add_inputs(compare)
    compare.set_defaults(command=_compare)

    sensitivity = commands.add_parser(
        "sensitivity", help="measure what quantizing each group of weights does to the transformer's output"
    )
    sensitivity.add_argument("model", metavar="MODEL", help="anything that convert takes, at best unquantized")
    sensitivity.add_argument(
        "--type", action="append", metavar="TYPE", help="a type to measure; repeatable; without it Q3_K to Q6_K"
    )
    sensitivity.add_argument("--json", action="store_true", help="for programs")
    _add_inputs(sensitivity)
    sensitivity.set_defaults(command=_sensitivity)

    fit = commands.add_parser(
        "fit", help="make the best GGUF file for a size, by measuring what each type does to each group of weights"
    )
    fit.add_argument("source", metavar="SOURCE", help="anything that convert takes, at best unquantized")
    fit.add_argument("target", metavar="TARGET", help="the .gguf file to make; what is measured is kept beside it")
    size = fit.add_mutually_exclusive_group(required=True)
    size.add_argument("--size", dest="file_size", metavar="SIZE", help="of the file, at most: 4.0GB, 3900MB, 3.7GiB")
    size.add_argument("--bits", type=float, help="a weight, all in all: 4.8")
    fit.add_argument("--imatrix", metavar="FILE", help="an importance matrix, to measure and to write with")
    fit.add_argument(
        "--quick", action="store_true", help="measure two types in place of four, on four evaluations at most"
    )
    fit.add_argument("--type", action="append", default=[], metavar="TYPE", help="may be chosen; without it all may be")
    fit.add_argument("--measure", action="append", default=[], metavar="TYPE", help="measure these types; repeatable")
    for name, which in (("--at-least", "fewer"), ("--at-most", "more")):
        fit.add_argument(
            name,
            action="append",
            default=[],
            metavar="PATTERN=TYPE",
            help=f"a group with weights that fit gets no {which} bits than that type has; repeatable",
        )
    fit.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
    fit.add_argument("--json", action="store_true", help="for programs")
    _add_inputs(fit, "--noise-size")
    fit.set_defaults(command=_fit)

    compile_ = commands.add_parser(
        "compile", help="compile what makes converting, and pictures on a CPU, faster; needs a C compiler"
    )
    compile_.set_defaults(command=_compile)

    migrate = commands.add_parser("migrate", help="take a workflow over from another pack's GGUF loaders")
    migrate.add_argument("workflow", metavar="WORKFLOW", help="a .json file of the editor, or in API format")
    migrate.add_argument("--output", metavar="FILE", help="the file to make; else WORKFLOW with -auraflow in its name")
    migrate.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="FOLDER",
        help="ComfyUI's models folder, if not above this one: nodes with other models' files in it stay; repeatable",
    )
    migrate.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    migrate.set_defaults(command=_migrate)
    return parser


def _add_inputs(parser: argparse.ArgumentParser, size: str = "--size") -> None:
    """Options for running the transformer; ``size`` is the one for the noise's."""
    parser.add_argument("--device", default="cpu", help="what it runs on: cpu, cuda, mps")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--heads", type=int, help="attention heads, where no file says it and the width is not AuraFlow's own"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="inputs collected while sampling; without it noise in place of them"
    )
    parser.add_argument(size, dest="size", type=int, default=32, help="of the noise: an eighth of the picture's pixels")
    parser.add_argument("--tokens", type=int, default=64, help="length of the noise in place of a text")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")


def _convert(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .quantizer.recipe import recipe_for

    try:
        recipe_for(options.type or "F32", options.tensor_type, imatrix=options.imatrix is not None)
    except ValueError as error:
        parser.error(str(error))
    from .quantizer.convert import convert

    with _ProgressLine() as progress:
        convert(
            options.source,
            options.target,
            options.type,
            like=options.like,
            overwrite=options.overwrite,
            tensor_types=options.tensor_type,
            imatrix=options.imatrix,
            part=options.part,
            tokenizer=options.tokenizer,
            progress=progress,
        )
    print(f"{options.target}: {Path(options.target).stat().st_size / 1e9:.2f} GB written.")
    return OK


def _inspect(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .quantizer.inspection import describe, report
    from .quantizer.quality.layers import layer_report, layers_of

    description, layers = describe(options.file), layers_of(options.file)
    if options.json:
        entries = dataclasses.asdict(description) | {"memory": description.memory}
        entries["layers"] = dataclasses.asdict(layers) if layers else None
        for group, entry in zip(description.groups, entries["groups"], strict=True):
            entry["bits_per_weight"] = round(group.bits_per_weight, 4)
        print(json.dumps(entries, indent=2))
        return OK

    print(report(description))
    if layers:
        print(layer_report(layers))
    return OK


def _verify(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .quantizer.inspection import verify

    with _ProgressLine() as progress:
        problems = verify(options.file, progress=progress)
    for problem in problems:
        print(problem)
    print(f"{options.file}: {'damaged' if problems else 'sound'}.")
    return BAD_FILE if problems else OK


def _compare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .quantizer.quality.comparison import compare

    inputs = None
    if options.forward:
        inputs = _inputs(options, parser)
        if options.calibration:
            inputs = dataclasses.replace(inputs, source=inputs.source.held_back())
        _say_inputs(inputs.source)
    with _ProgressLine() as progress:
        everything, differences = compare(options.a, options.b, progress=progress)
    report = {"all": dataclasses.asdict(everything), "tensors": [dataclasses.asdict(entry) for entry in differences]}
    if options.forward:
        from .quantizer.quality.evaluation import output_errors

        report["forward"] = output_errors(options.a, options.b, inputs)
    if options.json:
        # JSON has no NaN and no infinity, which are the errors of a weight that has one, or whose reference is zero
        print(json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None), indent=2))
        return OK

    print(f"{'':44}{'relative error':>15}{'cosine':>12}")
    for entry in (everything, *differences[:WORST]):
        print(f"{entry.name:44}{entry.relative_error:15.6f}{entry.cosine:12.8f}")
    if len(differences) > WORST:
        print(f"… and {len(differences) - WORST} tensors with less")
    for timestep, error in report.get("forward", {}).items():
        print(f"output at timestep {timestep}: relative error {error:.6f}")
    return OK


def _sensitivity(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .quantizer.quality.sensitivity import QUANT_TYPES, sensitivity
    from .quantizer.recipe import NEEDS_IMATRIX, RECIPES

    types = [name.upper() for name in options.type or MEASURED_TYPES]
    measurable = [name for name in RECIPES if name in QUANT_TYPES and name not in NEEDS_IMATRIX]
    for name in types:
        if name not in measurable:
            parser.error(f"{name} cannot be measured. These can: {', '.join(measurable)}.")
    inputs = _inputs(options, parser)
    inputs = dataclasses.replace(inputs, source=inputs.source.choosing())
    _say_inputs(inputs.source)
    with _ProgressLine() as progress:
        rows = sensitivity(options.model, types, inputs, progress=progress)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return OK
    print("Relative error of the output when only these weights have the type, and the MB that they then take")
    print(f"| weights quantized | millions | {' | '.join(types)} |")
    print("|---|---|" + "---|" * len(types))
    for row in rows:
        cells = (f"{row.errors[name]:.5f} ({row.nbytes[name] / 1e6:.1f})" for name in types)
        print(f"| {row.group} | {row.weights / 1e6:.1f} | {' | '.join(cells)} |")
    return OK


def _fit(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .loader.files.errors import ModelFileError
    from .quantizer.quality.fit import fit
    from .quantizer.quality.fitted import Wanted

    inputs = _inputs(options, parser)
    types = {name: tuple(map(str.upper, getattr(options, name))) for name in ("type", "measure")}
    wanted = Wanted(
        _bytes(options.file_size, parser),
        options.bits,
        types["type"],
        tuple(options.at_least),
        tuple(options.at_most),
    )
    with _ProgressLine() as progress:
        try:
            made = fit(
                options.source,
                options.target,
                wanted,
                inputs,
                imatrix=options.imatrix,
                measured=types["measure"],
                quick=options.quick,
                overwrite=options.overwrite,
                say=lambda line: print(line, file=sys.stderr, flush=True),
                progress=progress,
            )
        except ModelFileError:
            raise
        except ValueError as error:
            parser.error(str(error))
    if options.json:
        print(json.dumps(dataclasses.asdict(made), indent=2))
        return OK
    print(made.table(Path(options.target).name))
    return OK


def _bytes(text: str | None, parser: argparse.ArgumentParser) -> int | None:
    """A size such as 4.0GB or 3.7 GiB in bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if not found:
        parser.error(f"--size {text}: expected a number and a unit, such as 4.0GB, 3900MB or 3.7GiB.")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))


def _migrate(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .migration import REPLACEMENTS, migrate_file

    source = Path(options.workflow)
    target = Path(options.output) if options.output else source.with_stem(f"{source.stem}-auraflow")
    changes = migrate_file(source, target, overwrite=options.overwrite, models=options.models or _models_above())
    if not changes:
        print(f"{source}: none of {', '.join(REPLACEMENTS)} is in it; nothing was written.")
        return OK
    print(*changes, sep="\n")
    print(f"{target}: written.")
    return OK


def _models_above() -> list[Path]:
    """The models folder of the ComfyUI in whose custom_nodes this folder is."""
    around = Path(__file__).absolute().parent.parent
    return [around.parent / "models"] if around.name == "custom_nodes" else []


def _inputs(options: argparse.Namespace, parser: argparse.ArgumentParser):
    import torch

    from .quantizer.quality.calibration import read_calibration
    from .quantizer.quality.evaluation import Inputs
    from .quantizer.quality.inputs import Noise

    if options.size < 2 or options.size % 2:
        parser.error(f"{options.size}: a latent's size is even and at least 2.")
    if options.tokens < 1:
        parser.error(f"--tokens {options.tokens}: at least 1.")
    if options.heads is not None and options.heads < 1:
        parser.error(f"--heads {options.heads}: at least 1.")
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        parser.error(f"--device {options.device} cannot be used here: {str(error).splitlines()[0]}")
    source = (
        read_calibration(options.calibration)
        if options.calibration
        else Noise(size=options.size, tokens=options.tokens, seed=options.seed)
    )
    return Inputs(source, options.device, getattr(torch, options.dtype), options.heads)


def _say_inputs(source) -> None:
    """Say what the figures that follow are of, beside them and not among them."""
    print(f"The transformer runs on {source.about}.", file=sys.stderr)


def _compile(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .loader.kernels.native.build import BuildError, build

    try:
        for path in build():
            print(path)
    except BuildError as error:
        print(f"auraflow-gguf: {error}", file=sys.stderr)
        return BAD_FILE
    return OK


class _ProgressLine:
    """A line that is rewritten in place, on a terminal: called with how much is done, and of how much."""

    def __init__(self):
        self._shown = sys.stderr.isatty()
        self._start = time.monotonic()

    def __enter__(self):
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._shown:
            seconds = time.monotonic() - self._start
            bar = "#" * (30 * done // total)
            left = seconds * (total - done) / done
            print(f"\r[{bar:<30}] {100 * done // total:3d} %, {left:4.0f} s left ", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        if self._shown:
            print(file=sys.stderr)


def _register_pack() -> None:
    """Make this folder, whatever its name, importable as ``auraflow_gguf``."""
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "auraflow_gguf", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["auraflow_gguf"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    _register_pack()
    sys.exit(importlib.import_module("auraflow_gguf.cli").main())
