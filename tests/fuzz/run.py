"""``dev.py fuzz``: a long run of the fuzzers.

One input in ten is a structured one by hypothesis, the others are mutations.
"""

import argparse
import tempfile
import time
from pathlib import Path

from hypothesis import given, seed, settings

from ...devtools.hosts import Host
from .gguf_mutator import PART_NAMES, Report, check, fuzz, traced_memory
from .gguf_structured import lies


def main(options: argparse.Namespace, hosts: list[Host]) -> int:
    folder = Path(tempfile.mkdtemp(prefix="gguf-fuzz-"))
    print(f"the file being read is {folder / PART_NAMES[0]}", flush=True)
    structured = options.inputs // 10
    started = time.monotonic()
    print(f"mutated: {fuzz(options.inputs - structured, options.seed, folder)}", flush=True)
    print(f"structured: {fuzz_structured(structured, options.seed, folder)}")
    print(f"{options.inputs:,} inputs in {time.monotonic() - started:.0f} s")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return 0


def fuzz_structured(inputs: int, first: int, folder: Path) -> Report:
    report = Report()
    path = folder / PART_NAMES[0]

    @seed(first)
    @settings(max_examples=inputs, deadline=None, database=None)
    @given(content=lies())
    def run(content: bytes) -> None:
        path.write_bytes(content)
        with traced_memory():
            check(path, report)

    run()
    return report
