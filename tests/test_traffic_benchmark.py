"""The table of the benchmark of traffic: each figure at its place, and the one that docs/gpu.md shows."""

from auraflow_gguf.benchmarks.traffic import LIMITS, MARKS, MODES, PAGE, table

ROW = {"limit_gb": 4, "mode": "static", "step_bytes": 2_310_000_000, "least_bytes": 2_200_000_000}
ROW |= {"lora_step_bytes": 2_410_000_000, "strength_bytes": 2_560_000_000, "peak_bytes": 3_210_000_000}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_its_figures():
    head, line, first, second = table([ROW, ROW | {"limit_gb": 8, "least_bytes": 0}]).splitlines()
    assert len(cells(head)) == len(cells(line)) == 8
    assert cells(first) == ["4 GB", "static", "2.31", "2.20", "1.05", "2.41", "2.56", "3.21"]
    assert cells(second)[:5] == ["8 GB", "static", "2.31", "0.00", ""]


def test_the_page_has_the_table_of_all_limits():
    _, _, text = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    head, _, *rows = text.partition(MARKS[1])[0].strip().splitlines()
    assert head == table([]).splitlines()[0]
    assert [cells(row)[:2] for row in rows] == [[f"{limit} GB", mode] for limit in LIMITS for mode in MODES]
