"""The chart of the benchmark shows every figure that it is given, at its place."""

from xml.etree import ElementTree as ET

from auraflow_gguf.benchmarks.chart import WAYS, draw

SVG = "{http://www.w3.org/2000/svg}"
RATIOS = {"Q8_0": (0.98, 1.02, 1.05), "Q4_K": (1.0, 1.1, 1.31), "BF16": (1.0, 1.0, 1.0)}
RATES = {
    "Q8_0": {"copy": 20.0, "pack": 10.0, "libgguf": 5.0, "gguf-py": 1.0, "diffusers": 2.0},
    "BF16": {"copy": 21.0, "pack": 12.0, "gguf-py": 1.0},
}


def chart() -> ET.Element:
    steps = [{"type": name, "low": low, "median": median, "high": high} for name, (low, median, high) in RATIOS.items()]
    rates = [{"type": name, **values} for name, values in RATES.items()]
    machine = {"processor": "A & B", "cores": 2, "device": "cpu"}
    return ET.fromstring(draw({"machine": machine, "step": {"rows": steps}, "dequantize": {"rows": rates}}))


def test_ratios_stand_in_their_order():
    svg = chart()
    dots = [float(dot.get("cx")) for dot in svg.iter(f"{SVG}circle")]
    assert dots[2] < dots[0] < dots[1]
    assert round((dots[1] - dots[2]) / (dots[0] - dots[2])) == 5  # 1.1 and 1.02, from 1
    spreads = [line for line in svg.iter(f"{SVG}line") if line.get("class") == "spread"]
    for line, dot in zip(spreads, dots, strict=True):
        assert float(line.get("x1")) <= dot <= float(line.get("x2"))


def test_a_bar_for_every_rate_as_long_as_the_rate():
    svg = chart()
    for way in WAYS:
        _, *bars = [float(bar.get("width")) for bar in svg.iter(f"{SVG}rect") if bar.get("fill") == f"var(--{way})"]
        assert len(bars) == sum(way in rates for rates in RATES.values()), way
    pack = [float(bar.get("width")) for bar in svg.iter(f"{SVG}rect") if bar.get("fill") == "var(--pack)"][1:]
    assert round(pack[1] / pack[0], 2) == 1.2


def test_everything_is_inside_the_picture_and_named():
    svg = chart()
    width, height = map(float, svg.get("viewBox").split()[2:])
    for text in svg.iter(f"{SVG}text"):
        assert 0 <= float(text.get("x")) <= width
        assert 0 <= float(text.get("y")) <= height
    words = {text.text for text in svg.iter(f"{SVG}text")}
    assert {*RATIOS, *RATES, *WAYS.values(), "1.10", "A & B, 2 cores, cpu"} <= words
