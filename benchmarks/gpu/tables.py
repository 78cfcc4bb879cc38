"""What ``dev.py gpu`` prints of its rows, as tables in Markdown."""

from __future__ import annotations


def of_part(name: str, part: dict) -> str:
    """A part's heading, its rows, and why there are no (more) of them."""
    lines = [f"\n## {name}\n\n{part['setting']} ({part['seconds']:.0f} s)\n"]
    # Rows with other columns, such as that of weights that do not fit, follow in a table of their own.
    for columns in dict.fromkeys(tuple(row) for row in part["rows"]):
        lines.append(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        rows = (row for row in part["rows"] if tuple(row) == columns)
        lines += [f"| {' | '.join(_cell(column, row[column]) for column in columns)} |" for row in rows]
        lines.append("")
    lines += [
        f"{how.upper()}: {part[key]}" for key, how in (("left_out", "left out"), ("failed", "failed")) if key in part
    ]
    return "\n".join(lines)


def wrong(name: str, rows: list[dict]) -> str | None:
    """Which kernels do not give the numbers that they should; None where all do."""
    if name != "bits":
        return None
    types = [
        row["type"]
        for row in rows
        if any(row["different"].values()) or not all(error <= 1 for error in row["products"].values())
    ]
    return f"other numbers than torch's: {', '.join(types)}" if types else None


def _cell(column: str, value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(column, inner)}" for key, inner in value.items())
    if column.endswith("_bytes") and isinstance(value, int):
        return f"{value / 1e9:.2f} GB"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return "" if value is None else str(value)
