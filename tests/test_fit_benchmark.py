"""The table of the benchmark of fitted files: each figure at its place, and the one that docs/recipes.md shows."""

from pathlib import Path

from auraflow_gguf.benchmarks.fit import FORMER, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_its_figures():
    row = {
        "recipe": "Q2_K",
        "bits": 3.526,
        "bytes": {"former": 100, "now": 95, "kinds": 99, "fitted": 100},
        "error": {"former": 0.08076, "now": 0.05604, "kinds": 0.04852, "fitted": 0.03404},
        "predicted": 0.03,
        "types": {},
    }
    head, line, *rows = table([row, {**row, "recipe": "Q3_K_M", "bits": 4.456}]).splitlines()
    assert len(cells(head)) == len(cells(line)) == 6
    assert cells(rows[0]) == ["`Q2_K`", "3.53", "0.0808", "0.0560 (0.95 ×)", "0.0485", "**0.0340**"]
    assert cells(rows[1])[:2] == ["`Q3_K_M`", "4.46"]


def test_the_page_has_the_table_of_all_former_mixtures():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    begin = lines.index(table([]).splitlines()[0])
    assert [cells(line)[0] for line in lines[begin + 2 : begin + 2 + len(FORMER)]] == [f"`{name}`" for name in FORMER]
