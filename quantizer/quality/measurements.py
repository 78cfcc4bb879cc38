"""What quantizing each group of weights does to the transformer's output, measured once and kept beside the target.

The file is JSON, written anew, whole, after each measurement::

    {"version": 1, "key": "<sha256>", "about": {…},
     "errors":  {"<group>": {"<type>": <mean square of the output's relative error>, …}, …},
     "rulers":  {"<group>": {"<type>": <relative square error of the weights themselves>, …}, …},
     "files":   {"<recipe>": <mean square of the output's relative error, of the part that is held back>, …}}

Its name ends with the first digits of the key, which is made of what the numbers depend on: the checkpoint's bytes, the
inputs, the importance matrix, and how it is computed. What differs in one of them has another file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...loader.files.errors import ModelFileError
from ..checkpoints import Checkpoint
from ..writer import whole_file

VERSION = 1
PLACES, PLACE_BYTES = 1024, 4096  # of a file that its fingerprint is made of


@dataclass
class Measurements:
    """The file's content; see the module's text.

    Attributes:
        path: where it is kept.
        key: what the numbers depend on, as SHA-256 in hex.
        about: the same in words.
        errors, rulers, files: the numbers.
    """

    path: Path
    key: str
    about: dict[str, object]
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    rulers: dict[str, dict[str, float]] = field(default_factory=dict)
    files: dict[str, float] = field(default_factory=dict)

    def save(self) -> None:
        """Write the file, whole or not at all; errors are those of `whole_file`."""
        values = {"version": VERSION, "key": self.key, "about": self.about}
        values |= {"errors": self.errors, "rulers": self.rulers, "files": self.files}
        text = json.dumps(values, indent=1).encode()
        with whole_file(self.path, len(text), overwrite=True) as file:
            file.write(text)


def kept_measurements(
    checkpoint: Checkpoint,
    name: str,
    folder: Path,
    depends_on: Mapping[str, object],
    about: Mapping[str, object] | None = None,
) -> Measurements:
    """The measurements in ``folder`` that were made of a checkpoint under the same conditions, or none yet.

    Args:
        checkpoint: of which they are.
        name: the model's, with which the file's name begins; an older file may have another one.
        folder: the target's.
        depends_on: what the numbers depend on besides the checkpoint's bytes; JSON.
        about: what else is said of them there, such as names.

    Raises:
        ModelFileError: the file there is damaged.
    """
    depends = {"version": VERSION, "checkpoint": content_fingerprint(checkpoint.files), **depends_on}
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    end = f".{key[:8]}.fit.json"
    about = {"model": name, **(about or {}), **depends_on}
    path = min(folder.glob(f"*{end}"), default=None)
    if path is None:
        return Measurements(folder / f"{name}{end}", key, about)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sound = values["version"] == VERSION and values["key"] == key
        tables = [values[name] for name in ("errors", "rulers")]
        numbers = [number for table in tables for row in table.values() for number in row.values()]
        numbers += values["files"].values()
        if not sound or not all(isinstance(number, float) and 0 <= number < math.inf for number in numbers):
            raise ValueError("other content")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(
            path,
            found="a damaged file",
            expected="the measurements that fit keeps",
            advice="Delete it: they are made again.",
        ) from error
    return Measurements(path, key, about, values["errors"], values["rulers"], values["files"])


def content_fingerprint(files: Iterable[str]) -> str:
    """SHA-256, in hex, of the sizes of files and of what stands at `PLACES` places evenly over each.

    A checkpoint's header does not tell two fine-tunes apart, and to read all of it takes long.
    """
    digest = hashlib.sha256()
    for path in files:
        size = os.path.getsize(path)
        digest.update(repr(size).encode())
        with open(path, "rb") as file:
            for place in range(PLACES):
                file.seek(place * max(0, size - PLACE_BYTES) // (PLACES - 1))
                digest.update(file.read(PLACE_BYTES))
    return digest.hexdigest()
