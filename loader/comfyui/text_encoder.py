"""A GGUF file as a CLIP of ComfyUI: AuraFlow's text encoder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from types import SimpleNamespace

import comfy.sd
import torch
from comfy.text_encoders.aura_t5 import AuraT5Model, AuraT5Tokenizer

from ..files.errors import ModelFileError
from ..files.pile_t5 import PILE_T5_XL, STACK
from ..weights.state_dict import log_skipped, open_checked, sizes_by_type, state_dict
from .file_reader import readable
from .ops import GGUFOps
from .patcher import GGUFModelPatcher, GGUFModelPatcherDynamic, for_packed_weights

logger = logging.getLogger(__name__)

# ComfyUI computes text encoders in float32, whatever their weights are stored in.
COMPUTE_DTYPE = torch.float32


class GGUFCLIP(comfy.sd.CLIP):
    """A CLIP of packed weights: ComfyUI's, except that a saved one is dense and has its patches."""

    def clone(self, *args, **kwargs) -> GGUFCLIP:
        clone = super().clone(*args, **kwargs)
        clone.__class__ = GGUFCLIP  # ComfyUI names its class itself
        clone.cond_stage_model = clone.patcher.model  # a new one for hooks, where dynamic VRAM is on
        return clone

    def get_sd(self) -> dict[str, torch.Tensor]:
        return self.patcher.dense_state_dict() | self.tokenizer.state_dict()

    def state_dict_for_saving(self) -> dict[str, torch.Tensor]:
        return self.get_sd()


def load_text_encoder(
    path: str | os.PathLike,
    embedding_directory: str | list[str] | None = None,
    disable_dynamic: bool = False,
    *,
    fixed: Mapping[str, int] | None = None,
) -> GGUFCLIP:
    """Load AuraFlow's text encoder, Pile-T5-XL.

    Args:
        path: a GGUF file, in any spelling and of any quantization types.
        embedding_directory: where ComfyUI's tokenizer looks for textual inversions.
        disable_dynamic: use ComfyUI's static patcher, also where dynamic VRAM is on.
        fixed: passed to `match`, for an encoder of another number of layers.

    Returns:
        A CLIP with ComfyUI's own tokenizer; the packed weights are views on the memory-mapped file.

    Raises:
        ModelFileError: the file is broken, no Pile-T5-XL, or of another vocabulary than the tokenizer.
    """
    file, matched = open_checked(path, PILE_T5_XL, fixed)
    log_skipped(matched, file.path)
    weights = readable(state_dict(file, matched, COMPUTE_DTYPE), file, matched, disable_dynamic)
    clip = GGUFCLIP(
        SimpleNamespace(params={}, clip=AuraT5Model, tokenizer=AuraT5Tokenizer),
        embedding_directory=embedding_directory,
        parameters=sum(weight.numel() for weight in weights.values()),
        state_dict=[weights],
        model_options={
            "dtype": COMPUTE_DTYPE,
            "custom_operations": GGUFOps,
            "pile_t5xl_model_config": {"num_layers": matched.dimensions[STACK]},
            "initial_device": torch.device("cpu"),
        },
        disable_dynamic=disable_dynamic,
    )
    pieces = len(clip.tokenizer.clip_pile_t5xl.tokenizer.get_vocab())
    if pieces > matched.dimensions["vocabulary_size"]:
        raise ModelFileError(
            path,
            found=f"embeddings of {matched.dimensions['vocabulary_size']} tokens",
            expected=f"one for each of the tokenizer's {pieces}",
            advice="The file is of another vocabulary: use a file of Pile-T5-XL.",
        )
    clip.patcher = for_packed_weights(clip.patcher)
    clip.patcher.cached_patcher_init = (_load_patcher, (os.fspath(path), embedding_directory))
    logger.info(
        "%s: Pile-T5-XL of %d layers, %s",
        os.path.basename(file.path),
        matched.dimensions[STACK],
        sizes_by_type(file, matched),
    )
    return clip


def _load_patcher(
    path: str, embedding_directory: str | list[str] | None, disable_dynamic: bool = False
) -> GGUFModelPatcher | GGUFModelPatcherDynamic:
    return load_text_encoder(path, embedding_directory, disable_dynamic).patcher
