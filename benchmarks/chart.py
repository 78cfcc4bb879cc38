"""The README's chart, an SVG, from the figures of ``results.json``: what a step takes, and what dequantizing gives.

It has a background of its own, and colours for light and for dark screens.
"""

from __future__ import annotations

import math
from html import escape

WIDTH, LEFT, RIGHT = 720, 76, 24
ROW, BAR = 24, 5  # heights: of a type in the upper part, of one bar in the lower
WAYS = {"pack": "this pack", "libgguf": "libgguf", "diffusers": "diffusers", "gguf-py": "gguf-py"}

STYLE = """
  svg { --paper: #ffffff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0;
        --pack: #0969da; --libgguf: #bf8700; --diffusers: #8250df; --gguf-py: #59636e }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --ink: #f0f6fc; --faint: #9198a1; --line: #3d444d;
          --pack: #4493f8; --libgguf: #d29922; --diffusers: #ab7df8; --gguf-py: #9198a1 } }
  text { font: 12px system-ui, sans-serif; fill: var(--ink) }
  .title { font-weight: 600; font-size: 14px }
  .faint { fill: var(--faint) }
  .value { paint-order: stroke; stroke: var(--paper); stroke-width: 4px }
  .right { text-anchor: end }
  .middle { text-anchor: middle }
  line { stroke: var(--line) }
  .limit { stroke: var(--faint); stroke-dasharray: 4 3 }
  .spread { stroke: var(--pack); stroke-width: 2 }
"""


def draw(results: dict) -> str:
    """The chart as the text of an SVG file. ``results`` is what ``run.py`` writes."""
    step, height = _step_panel(results["step"], 20)
    rates, height = _dequantize_panel(results["dequantize"], height + 28)
    machine = f"{results['machine']['processor']}, {results['machine']['cores']} cores, {results['machine']['device']}"
    parts = [*step, *rates, _text(WIDTH - RIGHT, height + 20, machine, "faint right")]
    height += 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="What a step takes beside dense weights, and how fast weights are dequantized">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="var(--paper)"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _step_panel(step: dict, top: int) -> tuple[list[str], int]:
    """A dot for each type's median ratio, with its quartiles; returns the elements and where they end."""
    rows = step["rows"]
    first = 0.1 * math.floor(10 * min(0.9, *(row["low"] for row in rows)))
    last = 0.1 * math.ceil(10 * max(1.2, *(row["high"] for row in rows)))
    x = _scale(first, last)
    parts = [_text(LEFT, top + 4, "A step, beside the same weights dense", "title")]
    parts.append(_text(LEFT, top + 22, "× the time of dense: medians and quartiles; less is better", "faint"))
    top += 36
    bottom = top + ROW * len(rows)
    parts += _grid(x, [first + 0.1 * i for i in range(round((last - first) * 10) + 1)], top, bottom, "{:.1f}")
    parts.append(f'<line class="limit" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{top}" y2="{bottom}"/>')
    for i, row in enumerate(rows):
        y = top + ROW * i + ROW / 2
        parts.append(_text(LEFT - 10, y + 4, row["type"], "right"))
        parts.append(f'<line class="spread" x1="{x(row["low"]):.1f}" x2="{x(row["high"]):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle cx="{x(row["median"]):.1f}" cy="{y}" r="5" fill="var(--pack)"/>')
        parts.append(_text(x(row["high"]) + 10, y + 4, f"{row['median']:.2f}", "value"))
    return parts, bottom + 20


def _dequantize_panel(dequantize: dict, top: int) -> tuple[list[str], int]:
    """Bars for each type, one for every way that can dequantize it."""
    rows = dequantize["rows"]
    copy = sorted(row["copy"] for row in rows)[len(rows) // 2]
    last = max(copy, *(row.get(way) or 0 for row in rows for way in WAYS))
    x = _scale(0, last * 1.08)
    parts = [_text(LEFT, top + 4, "Dequantizing a weight", "title")]
    parts.append(_text(LEFT, top + 22, "GB read and written in a second; more is better", "faint"))
    for i, (way, label) in enumerate(WAYS.items()):
        at = LEFT + 300 + 85 * i
        parts.append(f'<rect x="{at}" y="{top + 13}" width="10" height="10" fill="var(--{way})"/>')
        parts.append(_text(at + 15, top + 22, label))
    top += 48
    ticks = _ticks(last)
    group = BAR * len(WAYS) + 8
    bottom = top + group * len(rows)
    parts += _grid(x, ticks, top, bottom, "{:g}")
    parts.append(f'<line class="limit" x1="{x(copy):.1f}" x2="{x(copy):.1f}" y1="{top - 4}" y2="{bottom}"/>')
    parts.append(_text(x(copy), top - 8, "a plain copy", "faint middle"))
    for i, row in enumerate(rows):
        y = top + group * i + 4
        parts.append(_text(LEFT - 10, y + group / 2, row["type"], "right"))
        for j, way in enumerate(WAYS):
            if rate := row.get(way):
                width = x(rate) - LEFT
                parts.append(
                    f'<rect x="{LEFT}" y="{y + BAR * j}" width="{width:.1f}" height="{BAR - 1}" fill="var(--{way})"/>'
                )
    return parts, bottom + 20


def _scale(first: float, last: float):
    return lambda value: LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT - 40)


def _ticks(last: float) -> list[float]:
    """From 0 to ``last`` in about five round steps."""
    power = 10 ** math.floor(math.log10(last / 5))
    step = next(power * digit for digit in (1, 2, 5, 10) if last / (power * digit) <= 6)
    return [step * i for i in range(int(last / step) + 1)]


def _grid(x, values: list[float], top: float, bottom: float, form: str) -> list[str]:
    parts = []
    for value in values:
        parts.append(f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(_text(x(value), bottom + 16, form.format(value), "faint middle"))
    return parts


def _text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(words)}</text>'
