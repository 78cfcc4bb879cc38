"""What every part of ``dev.py gpu`` is told, how it takes times, and what it makes its weights of."""

from __future__ import annotations

import functools
import gc
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...loader.quant_types import QuantType
from ...tests.loader.quant_types.blocks import put_scales, random_blocks
from ..measure import side_by_side

BLOCKS = 4096  # different ones, of which a weight is put together


@dataclass(frozen=True)
class Setting:
    """What is measured, and where.

    Attributes:
        device: of everything.
        quick: whether sizes are tiny, to try the code and not the device.
        types: the quantization types.
        comfyui: the host's folder, or None.
    """

    device: torch.device
    quick: bool
    types: tuple[str, ...]
    comfyui: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def pairs(self) -> int:
        return 1 if self.quick else 5

    @property
    def batches(self) -> tuple[int, ...]:
        return (1,) if self.quick else (1, 2)


def in_processes(function: Callable, arguments: Iterable, setting: Setting, most: int = 4) -> Iterator:
    """``function(argument, setting)`` of each argument as it is done, in up to ``most`` processes: compilers take one
    core each. ``function`` is one of the pack's."""
    import dev

    with ProcessPoolExecutor(most, multiprocessing.get_context("spawn"), dev.register_pack) as pool:
        for done in as_completed([pool.submit(function, argument, setting) for argument in arguments]):
            yield done.result()


class LeftOut(Exception):
    """A part cannot be measured here; the message says why in a sentence."""


def random_packed(quant_type: QuantType, rows: int, columns: int, setting: Setting, seed: int = 0) -> torch.Tensor:
    """``(rows, row_bytes) uint8`` on the device: weights of the size that a trained model's have, 1/√columns."""
    blocks = _blocks(quant_type, columns).to(setting.device)
    generator = torch.Generator(setting.device).manual_seed(seed)
    count = rows * columns // quant_type.block_size
    chosen = torch.randint(BLOCKS, (count,), generator=generator, device=setting.device)
    return blocks[chosen].view(rows, -1)


@functools.cache
def _blocks(quant_type: QuantType, columns: int) -> torch.Tensor:
    random = np.random.default_rng(columns)
    blocks = random_blocks(quant_type.name, BLOCKS, seed=columns)
    if quant_type.name == "MXFP4":
        blocks[:, 0] = random.integers(118, 122, BLOCKS)
    elif quant_type.name == "NVFP4":
        blocks[:, :4] &= 0x1F
    else:
        scales = random.normal(0, 1, (2, BLOCKS))
        put_scales(quant_type.name, blocks, scales.astype(np.float16).view(np.uint16))
        scales /= quant_type.dequantize(torch.from_numpy(blocks)).std().item() * columns**0.5
        put_scales(quant_type.name, blocks, scales.astype(np.float16).view(np.uint16))
    return torch.from_numpy(blocks)


def milliseconds(run: Callable[[], object], setting: Setting) -> float:
    """The median by the device's own clock, with its cache emptied before each run; on a CPU by ours."""
    if setting.device.type == "cpu":
        return 1e3 * side_by_side(lambda: None, run, setting.pairs).subject_seconds
    from triton.testing import do_bench

    return do_bench(run, warmup=20, rep=100, return_mode="median")


def step_milliseconds(run: Callable[[], object], setting: Setting) -> float:
    """The same of something that takes long, by the wall clock, with the device's work done."""
    return 1e3 * side_by_side(lambda: None, run, setting.pairs).subject_seconds


def begin_memory(setting: Setting) -> None:
    """Gives back what nothing holds, and counts the peak from now on."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(setting: Setting) -> dict[str, int]:
    """``peak_bytes`` that torch had allocated at most, and ``device_bytes`` that are in use on the device by its own
    figure, those of other programs and of kept buffers among them; nothing on a CPU."""
    if setting.device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "device_bytes": total - free}
