"""Tests on the simulated accelerator, in the real ComfyUI that ``COMFYUI_PATH`` names, else the first that dev.py would
find. They want a process of their own: PyTorch can be given one such device, and the host one kind of device."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from auraflow_gguf.devtools.cxx import NoCompiler, compiler
from auraflow_gguf.devtools.hosts import find_hosts
from auraflow_gguf.devtools.server import ROOT
from auraflow_gguf.loader.quant_types import QUANT_TYPES

from . import host_on_device
from .simulated import accelerator

HOSTS = find_hosts(ROOT, clone=False)
if not HOSTS:
    raise pytest.UsageError("tests/device needs a ComfyUI: set COMFYUI_PATH, or run `python dev.py test`")
try:
    compiler()
except NoCompiler as error:
    raise pytest.UsageError(f"tests/device: {error}") from error
management = host_on_device.enter(HOSTS[0])
gc.freeze()  # what is imported is not looked through after each test


@pytest.fixture(autouse=True, scope="session")
def _inference_mode() -> Iterator[None]:
    """ComfyUI executes nodes inside ``torch.inference_mode()``."""
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True, scope="session")
def kept(_inference_mode) -> list[int]:
    """Bytes on each device that stay there: the small tables of the quantization types, kept for each device."""
    for device in host_on_device.devices():
        for kind in QUANT_TYPES.values():
            kind.dequantize(torch.zeros(1, kind.type_size, dtype=torch.uint8, device=device))
    return _allocated()


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest, kept: list[int]) -> Iterator[None]:
    """After each test nothing else is left on the devices."""
    yield
    request.node.funcargs.clear()  # pytest would keep them, and with them a model, until later
    host_on_device.unload(management)
    assert _allocated() == kept, _left()


def _left() -> list[str]:
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sorted(f"{t.device} {tuple(t.shape)} {t.dtype}" for t in tensors if t.device.type == accelerator.NAME)


def _allocated() -> list[int]:
    return [accelerator.counters(device).allocated for device in range(accelerator.DEVICES)]


@pytest.fixture(scope="session")
def on_cpu():
    """The MODEL of a Q4_0 file, of the CPU."""
    from ..host.small_auraflow import load_small, small_gguf

    with host_on_device.on_the_cpu(management):
        return load_small(small_gguf("Q4_0"))


@pytest.fixture(scope="session")
def expected(on_cpu) -> Callable[[Callable], torch.Tensor]:
    """What a function of that MODEL gives on the CPU, computed once for each."""

    @functools.cache
    def of(function: Callable) -> torch.Tensor:
        with host_on_device.on_the_cpu(management):
            return function(on_cpu)

    return of
