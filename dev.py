"""Set-up commands for developers: ``python dev.py demo``, ``python dev.py test``.

Runs on any Python from 3.10 without anything installed. A command first finds ComfyUI and makes (or finds again) a
virtual environment in a cache folder, then runs itself once more inside that environment.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent

INSIDE = "--inside-environment"
"""The first argument of the second run."""

USAGE = """\
usage: python dev.py COMMAND [arguments]

  demo    make an image from a GGUF file in a real ComfyUI; --help lists its options
  test    run the tests, all tiers; --tier NAME picks some, --newest runs those that depend on other projects with
          their newest releases, arguments after -- go to pytest
  bench   measure speed and memory beside dense weights, for the README; --help lists its options
  gpu     try and measure the GPU of this machine; --here does it without ComfyUI and an environment
  assets  write the templates, translations and pictures that follow from the nodes
  fuzz    feed damaged GGUF files to the reader; --help lists its options

COMFYUI_PATH names the ComfyUI to use, AURAFLOW_GGUF_EXTRA_HOSTS further ones to test in,
AURAFLOW_GGUF_CACHE the folder for the environment and the models.
"""


COMMANDS = {
    "demo": "auraflow_gguf.devtools.demo",
    "test": "auraflow_gguf.devtools.tiers",
    "bench": "auraflow_gguf.benchmarks.run",
    "gpu": "auraflow_gguf.benchmarks.gpu.run",
    "assets": "auraflow_gguf.devtools.assets",
    "fuzz": "auraflow_gguf.tests.fuzz.run",
}
"""The module whose ``main(options, hosts)`` a command is."""


def register_pack() -> None:
    """Makes the pack importable as ``auraflow_gguf``, whatever its folder is called."""
    spec = importlib.util.spec_from_file_location(
        "auraflow_gguf", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["auraflow_gguf"] = module
    spec.loader.exec_module(module)


def compile_native() -> None:
    """The C for CPUs; where there is no compiler for it, everything does without."""
    from auraflow_gguf.loader.kernels.native import build

    try:
        build.build()
    except build.BuildError as error:
        print(f"without the C for CPUs: {error}")


def main(argv: list[str]) -> int:
    inside = argv[:1] == [INSIDE]
    command, *arguments = argv[inside:] or ["--help"]
    if command not in COMMANDS:
        print(USAGE)
        return 0 if command in ("-h", "--help") else 2
    register_pack()
    from auraflow_gguf.devtools import cache, environment, hosts
    from auraflow_gguf.devtools.arguments import parse

    options = parse(command, arguments)
    inside = inside or getattr(options, "here", False)
    try:
        found = hosts.find_hosts(ROOT, clone=not inside)
        if inside:
            compile_native()
            return importlib.import_module(COMMANDS[command]).main(options, found)
        python = environment.ensure(ROOT, hosts.newest(found), newest=getattr(options, "newest", False))
    except (hosts.HostError, environment.SetUpError) as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    process = subprocess.Popen(
        [str(python), str(ROOT / "dev.py"), INSIDE, command, *arguments],
        env={**os.environ, **cache.bytecode_variables()},
    )
    while True:
        # Ctrl-C reaches the second run too, which cleans up and ends by itself.
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 (pip did not check it here)
        sys.exit("dev.py needs Python 3.10 or newer")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
