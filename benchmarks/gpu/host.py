"""ComfyUI in this process, and the files that its parts load."""

from __future__ import annotations

import sys
from pathlib import Path

from .setting import LeftOut, Setting


def enter(setting: Setting) -> None:
    """Puts ComfyUI on the import path; its options are to be set before anything else of it is imported.

    Raises:
        LeftOut: where there is none.
    """
    if setting.comfyui is None:
        raise LeftOut("There is no ComfyUI here; COMFYUI_PATH names one.")
    sys.path.insert(0, str(setting.comfyui))
    from comfy.cli_args import args

    args.cpu = setting.device.type == "cpu"


def enable_dynamic_vram() -> None:
    """What ``main.py`` does where dynamic VRAM is on, after `enter`.

    Raises:
        LeftOut: where comfy-aimdo does not work.
    """
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_all_torch_devices()
    try:
        working = comfy_aimdo.control.init_devices((device.index, 0) for device in devices)
    except TypeError:  # before 0.4.10
        working = comfy_aimdo.control.init_devices(device.index for device in devices)
    if not working:
        raise LeftOut("comfy-aimdo does not work here.")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def full_size_file(type_name: str, setting: Setting) -> Path:
    """A file of 4 + 32 layers of one type, made once; in a quick trial of 1 + 1."""
    if setting.quick:
        from ...tests.host.aura_files import make_gguf

        return make_gguf(type_name)
    from .. import load

    return load.full_size_file(type_name)
