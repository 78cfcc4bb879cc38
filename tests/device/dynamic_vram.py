"""comfy-aimdo on the simulated accelerator: dynamic VRAM, with memory that is taken away at random.

comfy-aimdo's Python (ModelVBAR, VRAMBuffer, HostBuffer, ModelMMAP) runs as it is. What it calls is a library for CUDA
and ROCm, and is replaced by `Library`, function by function, with the signatures that comfy-aimdo declares. So is
``comfy_aimdo.torch.get_tensor_from_raw_ptr``, which makes tensors by CUDA's array interface.

The real library takes pages of weights away when another program or PyTorch wants their memory, at any time when they
are not pinned. This one does it by chance, before pages are asked for: weights disappear between any two layers, and
an operator that still uses them fails (``simulated/memory.cpp``).

The host's dynamic patcher also moves a model's bare parameters by ``parameter.data = …``, which PyTorch allows from
CPUs to CUDA, and not to a device that it does not know. Meanwhile the assignment is made another way: see `_set_data`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import comfy.memory_management
import comfy.model_patcher
import comfy_aimdo.control
import comfy_aimdo.host_buffer
import comfy_aimdo.model_mmap
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import comfy_aimdo.vram_buffer
import torch

from . import host_on_device
from .simulated import accelerator

PAGE = 32 << 20  # comfy-aimdo's VBAR_PAGE_SIZE; smaller ones do as long as no weight needs more than two
CHUNK = 16 << 20  # by which its VRAMBuffer grows
SEED = 5


@dataclass
class Weights:
    """A ModelVBAR: addresses for a model's weights, whose pages come and go."""

    device: int
    base: int
    page: int  # bytes
    pages: int
    backed: dict[int, int] = field(default_factory=dict)  # page → the number of the time that it got memory
    pinned: Counter = field(default_factory=Counter)  # page → how often
    watermark: int = 0  # pages from here on are not loaded

    def drop(self, page: int) -> None:
        accelerator.back(self.base, page, False)
        del self.backed[page]

    def pages_of(self, offset: int, size: int) -> range:
        return range(offset // self.page, -(-(offset + size) // self.page))

    @property
    def droppable(self) -> list[int]:
        return [page for page in sorted(self.backed) if not self.pinned[page]]


class Library:
    """The functions of comfy-aimdo's library that its Python calls.

    Attributes:
        chance: of a page being taken away when a layer asks for its weights.
        page: bytes of a page of the models that come next.
        room: bytes that the weights of one model may take on the device; None: as many as there are.
        read: bytes that were read of files.
        faults, evictions: how often pages got memory, and lost it by chance.
    """

    def __init__(self):
        self.random = random.Random(SEED)
        self.chance = 0.0
        self.page = PAGE
        self.room: int | None = None
        self.read = 0
        self.faults = self.evictions = 0
        self._objects: dict[int, object] = {}
        self._next = 1
        self._weights: dict[int, Weights] = {}

    def _keep(self, thing: object) -> int:
        self._next += 1
        self._objects[self._next] = thing
        return self._next

    # control

    def get_devctx(self, device: int) -> int:
        return device + 1

    def get_total_vram_usage(self, context: int) -> int:
        return sum(len(w.backed) * w.page for w in self._weights.values() if w.device == context - 1)

    def aimdo_analyze(self, context: int) -> None:
        """Would print."""

    # ModelVBAR

    def vbar_allocate(self, context: int, size: int, device: int, pageout: object = None) -> int:
        """``pageout``, of comfy-aimdo 0.6, is called for what was written on the device: weights are not."""
        pages = -(-size // self.page)
        made = Weights(device, accelerator.reserve(device, size, self.page), self.page, pages, watermark=pages)
        handle = self._keep(made)
        self._weights[handle] = made
        return handle

    def vbar_get(self, context: int, handle: int) -> int:
        return self._weights[handle].base

    def vbar_free(self, context: int, handle: int) -> None:
        weights = self._weights.pop(handle)
        for page in list(weights.backed):
            weights.drop(page)
        del self._objects[handle]

    def vbar_fault(self, context: int, handle: int, offset: int, size: int, signature: ctypes.Array) -> int:
        self._take_some_away()
        weights = self._weights[handle]
        pages = weights.pages_of(offset, size)
        if pages.stop > weights.watermark or (self.room is not None and pages.stop * weights.page > self.room):
            return 1
        for page in pages:
            if page not in weights.backed:
                if not accelerator.back(weights.base, page, True):
                    return 1
                self.faults += 1
                weights.backed[page] = self.faults
        for index, page in enumerate(pages):
            signature[index] = weights.backed[page]
            weights.pinned[page] += 1
        return 0

    def vbar_unpin(self, context: int, handle: int, offset: int, size: int) -> bool:
        weights = self._weights[handle]
        for page in weights.pages_of(offset, size):
            weights.pinned[page] = max(0, weights.pinned[page] - 1)
        return True

    def vbar_loaded_size(self, context: int, handle: int) -> int:
        weights = self._weights[handle]
        return len(weights.backed) * weights.page

    def vbar_free_memory(self, context: int, handle: int, size: int) -> int:
        weights, freed = self._weights[handle], 0
        for page in reversed(weights.droppable):
            if freed >= size:
                break
            weights.drop(page)
            freed += weights.page
        return freed

    def vbar_prioritize(self, context: int, handle: int, clamp: int = 0) -> None:
        self._weights[handle].watermark = self._weights[handle].pages

    def vbar_deprioritize(self, context: int, handle: int) -> None:
        """There is no order among models here."""

    def vbar_set_watermark_limit(self, context: int, handle: int, size: int) -> None:
        """The limit is the device's."""

    def vbar_set_watermark(self, context: int, handle: int, size: int) -> bool:
        self._weights[handle].watermark = size // self._weights[handle].page
        return True

    def vbars_reset_watermark_limits(self, context: int) -> None:
        for weights in self._weights.values():
            weights.watermark = weights.pages

    def vbars_analyze(self, context: int, only: bool) -> int:
        return sum(len(w.droppable) * w.page for w in self._weights.values() if w.device == context - 1)

    def vbar_get_nr_pages(self, context: int, handle: int) -> int:
        return self._weights[handle].pages

    def vbar_get_watermark(self, context: int, handle: int) -> int:
        return self._weights[handle].watermark

    def vbar_get_residency(self, context: int, handle: int, flags: ctypes.Array, pages: int) -> None:
        weights = self._weights[handle]
        for page in range(pages):
            flags[page] = (page in weights.backed) | (weights.pinned[page] > 0) << 1

    def _take_some_away(self) -> None:
        for weights in self._weights.values():
            for page in weights.droppable:
                if self.random.random() < self.chance:
                    weights.drop(page)
                    self.evictions += 1

    # VRAMBuffer

    def vrambuf_create(self, device: int, size: int) -> int:
        return self._keep([accelerator.reserve(device, size, CHUNK), 0])

    def vrambuf_get(self, handle: int) -> int:
        return self._objects[handle][0]

    def vrambuf_grow(self, handle: int, size: int) -> bool:
        base, chunks = self._objects[handle]
        for chunk in range(chunks, -(-size // CHUNK)):
            if not accelerator.back(base, chunk, True):
                return False
            self._objects[handle][1] = chunk + 1
        return True

    def vrambuf_destroy(self, handle: int) -> bool:
        base, chunks = self._objects.pop(handle)
        for chunk in range(chunks):
            accelerator.back(base, chunk, False)
        return True

    # HostBuffer

    def hostbuf_allocate(self, prewarm: int, size: int, mark_cold: bool) -> int:
        return self._keep([mmap.mmap(-1, max(size, mmap.PAGESIZE)), 0])

    def hostbuf_free(self, handle: int) -> None:
        self._objects.pop(handle)

    def hostbuf_get_raw_address(self, handle: int) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._objects[handle][0]))

    def hostbuf_extend(self, handle: int, size: int, reallocate: bool, register: bool, delta) -> int:
        memory, used = self._objects[handle]
        if used + size > len(memory):
            return 0
        self._objects[handle][1] = used + size
        delta._obj.value = size
        return self.hostbuf_get_raw_address(handle) + used

    def hostbuf_truncate(self, handle: int, size: int, unregister: bool) -> bool:
        self._objects[handle][1] = size
        return True

    def hostbuf_register(self, handle: int, offset: int, size: int) -> bool:
        return accelerator.cudart().cudaHostRegister(self.hostbuf_get_raw_address(handle) + offset, size, 1) == 0

    def hostbuf_unregister(self, handle: int, offset: int) -> bool:
        return accelerator.cudart().cudaHostUnregister(self.hostbuf_get_raw_address(handle) + offset) == 0

    def hostbuf_read_file_slice(self, handle, device, file, position, size, offset, stream, address) -> bool:
        memory = self._objects[handle][0]
        self.read += size
        memory[offset : offset + size] = os.pread(file, size, position)
        if address:
            _to_device(memory[offset : offset + size], address, device)
        return True

    def hostbuf_file_reader_read(self, device, file, position, size, stream, address, mark_cold) -> bool:
        self.read += size
        _to_device(os.pread(file, size, position), address, device)
        return True

    def hostbuf_file_reader_cleanup(self) -> None:
        """Nothing is kept."""

    # ModelMMAP

    def model_mmap_allocate(self, path: bytes) -> int:
        file = os.open(path, os.O_RDONLY)
        return self._keep((file, mmap.mmap(file, 0, access=mmap.ACCESS_COPY)))

    def model_mmap_get(self, handle: int) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._objects[handle][1]))

    def model_mmap_get_file_handle(self, handle: int) -> int:
        return self._objects[handle][0]

    def model_mmap_bounce(self, handle: int) -> bool:
        return True

    def model_mmap_deallocate(self, handle: int) -> None:
        file, _ = self._objects.pop(handle)
        os.close(file)


