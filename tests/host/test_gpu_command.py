"""The parts of ``python dev.py gpu`` that need ComfyUI, tiny and on a CPU."""

from __future__ import annotations

from pathlib import Path

import comfy
import pytest
import torch
from auraflow_gguf.benchmarks.gpu import comfyui_step, vram
from auraflow_gguf.benchmarks.gpu.setting import LeftOut, Setting

SETTING = Setting(torch.device("cpu"), quick=True, types=("Q4_K",), comfyui=Path(comfy.__path__[0]).parent)


@pytest.mark.host_independent
def test_a_row_for_each_way():
    rows = list(comfyui_step.step(SETTING))
    assert [row["way"] for row in rows] == ["dense", "modulation cache", "no cache", "LoRA", "int8"]
    assert all(row["of_dense"] == row["ms"] / rows[0]["ms"] for row in rows)


@pytest.mark.host_independent
def test_int8_that_the_device_does_not_have_is_left_out_in_words(monkeypatch):
    monkeypatch.setattr("auraflow_gguf.loader.comfyui.int8.install", lambda *_: "there are no products of int8")
    with pytest.raises(LeftOut, match="the log says why"):
        comfyui_step._loaded("Q4_K", "int8", SETTING)


def test_sampling_with_the_static_patcher():
    row = vram.in_this_process(SETTING, "static", None)
    assert row["first_seconds"] > 0 < row["again_seconds"]
    assert 0 < row["loaded_bytes"] <= row["model_bytes"]
