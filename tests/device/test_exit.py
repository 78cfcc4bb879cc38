"""A process that ends by an error in a run ends by that error, and not by a signal when its model is given back."""

import os
import subprocess
import sys

from auraflow_gguf.devtools.server import ROOT

from .conftest import HOSTS

SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import dev
dev.register_pack()
from auraflow_gguf.devtools.hosts import find_hosts
from auraflow_gguf.devtools.server import ROOT
from auraflow_gguf.tests.device import host_on_device
management = host_on_device.enter(find_hosts(ROOT, clone=False)[0])
import torch
from auraflow_gguf.tests.device.dynamic_vram import dynamic_vram
from auraflow_gguf.tests.device.pictures import picture
from auraflow_gguf.tests.host.small_auraflow import load_small, small_gguf

def step(apply_model, arguments):
    apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
    raise RuntimeError("planted in a step")

with torch.inference_mode(), dynamic_vram():
    model = load_small(small_gguf("Q4_0"))
    model.set_model_unet_function_wrapper(step)
    picture(model)
"""


def test_an_error_in_a_step_of_a_script():
    environment = os.environ | {"COMFYUI_PATH": str(HOSTS[0].path)}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr.splitlines()[-1] == "RuntimeError: planted in a step"
