"""The door to diffusers beside diffusers' own loader of GGUF files: a step, and the memory of loading and a step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AuraFlowTransformer2DModel, GGUFQuantizationConfig

from ..devtools import ROOT
from ..loader.diffusers.transformer import load_diffusers_transformer
from .measure import Ratio, peak_growth, side_by_side

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
SETTING_TEXT = "AuraFlow of 1 double and 1 single layer at full width, 256 image and 64 text tokens, batch 1, float32"

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import dev
dev.register_pack()
from auraflow_gguf.benchmarks.diffusers_door import in_this_process
print(in_this_process({loader!r}, {path!r}))
"""


def measure(pairs: int, types: tuple[str, ...]) -> list[dict]:
    """One row a type: the ratio of a step to that of diffusers' own loader, and the memory of both.

    Returns:
        besides the ratio, ``file_bytes``, and by how much a process grows at most that loads the file and makes a step:
        ``own_peak_bytes``, of diffusers' own loader, and ``peak_bytes``; 0 where the system is not Linux. Pages of
        the file that are mapped count.
    """
    from ..tests.host.aura_files import make_gguf

    rows = []
    for type_name in (name for name in types if name in TYPES):
        path = str(make_gguf(type_name))
        ratio = _steps(path, pairs)
        own_peak, peak = (_in_a_new_process(loader, path) for loader in LOADERS)
        memory = {"own_peak_bytes": own_peak, "peak_bytes": peak}
        rows.append({"type": type_name, **asdict(ratio), "file_bytes": os.path.getsize(path), **memory})
        print(f"{type_name:8} {ratio}, {peak / 1e6:.0f} MB beside {own_peak / 1e6:.0f} MB", flush=True)
    return rows


def _steps(path: str, pairs: int) -> Ratio:
    own, ours = (load(path) for load in LOADERS.values())
    return side_by_side(lambda: step(own), lambda: step(ours), pairs)


def _own(path: str) -> AuraFlowTransformer2DModel:
    """By diffusers alone, which takes the sizes from the configuration that its hub would give it."""
    with TemporaryDirectory() as folder:
        load_diffusers_transformer(path).save_config(folder)
        quantization = GGUFQuantizationConfig(compute_dtype=torch.float32)
        options = {"quantization_config": quantization, "torch_dtype": torch.float32, "config": folder}
        return AuraFlowTransformer2DModel.from_single_file(path, **options)


LOADERS: dict[str, Callable[[str], AuraFlowTransformer2DModel]] = {"own": _own, "ours": load_diffusers_transformer}


@torch.inference_mode()
def step(model: AuraFlowTransformer2DModel) -> torch.Tensor:
    """``(1, 4, 32, 32)``, of seeded noise."""
    generator = torch.Generator().manual_seed(0)
    return model(
        torch.randn(1, 4, 32, 32, generator=generator),
        encoder_hidden_states=torch.randn(1, 64, 2048, generator=generator),
        timestep=torch.tensor([0.5]),
        return_dict=False,
    )[0]


def _in_a_new_process(loader: str, path: str) -> int:
    if sys.platform != "linux":
        return 0
    script = SCRIPT.format(root=str(ROOT), loader=loader, path=str(Path(path)))
    ran = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE)
    return int(ran.stdout.split()[-1])


def in_this_process(loader: str, path: str) -> int:
    """Bytes by which this process, with diffusers imported, grows at most while it loads a file and makes a step."""
    return peak_growth(lambda: step(LOADERS[loader](path)))
