"""``python dev.py gpu`` where there is no GPU: what needs none, and how its parts are kept apart."""

from __future__ import annotations

import json

import pytest
import torch
from auraflow_gguf.benchmarks.gpu import kernels, run, tables
from auraflow_gguf.benchmarks.gpu.setting import Setting, in_processes
from auraflow_gguf.devtools.arguments import CARDS, GPU_PARTS, parse

CPU = Setting(torch.device("cpu"), quick=True, types=("Q4_K", "Q8_0"))


def of_child(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="There is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert run.main(parse("gpu", []), []) == 2
    assert capsys.readouterr().err == f"{run.NO_GPU}\n"


def test_a_type_that_is_none(capsys):
    assert run.main(parse("gpu", ["--device", "cpu", "--type", "Q4_K_M"]), []) == 2
    assert "found --type Q4_K_M, expected packed types" in capsys.readouterr().err


def test_products(tmp_path):
    assert run._child(CPU, "products", tmp_path / "rows") == 0
    rows = of_child(tmp_path / "rows")
    assert [(row["type"], row["rows"]) for row in rows] == [("Q4_K", 1), ("Q4_K", 2), ("Q8_0", 1), ("Q8_0", 2)]
    assert all(row["packed_ms"] > 0 and row["dense_ms"] > 0 for row in rows)


def test_work_in_processes():
    """On a GPU the bits of each type; here what needs no Triton."""
    (rows,) = in_processes(kernels.products_of, ["Q4_K"], CPU, most=1)
    assert [row["rows"] for row in rows] == [1, 2]


@pytest.mark.parametrize("part", ["bits", "bandwidth", "comfyui", "vram"])
def test_what_cannot_be_tried_here_is_left_out_by_a_sentence(part, tmp_path):
    assert run._child(CPU, part, tmp_path / "rows") == 0
    (row,) = of_child(tmp_path / "rows")
    assert row.keys() == {"left_out"}
    assert row["left_out"].endswith(".")


def test_rows_before_a_failure_are_kept(tmp_path, monkeypatch):
    def rows(setting):
        yield {"type": "Q4_K"}
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(run.PARTS, "step", run.Part("a step", 1, rows))
    with pytest.raises(RuntimeError, match="illegal"):
        run._child(CPU, "step", tmp_path / "rows")
    assert of_child(tmp_path / "rows") == [{"type": "Q4_K"}]


def test_parts_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    """One that is not done in its time fails alone; the next one runs all the same."""
    output = tmp_path / "gpu.json"
    options = parse("gpu", ["--device", "cpu", "--quick", "--part", "step", "--part", "bits", "--output", str(output)])
    monkeypatch.setitem(run.PARTS, "step", run.PARTS["step"]._replace(seconds=0))
    assert run.main(options, []) == 1
    parts = json.loads(output.read_text())["parts"]
    assert parts["step"]["failed"] == "not done in 0 s"
    assert parts["bits"]["left_out"].startswith("Triton's kernels")
    printed = capsys.readouterr().out
    assert "FAILED: not done in 0 s" in printed
    assert "LEFT OUT: Triton's kernels" in printed


def test_wrong_bits_are_a_failure():
    right = {"type": "Q4_K", "different": {"float32": 0}, "products": {1: 0.3, 16: 0.9}}
    assert tables.wrong("bits", [right]) is None
    for change in ({"different": {"float32": 1}}, {"products": {1: 1.2}}, {"products": {1: float("nan")}}):
        assert "Q4_K" in tables.wrong("bits", [right | change])


def test_a_table_has_every_row_once():
    rows = [
        {"weights": "dense", "full": "too large"},
        {"weights": "Q4_K", "ms": 12.3456, "peak_bytes": 4 * 10**9},
    ]
    lines = tables.of_part("step", {"setting": "a step", "seconds": 3.0, "rows": rows}).splitlines()
    assert "| dense | too large |" in lines
    assert "| Q4_K | 12.3 | 4.00 GB |" in lines


def test_its_arguments_are_those_of_the_parts_and_cards():
    assert tuple(run.PARTS) == GPU_PARTS
    pytest.importorskip("triton")
    from .loader.kernels import machine_code

    assert tuple(machine_code.CARDS) == CARDS
