"""ComfyUI on the simulated accelerator: what it is given in place of its own, and why.

The host's code runs as it is, on the path that it takes for an NVIDIA card: two streams for offloading, page-locked
memory, smart memory. It asks ``torch.cuda`` about its device, which has none here, and has no place to name another.
So ``comfy.model_management`` is given

- ``torch`` (as are the two other modules that ask it, `ASKS_TORCH`): the same, except that ``torch.cuda`` is the
  simulated accelerator, which answers by ``torch.cuda``'s names: the current device, free and all memory, what types it
  computes in, streams, page-locking, synchronizing; and that ``torch.version`` is that of a build for CUDA;
- ``is_device_cuda``: whether a device is a simulated one, which decides about streams;
- ``get_all_torch_devices``: the simulated ones, which it spells as "cuda" itself;
- what it found out at import, when it was told that there is none (``args.cpu``): see `_found_at_import`.

For dynamic VRAM it does what ``main.py`` does: see `dynamic_vram.py`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import torch
from auraflow_gguf.devtools.cache import cache_folder
from auraflow_gguf.devtools.hosts import Host

from .simulated import accelerator

SIZE = 8 << 30  # bytes of memory, of which no more than what is used is taken from this machine
PINNED = 4 << 30


class _Torch(ModuleType):
    """``torch``, with the simulated accelerator for ``torch.cuda``."""

    cuda = accelerator
    version = SimpleNamespace(cuda="13.0", hip=None)

    def __init__(self):
        super().__init__("torch")

    def __getattr__(self, name: str):
        return getattr(torch, name)


_TORCH = _Torch()

# Modules of the host that call torch.cuda; which of them do depends on the version.
ASKS_TORCH = ("comfy.model_management", "comfy.model_patcher", "comfy.pinned_memory")


def enter(host: Host) -> ModuleType:
    """Makes ``comfy`` and the host's modules importable, on the simulated accelerator.

    Returns:
        ``comfy.model_management``.
    """
    accelerator.load()
    for device in range(accelerator.DEVICES):
        accelerator.set_limit(SIZE, device)
    base = cache_folder() / f"in-process-{host.version}"
    base.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(host.path))
    from comfy.cli_args import args

    args.base_directory = str(base)
    args.cpu = True
    import comfy.model_management as management

    for name in ASKS_TORCH:
        if importlib.util.find_spec(name):
            importlib.import_module(name).torch = _TORCH
    args.cpu = False
    management.is_device_cuda = lambda device: getattr(device, "type", None) == accelerator.NAME
    management.get_all_torch_devices = devices
    for name, value in _found_at_import(management).items():
        assert hasattr(management, name), f"ComfyUI {host.version} has no comfy.model_management.{name}"
        setattr(management, name, value)
    import utils.extra_config  # noqa: F401 (as main.py does, before ComfyUI's nodes put another utils on sys.path)

    return management


def _found_at_import(management: ModuleType) -> dict[str, object]:
    """What the host finds out when it is imported on a machine with an NVIDIA card."""
    return {
        "cpu_state": management.CPUState.GPU,
        "vram_state": management.VRAMState.NORMAL_VRAM,
        "total_vram": SIZE / 2**20,
        "MIN_WEIGHT_MEMORY_RATIO": 0.0,
        "ENABLE_PYTORCH_ATTENTION": True,
        "NUM_STREAMS": 2,
        "MAX_PINNED_MEMORY": PINNED,
        # By itself it bakes patches into weights in float16 there, which would not be the CPU's numbers.
        "LORA_COMPUTE_DTYPES": dict.fromkeys(devices(), torch.float32),
    }


def devices(exclude_current: bool = False) -> list[torch.device]:
    current = accelerator.current_device()
    indices = [index for index in range(accelerator.DEVICES) if not (exclude_current and index == current)]
    return [torch.device(accelerator.NAME, index) for index in indices]


@contextlib.contextmanager
def on_the_cpu(management: ModuleType) -> Iterator[None]:
    """The host takes the CPU for its device, as long as the context lasts."""
    before = management.cpu_state, management.vram_state
    management.cpu_state, management.vram_state = management.CPUState.CPU, management.VRAMState.DISABLED
    try:
        yield
    finally:
        management.cpu_state, management.vram_state = before


def unload(management: ModuleType) -> None:
    """Everything that the host holds on the devices is given back, as before another model and after a run."""
    management.unload_all_models()
    management.reset_cast_buffers()
    gc.collect()


@contextlib.contextmanager
def device_memory(management: ModuleType, model, mode: str) -> Iterator[None]:
    """The device has memory for all of a model ("full"), for half of it, or the host is told that there is next to none
    ("lowvram", its ``--novram``), as long as the context lasts. It begins with nothing loaded."""
    unload(management)
    before = management.vram_state
    size = SIZE
    if mode == "half":
        size = int(management.minimum_inference_memory()) + model.model_size() // 2
    elif mode == "lowvram":
        management.vram_state = management.VRAMState.NO_VRAM
    try:
        with accelerator.limited(size):
            yield
            unload(management)
    finally:
        management.vram_state = before
