"""The tensors of a checked file as a state dict: linears packed, everything else dense."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch

from ..files.architecture import NATIVE, Architecture
from ..files.errors import listed
from ..files.gguf_file import GGUFFile, open_gguf
from ..files.matching import Match, Source, match
from ..quant_types import STORED_DTYPES
from .layout import is_packed, pack

logger = logging.getLogger(__name__)

# Types that torch can hold as they are; a linear of one of them is packed all the same when the model
# computes in another, so that no dense copy is made when it is used.
DENSE_DTYPES = {**STORED_DTYPES, "F64": torch.float64}

# ComfyUI's dynamic VRAM loads weights of at most this many bytes whole, calls no weight function for them, and
# patches them itself, which a packed one does not take.
ALWAYS_LOADED_BYTES = 16 * 1024


def open_checked(
    path: str | os.PathLike, architecture: Architecture, fixed: Mapping[str, int] | None = None
) -> tuple[GGUFFile, Match]:
    """Open a GGUF file, and read its tensors as a model's: `open_gguf` and `match`, with their errors."""
    file = open_gguf(path)
    return file, match(architecture, file.shapes, metadata=file.metadata, path=file.path, fixed=fixed)


def log_skipped(matched: Match, path: str) -> None:
    """Say which tensors of a file are not loaded."""
    if matched.skipped:
        logger.info(
            "%s: %d tensors of other parts are left out: %s",
            os.path.basename(path),
            len(matched.skipped),
            listed(matched.skipped),
        )


def sizes_by_type(file: GGUFFile, matched: Match) -> str:
    """How much of the weights is of which type, the largest share first: ``Q4_K 600 MB, F32 1 MB``."""
    sizes: dict[str, int] = {}
    for source in matched.weights.values():
        info = file.tensors[source.name]
        sizes[info.type.name] = sizes.get(info.type.name, 0) + info.nbytes
    return ", ".join(f"{name} {size / 2**20:.0f} MB" for name, size in sorted(sizes.items(), key=lambda x: -x[1]))


def state_dict(file: GGUFFile, matched: Match, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights by native name, as views on the memory map wherever the bytes allow it.

    Args:
        file: the opened file.
        matched: what its tensors mean.
        dtype: the compute type, which packed weights show as theirs.

    Returns:
        Native name → tensor of its logical shape. Weights of linears and large embeddings are packed, or dense when
        they are stored in ``dtype``; bare parameters, biases, norms and other small weights are dense, in ``dtype``
        unless they are stored in another type that torch can hold.
    """
    return {name: _tensor(file, matched, name, source, dtype) for name, source in matched.weights.items()}


def _tensor(file: GGUFFile, matched: Match, name: str, source: Source, dtype: torch.dtype) -> torch.Tensor:
    row, _ = matched.architecture.find(name, NATIVE)
    quant_type = file.tensors[source.name].type
    stored = DENSE_DTYPES.get(quant_type.name)
    packed = file.packed(source.name)
    of_linear = name.endswith(".weight") and not row.dense
    if of_linear and stored != dtype and packed.nbytes > ALWAYS_LOADED_BYTES:
        weight = pack(packed, quant_type.name, source.shape, dtype)
    elif stored is not None and (stored == dtype or not of_linear):
        weight = packed.view(stored).reshape(source.shape)
    else:
        weight = quant_type.dequantize(packed.view(-1, quant_type.type_size), dtype).reshape(source.shape)
    return swap_row_halves(weight) if source.swap_halves else weight


def swap_row_halves(weight: torch.Tensor) -> torch.Tensor:
    """The second half of the rows first: a packed weight stays packed, for its rows are independent."""
    if is_packed(weight):
        return weight._copy_with(qdata=swap_row_halves(weight._qdata))
    return torch.cat(weight.chunk(2)[::-1])
