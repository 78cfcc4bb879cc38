"""Measuring side by side: interleaved runs, ratios of medians, and how far they spread."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

GROUP = 5  # subjects that share a run of each baseline


@dataclass(frozen=True)
class Ratio:
    """How long ``subject`` takes beside ``baseline``, from interleaved pairs.

    Attributes:
        median: of the pairs' ratios.
        low, high: the quartiles of the pairs' ratios.
        baseline_seconds, subject_seconds: medians of the times.
    """

    median: float
    low: float
    high: float
    baseline_seconds: float
    subject_seconds: float

    @classmethod
    def of(cls, times: Sequence[tuple[float, float]]) -> Ratio:
        """From the seconds of each pair, the baseline's first."""
        ratios = [subject / base for base, subject in times]
        low, median, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method="inclusive")
        base_times, subject_times = zip(*times, strict=True)
        return cls(median, low, high, statistics.median(base_times), statistics.median(subject_times))

    def __str__(self) -> str:
        return f"{self.median:.2f} × ({self.low:.2f}–{self.high:.2f})"


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run, with the device's work done."""
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def side_by_side(baseline: Callable[[], object], subject: Callable[[], object], pairs: int) -> Ratio:
    """Run both in turns, after one warm-up of each; every other pair in the other order."""
    baseline()
    subject()
    return in_turns({"baseline": baseline}, {"subject": subject}, pairs)["baseline", "subject"]


def in_turns(
    baselines: Mapping[Hashable, Callable[[], object]], subjects: Mapping[Hashable, Callable[[], object]], rounds: int
) -> dict[tuple[Hashable, Hashable], Ratio]:
    """Run all of them in each round, without a warm-up; every other round backwards.

    `GROUP` subjects, one after the other, share a run of each baseline in their middle, which is the other half of the
    pair of each. No baseline may have a subject's name.

    Returns:
        for each baseline and subject their ratio, of as many pairs as there are rounds.
    """
    runs, names = {**baselines, **subjects}, list(subjects)
    groups = [names[start : start + GROUP] for start in range(0, len(names), GROUP)]
    times = {pair: [] for pair in itertools.product(baselines, subjects)}
    for number in range(rounds):
        direction = -1 if number % 2 else 1
        for group in groups[::direction]:
            middle = len(group) // 2
            order = [*group[:middle], *baselines, *group[middle:]][::direction]
            taken = {name: seconds(runs[name]) for name in order}
            for baseline, name in itertools.product(baselines, group):
                times[baseline, name].append((taken[baseline], taken[name]))
    return {pair: Ratio.of(both) for pair, both in times.items()}


def anonymous_bytes() -> int | None:
    """Memory of this process that no file stands behind; None where the system does not tell it apart."""
    return status_bytes("RssAnon") if Path("/proc/self/status").exists() else None


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which this process grows at most while it runs something, mapped pages of files included. On Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A size from Linux's report on this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine() -> dict[str, object]:
    """The processor, the device and the versions that the figures hold for."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "processor": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }
