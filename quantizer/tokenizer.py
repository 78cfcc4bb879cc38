"""The text encoder's tokenizer as llama.cpp's converter writes it into a GGUF file.

Pile-T5 has LLaMA's SentencePiece model, so llama.cpp calls it ``llama``. ComfyUI has a copy of its own and does not
read this one; llama.cpp cannot use a file without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..loader.files.errors import ModelFileError

PREFIX = "tokenizer."
TOKENS = "tokenizer.ggml.tokens"
_NAMES = ("tokenizer.model", "spiece.model")

# llama.cpp's enum llama_token_type
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
_UNUSED_SCORE = -10000.0
UNKNOWN_ID, PAD_ID, END_ID = 0, 1, 2


def find_tokenizer(source: str | os.PathLike) -> Path | None:
    """The SentencePiece model beside a checkpoint, or in the ``tokenizer`` folder of a diffusers model."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    candidates = (
        place / name for place in (folder, folder / "tokenizer", folder.parent / "tokenizer") for name in _NAMES
    )
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def carried_tokenizer(metadata: Mapping[str, object]) -> dict[str, object]:
    """The tokenizer that the metadata of a source hold, whole, or nothing."""
    if TOKENS not in metadata:
        return {}
    return {key: value for key, value in metadata.items() if key.startswith(PREFIX)}


def read_tokenizer(path: str | os.PathLike, size: int) -> dict[str, object]:
    """The metadata of a SentencePiece model.

    Args:
        path: the model.
        size: number of embeddings; the tokens that the model lacks are written as unused.

    Raises:
        ModelFileError: it is no SentencePiece model, or not Pile-T5's.
        ModuleNotFoundError: sentencepiece is not installed; ComfyUI needs it too.
    """
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Reading {os.path.basename(path)} needs sentencepiece: pip install sentencepiece", name="sentencepiece"
        ) from error

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
    except (OSError, RuntimeError) as error:
        raise _not_the_tokenizer(path, "what SentencePiece cannot read") from error
    pieces = model.get_piece_size()
    if (model.unk_id(), model.eos_id()) != (UNKNOWN_ID, END_ID) or not 0 < pieces <= size:
        raise _not_the_tokenizer(path, f"{pieces} pieces, of which {model.eos_id()} ends a text")
    unused = range(pieces, size)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        TOKENS: [*map(model.id_to_piece, range(pieces)), *(f"[PAD{index}]" for index in unused)],
        "tokenizer.ggml.scores": [*map(model.get_score, range(pieces)), *(_UNUSED_SCORE for _ in unused)],
        "tokenizer.ggml.token_type": [*(_type(model, index) for index in range(pieces)), *(_UNUSED for _ in unused)],
        "tokenizer.ggml.eos_token_id": END_ID,
        "tokenizer.ggml.unknown_token_id": UNKNOWN_ID,
        "tokenizer.ggml.padding_token_id": PAD_ID,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }


def _type(model, index: int) -> int:
    kinds = (
        (model.is_unknown, _UNKNOWN),
        (model.is_control, _CONTROL),
        (model.is_unused, _UNUSED),
        (model.is_byte, _BYTE),
    )
    return next((kind for holds, kind in kinds if holds(index)), _NORMAL)


def _not_the_tokenizer(path: str | os.PathLike, found: str) -> ModelFileError:
    return ModelFileError(
        path,
        found=found,
        expected="the SentencePiece model of Pile-T5",
        advice="Name its tokenizer.model (--tokenizer), or move this file away: ComfyUI needs none in the GGUF file.",
    )
