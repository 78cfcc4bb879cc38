"""The simulated accelerator in Python: ``torch.simulated``, with the names that ``torch.cuda`` has for the same.

``load`` builds it and gives it to PyTorch, as its device of the type "simulated"; it stays until the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch

from .build import build

NAME = "simulated"
DEVICES = 2

OutOfMemoryError = torch.OutOfMemoryError

_library: ctypes.CDLL | None = None


class Counters(NamedTuple):
    """What a device holds and has moved, in bytes.

    Attributes:
        limit: how much it has.
        allocated, peak: how much is in use, and was at most since `reset`.
        blocks: how many pieces are in use.
        to_device, to_host, between: copied since `reset` from main memory, to it, and from another device.
    """

    limit: int
    allocated: int
    peak: int
    blocks: int
    to_device: int
    to_host: int
    between: int


def load() -> None:
    """Makes ``torch.device("simulated")`` and ``torch.simulated``.

    Raises:
        NoCompiler, RuntimeError: see `build.build`.
    """
    global _library
    if _library is not None:
        return
    path = build()
    torch.ops.load_library(path)
    _library = ctypes.CDLL(str(path))
    _library.simulated_pin.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _library.simulated_unpin.argtypes = [ctypes.c_void_p]
    _library.simulated_reserve.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t]
    _library.simulated_reserve.restype = ctypes.c_size_t
    _library.simulated_back.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    _library.simulated_set_limit.argtypes = [ctypes.c_int, ctypes.c_int64]
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, sys.modules[__name__])
    _library.simulated_register()


def counters(device: int = 0) -> Counters:
    values = (ctypes.c_int64 * len(Counters._fields))()
    _library.simulated_counters(device, values)
    return Counters(*values)


def reset(device: int = 0) -> None:
    """The peak becomes what is in use, and the copied bytes 0."""
    _library.simulated_reset(device)


@contextlib.contextmanager
def limited(size: int, device: int = 0) -> Iterator[None]:
    """The device has ``size`` bytes as long as the context lasts."""
    before = counters(device).limit
    _library.simulated_set_limit(device, size)
    try:
        yield
    finally:
        _library.simulated_set_limit(device, before)


def set_limit(size: int, device: int = 0) -> None:
    _library.simulated_set_limit(device, size)


def reserve(device: int, size: int, page: int) -> int:
    """Addresses for ``size`` bytes, which `back` gives memory to; ``torch.ops.simulated.at_address`` makes tensors.

    They are never given to anyone else, so that a tensor of them is found when it is used too late.
    """
    if address := _library.simulated_reserve(device, size, page):
        return address
    raise MemoryError(f"no addresses for {size} bytes")


def back(address: int, page: int, backed: bool) -> bool:
    """Gives a page of reserved addresses memory, or takes it away; False where the device has none left."""
    return bool(_library.simulated_back(address, page, int(backed)))


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def device_count() -> int:
    return DEVICES


def current_device() -> int:
    return _library.simulated_current_device()


def set_device(device: torch.device | int) -> None:
    _library.simulated_set_device(_index(device))


class Stream(torch.Stream):
    """A stream of a device; ``with`` makes it the current one."""

    def __new__(cls, device: torch.device | int | None = None, priority: int = 0, **kwargs):
        if not kwargs:
            kwargs = {"device": torch.device(NAME, current_device() if device is None else _index(device))}
        return super().__new__(cls, priority=priority, **kwargs)


def current_stream(device: torch.device | int | None = None) -> torch.Stream:
    return torch.accelerator.current_stream(None if device is None else torch.device(NAME, _index(device)))


def stream(stream: torch.Stream | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if stream is None else stream


def synchronize(device: torch.device | int | None = None) -> None:
    torch.accelerator.synchronize(None if device is None else torch.device(NAME, _index(device)))


def empty_cache() -> None:
    """Nothing is cached."""


def ipc_collect() -> None:
    """Nothing is shared with other processes."""


def mem_get_info(device: torch.device | int | None = None) -> tuple[int, int]:
    """The free and all bytes."""
    now = counters(_index(device))
    return now.limit - now.allocated, now.limit


def memory_stats(device: torch.device | int | None = None) -> dict[str, int]:
    allocated = counters(_index(device)).allocated
    return {"active_bytes.all.current": allocated, "reserved_bytes.all.current": allocated}


def get_device_properties(device: torch.device | int | None = None) -> SimpleNamespace:
    """Those of an NVIDIA card that has both 16-bit types and no 8-bit or 4-bit ones."""
    return SimpleNamespace(name=NAME, major=8, minor=6, total_memory=counters(_index(device)).limit)


def get_device_name(device: torch.device | int | None = None) -> str:
    return NAME


def get_allocator_backend() -> str:
    return NAME


def is_bf16_supported() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def manual_seed_all(seed: int) -> None:
    """Random numbers come from the CPU's generator."""


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


class _Runtime:
    """The two functions of CUDA's runtime that page-lock memory."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        _library.simulated_pin(address, size)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if _library.simulated_unpin(address) else 1


def cudart() -> _Runtime:
    return _Runtime()


def _index(device: torch.device | int | None) -> int:
    index = device if isinstance(device, int) else getattr(device, "index", None)
    return current_device() if index is None else index
