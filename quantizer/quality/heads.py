"""The number of attention heads, which no tensor's shape tells."""

from __future__ import annotations

import json
from pathlib import Path

from ...loader.files.auraflow import AURAFLOW, HEAD_COUNT_KEY
from ...loader.files.errors import ModelFileError, shown
from ..checkpoints import Checkpoint

CONFIG = "config.json"  # of a diffusers folder
CONFIG_CLASS = "AuraFlowTransformer2DModel"


def head_count(checkpoints: list[Checkpoint], hidden: int, given: int | None = None) -> int:
    """The number of heads of a model that one or several checkpoints hold.

    It is what the person says, what a GGUF file's annotation or diffusers' ``config.json`` beside the file says, or
    AuraFlow's own at AuraFlow's own width.

    Args:
        checkpoints: of the same model, each perhaps in another file and format.
        hidden: the model's hidden size.
        given: ``--heads``.

    Raises:
        ModelFileError: nothing says it, two things say different numbers, or the heads would not be of one width.
    """
    said = {checkpoint.path: said_by(checkpoint) for checkpoint in checkpoints}
    said = {path: count for path, count in said.items() if count is not None}
    path = next(iter(said), checkpoints[0].path)
    if given is None and not said and hidden == AURAFLOW.fixed["embedding_length"]:
        return AURAFLOW.fixed["head_count"]
    counts = {count for count in (given, *said.values()) if count is not None}
    if not counts:
        raise ModelFileError(
            path,
            found=f"a hidden size of {hidden}, and nothing that says the number of attention heads",
            expected=f"{HEAD_COUNT_KEY} in a GGUF file, or {CONFIG} of a diffusers folder beside the file",
            advice="No tensor's shape tells it: give it with --heads.",
        )
    if len(counts) > 1:
        raise ModelFileError(
            path,
            found=f"{said[path]} attention heads",
            expected=f"{given if given is not None else next(n for n in counts if n != said[path])}",
            advice="Leave --heads out, or compare files of the same model.",
        )
    (count,) = counts
    if count < 1 or hidden % count:
        raise ModelFileError(
            path,
            found=f"a hidden size of {hidden}",
            expected=f"a multiple of the {count} attention heads",
            advice="Give the model's own number with --heads.",
        )
    return count


def said_by(checkpoint: Checkpoint) -> int | None:
    """What a checkpoint, or the ``config.json`` beside it, says; None when they say nothing.

    Raises:
        ModelFileError: what they say is no number.
    """
    if HEAD_COUNT_KEY in checkpoint.metadata:
        return _number(checkpoint.metadata[HEAD_COUNT_KEY], checkpoint.path, HEAD_COUNT_KEY)
    if checkpoint.path.endswith(".gguf") or not checkpoint.files:
        return None
    config = Path(checkpoint.files[0]).with_name(CONFIG)
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("_class_name") != CONFIG_CLASS:
        return None
    return _number(values.get("num_attention_heads"), str(config), "num_attention_heads")


def _number(value: object, path: str, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ModelFileError(
        path,
        found=f"{key} = {shown(repr(value))}",
        expected="a number of attention heads",
        advice="The file was altered: download it again.",
    )