def _at(address: int, size: int, device: torch.device | int) -> torch.Tensor:
    return torch.ops.simulated.at_address(address, size, torch.device(accelerator.NAME, device))


def _to_device(data: bytes, address: int, device: int) -> None:
    _at(address, len(data), device).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _set_data(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    if parameter.device.type == value.device.type:
        torch._C.TensorBase.data.__set__(parameter, value)
    else:
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(value, requires_grad=parameter.requires_grad))


_library = Library()


@contextlib.contextmanager
def dynamic_vram(chance: float = 0.0, page: int = PAGE) -> Iterator[Library]:
    """The host has dynamic VRAM, as its ``main.py`` switches it on, as long as the context lasts; it ends unloaded.

    Args:
        chance, page: as in `Library`.
    """
    for module in ("control", "host_buffer", "model_mmap", "model_vbar", "vram_buffer"):
        getattr(comfy_aimdo, module).lib = _library
    comfy_aimdo.control.devctxs = [_library.get_devctx(device) for device in range(accelerator.DEVICES)]
    comfy_aimdo.torch.get_tensor_from_raw_ptr = lambda address, size, device: _at(address, size, device.index)
    patcher, memory = comfy.model_patcher, comfy.memory_management
    before = patcher.CoreModelPatcher, memory.aimdo_enabled, vars(torch.nn.Parameter).get("data")
    library_before = _library.chance, _library.page, _library.room
    patcher.CoreModelPatcher, memory.aimdo_enabled = patcher.ModelPatcherDynamic, True
    _library.chance, _library.page = chance, page
    torch.nn.Parameter.data = property(torch._C.TensorBase.data.__get__, _set_data)
    try:
        yield _library
    finally:
        host_on_device.unload(comfy.model_management)  # while parameters can still be assigned
        patcher.CoreModelPatcher, memory.aimdo_enabled, data = before
        _library.chance, _library.page, _library.room = library_before
        if data is None:
            del torch.nn.Parameter.data
