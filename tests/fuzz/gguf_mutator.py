"""A coverage-guided mutator of GGUF files, and the oracle that says what the reader may do with them.

An input is a list of fields (`gguf_fields`). Inputs that take the reader along a new pair of lines are kept and mutated
further. Everything follows from the seed.
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from auraflow_gguf.loader.files import gguf_file
from auraflow_gguf.loader.files.errors import ModelFileError
from auraflow_gguf.loader.files.gguf_file import GGUFFile, open_gguf
from auraflow_gguf.loader.quant_types import QUANT_TYPES

from ..loader.files.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    gguf_fields,
)

MAX_SECONDS = 1.0
MAX_EXTRA_BYTES = 64 << 20
PART_NAMES = ("fuzz-00001-of-00002.gguf", "fuzz-00002-of-00002.gguf")

Fields = list[bytes]


def seed_inputs() -> list[Fields]:
    """Valid files: two of each quantization type, and the first part of a split file."""
    seeds = []
    for index, quant_type in enumerate(QUANT_TYPES.values()):
        for version in (2, 3):
            alignment = (8, 32, 64)[index % 3]
            metadata = [
                ("general.architecture", STRING, "aura"),
                ("general.alignment", U32, alignment),
                ("aura.block_count", U64, 32),
                ("flag", BOOL, True),
                ("scale", F64, 0.5),
                ("words", ARRAY, (STRING, ["a", "", "ä"])),
                ("scores", ARRAY, (F32, [0.5, 1.5])),
                ("nested", ARRAY, (ARRAY, [(U8, [1, 2, 3]), (STRING, ["x"])])),
            ]
            tensors = [
                _tensor("single_layers.0.attn.w1q.weight", (quant_type.block_size, 2), quant_type),
                _tensor("positional_encoding", (quant_type.block_size, 1, 1), quant_type),
                _tensor("init_x_linear.bias", (16,), QUANT_TYPES["F32"]),
            ]
            seeds.append(gguf_fields(metadata, tensors, version=version, alignment=alignment))
    seeds.append(_part(0))
    return seeds


def _part(number: int) -> Fields:
    metadata = [("split.no", U16, number), ("split.count", U16, 2), ("split.tensors.count", I32, 2)]
    return gguf_fields(metadata, [_tensor(f"part{number}.weight", (32, 2), QUANT_TYPES["Q8_0"])])


def _tensor(name: str, sizes: Sequence[int], quant_type) -> Tensor:
    rows = 1
    for size in sizes[1:]:
        rows *= size
    return Tensor(name, sizes, quant_type.id, bytes(i % 251 for i in range(quant_type.row_bytes(sizes[0]) * rows)))


class Mutator:
    """Changes fields, each change a method that mends nothing: counts and lengths go wrong as they may."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.changes: tuple[Callable[[Fields, Fields], None], ...] = (
            self.set_number,
            self.set_number,
            self.flip_bit,
            self.set_byte,
            self.resize,
            self.drop,
            self.repeat,
            self.swap,
            self.splice,
            self.truncate,
        )

    def mutate(self, fields: Fields, other: Fields) -> Fields:
        """A copy of ``fields`` with one to four changes; ``other`` lends parts of itself."""
        changed = list(fields)
        for _ in range(self.rng.choice((1, 1, 1, 2, 3, 4))):
            self.rng.choice(self.changes)(changed, other)
        return changed

    def set_number(self, fields: Fields, _: Fields) -> None:
        places = [i for i, field in enumerate(fields) if len(field) in (4, 8)]
        if places:
            place = self.rng.choice(places)
            width = len(fields[place])
            fields[place] = self._number(int.from_bytes(fields[place], "little"), width).to_bytes(width, "little")

    def _number(self, old: int, width: int) -> int:
        bits = 8 * width
        new = self.rng.choice(
            (
                old + self.rng.choice((-32, -8, -1, 1, 8, 32)),
                self.rng.randrange(64),
                1 << self.rng.randrange(bits),
                (1 << self.rng.randrange(1, bits + 1)) - 1,
                -self.rng.randrange(1, 64),
                int.from_bytes(old.to_bytes(width, "little"), "big"),
            )
        )
        return new % (1 << bits)

    def flip_bit(self, fields: Fields, _: Fields) -> None:
        self._edit(fields, lambda old: old ^ (1 << self.rng.randrange(8)))

    def set_byte(self, fields: Fields, _: Fields) -> None:
        self._edit(fields, lambda old: self.rng.choice((0, 1, 0x7F, 0x80, 0xFF, self.rng.randrange(256))))

    def _edit(self, fields: Fields, change: Callable[[int], int]) -> None:
        places = [i for i, field in enumerate(fields) if field]
        if places:
            place = self.rng.choice(places)
            field = bytearray(fields[place])
            position = self.rng.randrange(len(field))
            field[position] = change(field[position])
            fields[place] = bytes(field)

    def resize(self, fields: Fields, _: Fields) -> None:
        place = self.rng.randrange(len(fields))
        size = self.rng.choice((0, len(fields[place]) // 2, len(fields[place]) + 1, self.rng.randrange(300)))
        fields[place] = (fields[place] + self.rng.randbytes(size))[:size]

    def drop(self, fields: Fields, _: Fields) -> None:
        if len(fields) > 1:
            start = self.rng.randrange(len(fields))
            del fields[start : min(start + self.rng.randrange(1, 4), start + len(fields) - 1)]

    def repeat(self, fields: Fields, _: Fields) -> None:
        start = self.rng.randrange(len(fields))
        run = fields[start : start + self.rng.randrange(1, 6)]
        if len(fields) < 300:
            fields[start:start] = run * self.rng.choice((1, 1, 2, 20))

    def swap(self, fields: Fields, _: Fields) -> None:
        a, b = self.rng.randrange(len(fields)), self.rng.randrange(len(fields))
        fields[a], fields[b] = fields[b], fields[a]

    def splice(self, fields: Fields, other: Fields) -> None:
        start = self.rng.randrange(len(other))
        run = other[start : start + self.rng.randrange(1, 8)]
        place = self.rng.randrange(len(fields))
        fields[place : place + self.rng.choice((0, len(run)))] = run

    def truncate(self, fields: Fields, _: Fields) -> None:
        place = self.rng.randrange(len(fields))
        kept = fields[place][: self.rng.randrange(len(fields[place]) + 1)]
        fields[place:] = [kept]


@dataclass
class Report:
    """What a run came to: inputs by outcome, line pairs reached in the reader, the worst input's time and memory."""

    opened: int = 0
    refused: int = 0
    line_pairs: int = 0
    slowest_seconds: float = 0.0
    most_extra_bytes: int = 0


def fuzz(inputs: int, seed: int, folder: Path) -> Report:
    """Give the reader ``inputs`` mutated files, one after the other, all under the same name in ``folder``.

    Raises:
        AssertionError: when the oracle objects; the file is still there.
    """
    rng = random.Random(seed)
    mutator = Mutator(rng)
    corpus = seed_inputs()
    (folder / PART_NAMES[1]).write_bytes(b"".join(_part(1)))
    path = folder / PART_NAMES[0]
    path.touch()
    report = Report()
    reached: set[tuple[int, int]] = set()
    with traced_memory():
        for fields in corpus:
            write(path, fields)
            with _line_pairs(reached):
                assert check(path, report), f"a valid file is refused: {path}"
        for _ in range(inputs):
            fields = mutator.mutate(rng.choice(corpus), rng.choice(corpus))
            write(path, fields)
            before = len(reached)
            with _line_pairs(reached):
                check(path, report)
            if len(reached) > before:
                corpus.append(fields)
    report.line_pairs = len(reached)
    return report


def write(path: Path, fields: Fields) -> None:
    """Overwrite a file in place: emptying it first would cost milliseconds on some file systems."""
    with open(path, "r+b") as file:
        file.writelines(fields)
        file.truncate()


def check(path: Path, report: Report) -> bool:
    """Whether the reader opens a file; anything but a right result or a `ModelFileError` is an error here.

    Runs within `traced_memory`, on a file named as the first of `PART_NAMES`.

    Raises:
        AssertionError: when the result is wrong, or came with too much time or memory.
        Exception: whatever the reader lets out.
    """
    tracemalloc.reset_peak()
    memory_before, _ = tracemalloc.get_traced_memory()
    started = time.process_time()
    refusal = None
    try:
        file = open_gguf(path)
        for value in file.metadata.values():
            _decode(value)
    except ModelFileError as error:
        refusal = str(error)
    seconds = time.process_time() - started
    extra = tracemalloc.get_traced_memory()[1] - memory_before - path.stat().st_size
    assert seconds < MAX_SECONDS, f"{seconds:.2f} s for {path}"
    assert extra < MAX_EXTRA_BYTES, f"{extra:,} bytes beyond the file's own for {path}"
    if refusal is None:
        _check_tensors(file, path.parent)
        report.opened += 1
    else:
        assert refusal.isprintable(), refusal
        assert refusal.endswith("."), refusal
        assert len(refusal) < 1000, refusal
        report.refused += 1
    report.slowest_seconds = max(report.slowest_seconds, seconds)
    report.most_extra_bytes = max(report.most_extra_bytes, extra)
    return refusal is None


def _decode(value: object) -> None:
    if not isinstance(value, (int, float, str)):
        for element in value:
            _decode(element)


def _check_tensors(file: GGUFFile, folder: Path) -> None:
    extents = []
    for name, info in file.tensors.items():
        elements = 1
        for size in info.shape:
            elements *= size
        assert info.shape[-1] % info.type.block_size == 0
        assert info.nbytes == elements // info.type.block_size * info.type.type_size
        content = (folder / PART_NAMES[info.part]).read_bytes()
        assert info.offset + info.nbytes <= len(content)
        assert file.packed(name).numpy().tobytes() == content[info.offset : info.offset + info.nbytes]
        extents.append((info.part, info.offset, info.offset + info.nbytes))
    for (part, _, end), (next_part, start, _) in pairwise(sorted(extents)):
        assert part != next_part or end <= start


@contextmanager
def traced_memory() -> Iterator[None]:
    """Count the memory that Python allocates, which `check` compares with its limit."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@contextmanager
def _line_pairs(reached: set[tuple[int, int]]) -> Iterator[None]:
    """Add each pair of lines of the reader that run one after the other."""
    last = 0

    def on_line(frame, event, _argument):
        nonlocal last
        if event == "line":
            reached.add((last, frame.f_lineno))
            last = frame.f_lineno
        return on_line

    def on_call(frame, _event, _argument):
        return on_line if frame.f_code.co_filename == gguf_file.__file__ else None

    previous = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(previous)
