"""The step in diffusers that ``python dev.py gpu`` measures, tiny and on a CPU."""

from __future__ import annotations

import torch
from auraflow_gguf.benchmarks.gpu import diffusers_step
from auraflow_gguf.benchmarks.gpu.setting import Setting
from auraflow_gguf.loader.diffusers.modules import PackedLinear

SETTING = Setting(torch.device("cpu"), quick=True, types=("Q4_K", "Q4_0"))


def test_a_row_for_each_kind_of_weights():
    rows = list(diffusers_step.step(SETTING))
    assert [row["weights"] for row in rows] == ["dense", "Q4_K", "Q4_0"]
    assert rows[0]["of_dense"] == 1
    assert all(row["of_dense"] == row["ms"] / rows[0]["ms"] for row in rows)


@torch.inference_mode()
def test_its_model_computes_numbers_from_packed_layers():
    model = diffusers_step._model("Q4_K", SETTING)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert all("transformer_blocks" in name for name in packed)
    dense = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert packed
    assert not any("transformer_blocks" in name for name in dense)
    (out,) = model(**diffusers_step._inputs(2, SETTING))
    assert out.isfinite().all()
    assert 0.01 < out.std() < 100
