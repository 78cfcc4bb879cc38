"""``dev.py test``: the tests in tiers, two at a time, and at the end what each tier ran on."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO
from xml.etree import ElementTree as ET

import torch

from . import ROOT, browser
from .arguments import OF_THE_NEWEST, TIERS
from .cxx import NoCompiler, compiler
from .hosts import Host, newest

SERVER_TESTS = ("tests/host/test_server.py", "tests/host/test_workflows.py")

# What an older ComfyUI is not asked again: tests whose path through the host is the same in every version.
NEWEST_HOST_ONLY = "host_independent"


@dataclass(frozen=True)
class Result:
    """What came out of a tier: numbers of checks, ``ran_on``, the versions and the device that they hold for, and why
    tests were skipped (``absent``)."""

    tier: str
    ran_on: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        counts = f"{self.passed} passed, {self.failed} failed{skipped} in {self.seconds:.0f} s"
        return "\n".join(
            [f"{self.tier:8} {counts}  ({self.ran_on})", *(f"         skipped: {why}" for why in self.absent)]
        )


@dataclass(frozen=True)
class LeftOut:
    """A tier that cannot run here, and why."""

    tier: str
    why: str

    def __str__(self) -> str:
        return f"{self.tier:8} LEFT OUT: {self.why}"


@dataclass(frozen=True)
class Job:
    """What is run of a tier.

    Attributes:
        tier, ran_on: as in `Result`.
        modules: arguments of ``python -m``, one run after the other.
        variables: added to the environment.
        may_be_empty: whether it is fine when no test is selected.
        share: see `SHARES`.
    """

    tier: str
    ran_on: str
    modules: list[list[str]]
    variables: dict[str, str] = field(default_factory=dict)
    may_be_empty: bool = False
    share: float = 0


@dataclass(frozen=True)
class Plan:
    """Which jobs make up a tier.

    Attributes:
        hosts: every ComfyUI to test in.
        pytest_arguments: passed on to each pytest.
    """

    hosts: list[Host]
    pytest_arguments: list[str]

    def lint(self) -> Iterator[Job | LeftOut]:
        yield Job("lint", f"ruff {version('ruff')}", [["ruff", "check", "."], ["ruff", "format", "--check", "."]])

    def unit(self) -> Iterator[Job | LeftOut]:
        others = ("host", "device", "interop", "browser")
        paths = ["tests", *(f"--ignore=tests/{folder}" for folder in others)]
        yield self._pytest("unit", f"gguf {version('gguf')}", paths)

    def interop(self) -> Iterator[Job | LeftOut]:
        yield self._pytest("interop", f"diffusers {version('diffusers')}, gguf {version('gguf')}", ["tests/interop"])

    def host(self) -> Iterator[Job | LeftOut]:
        yield from self._in_every_host("host", ["tests/host", *(f"--ignore={path}" for path in SERVER_TESTS)])

    def device(self) -> Iterator[Job | LeftOut]:
        try:
            compiler()
        except NoCompiler as error:
            yield LeftOut("device", str(error))
            return
        yield from self._in_every_host("device", ["tests/device"])

    def server(self) -> Iterator[Job | LeftOut]:
        yield from self._in_every_host("server", list(SERVER_TESTS))

    def browser(self) -> Iterator[Job | LeftOut]:
        try:
            chromium = browser.installed_chromium()
            for host in self.hosts:
                browser.frontend_arguments(host)
        except browser.BrowserError as error:
            yield LeftOut("browser", str(error))
            return
        yield from self._in_every_host("browser", ["tests/browser"], f" with {chromium}")

    def _in_every_host(self, tier: str, paths: list[str], also: str = "") -> Iterator[Job | LeftOut]:
        for host in self.hosts:
            ran_on = f"ComfyUI {host.version} in {host.path}{also}"
            older = host != newest(self.hosts)
            selected = ["-m", f"not {NEWEST_HOST_ONLY}"] if older else []
            job = self._pytest(tier, ran_on, [*paths, *selected])
            share = job.share / 2 if older else job.share
            yield replace(job, variables={"COMFYUI_PATH": str(host.path)}, share=share)
        if not self.hosts:
            yield LeftOut(tier, "no ComfyUI was found and none could be cloned; COMFYUI_PATH names one")

    def _pytest(self, tier: str, ran_on: str, arguments: list[str]) -> Job:
        modules = [["pytest", *arguments, *self.pytest_arguments]]
        may_be_empty = bool(self.pytest_arguments)
        return Job(tier, f"{ran_on}, {_torch()}", modules, may_be_empty=may_be_empty, share=SHARES[tier])


# Dense twins at full width take gigabytes, which Linux hands out page by page: huge pages in a tenth of the time, and
# those that were used before, of which 4 GB are kept, in none. Other systems do not read this.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296"

# About what share of a whole run a tier takes: the longest begins first, so that none is left over at the end.
SHARES = {"host": 6, "unit": 5, "browser": 4, "server": 2.5, "interop": 2.5, "device": 0.5, "lint": 0}


def main(options: argparse.Namespace, hosts: list[Host]) -> int:
    """Runs the tiers.

    Args:
        options: as in `arguments.PARSERS`.
        hosts: every ComfyUI to test in; none leaves the tiers out that need one.

    Returns:
        the exit code, 1 when anything failed.
    """
    if options.newest:
        hosts = [host for host in hosts if host == newest(hosts)]
    plan = Plan(hosts, options.pytest)
    tiers = options.tier or (OF_THE_NEWEST if options.newest else TIERS)
    planned = [entry for tier in tiers for entry in getattr(plan, tier)()]
    results = _run_all(planned, max(1, options.jobs))

    print(f"\nPython {platform.python_version()} on {platform.platform()}")
    if options.newest:
        print("with", ", ".join(f"{name} {version(name)}" for name in NAMED_VERSIONS))
    print(*results, sep="\n")
    ran = [result for result in results if isinstance(result, Result)]
    failed = sum(result.failed for result in ran)
    print(f"{sum(result.passed for result in ran)} passed, {failed} failed")
    return 1 if failed else 0


NAMED_VERSIONS = ("torch", "numpy", "transformers", "comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package")

_printing = threading.Lock()


def _run_all(planned: list[Job | LeftOut], at_once: int) -> list[Result | LeftOut]:
    """Runs the jobs, ``at_once`` of them at a time; results as planned."""
    jobs = sorted((job for job in planned if isinstance(job, Job)), key=lambda job: job.share, reverse=True)
    if at_once == 1 or len(jobs) < 2:
        results = {id(job): _run(job) for job in jobs}
    else:
        print(f"{at_once} of these at a time: {', '.join(job.tier for job in jobs)}", flush=True)
        threads = max(1, (os.cpu_count() or 1) // at_once)
        with ThreadPoolExecutor(at_once) as pool:
            runs = [(job, pool.submit(_run, job, threads)) for job in jobs]
        results = {id(job): run.result() for job, run in runs}
    return [results[id(entry)] if isinstance(entry, Job) else entry for entry in planned]


def _run(job: Job, threads: int | None = None) -> Result:
    """Runs a job.

    Args:
        job: what to run.
        threads: on how many cores; then what it prints is shown when it has ended. None for all, shown at once.
    """
    if threads is None:
        _head(job)
        return _results(job, job.variables, None)
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with open(log, "wb") as output:
            result = _results(job, {**limits, **job.variables}, output)
        with _printing:
            _head(job)
            sys.stdout.write(log.read_text(encoding="utf-8", errors="replace"))
            sys.stdout.flush()
    return result


def _head(job: Job) -> None:
    print(f"\n=== {job.tier}: {job.ran_on}", flush=True)


def _results(job: Job, variables: dict[str, str], output: BinaryIO | None) -> Result:
    begin = time.monotonic()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for module in job.modules:
        if module[0] == "pytest":
            counts = _pytest(module, variables, output, job.may_be_empty)
        else:
            counts["failed" if _call(module, variables, output) else "passed"] += 1
    return Result(job.tier, job.ran_on, **counts, seconds=time.monotonic() - begin)


def _pytest(
    module: list[str], variables: dict[str, str], output: BinaryIO | None, may_be_empty: bool
) -> dict[str, int | tuple[str, ...]]:
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = _call([*module, f"--junitxml={report}"], variables, output)
        counts = _count(report)
    if code not in (0, 1) and not (code == 5 and may_be_empty):
        # Broken off (a crash, an import error in a conftest), or nothing collected where nothing was deselected.
        counts = {**counts, "failed": counts["failed"] or 1}
    return counts


def _call(module: list[str], variables: dict[str, str], output: BinaryIO | None) -> int:
    """Runs ``python -m`` in the project's root."""
    environment = {"GLIBC_TUNABLES": MALLOC, **os.environ, **variables}
    errors = subprocess.STDOUT if output else None
    return subprocess.call([sys.executable, "-m", *module], cwd=ROOT, env=environment, stdout=output, stderr=errors)


def _count(report: Path) -> dict[str, int | tuple[str, ...]]:
    """The counts of a JUnit report, all 0 where pytest wrote none, and the reasons for skipped tests."""
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0}
    suite = ET.parse(report).getroot().find("testsuite")
    tests, failures, errors, skipped = (int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    reasons = sorted({skip.get("message", "") for skip in suite.iter("skipped")})
    return {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped, "absent": tuple(reasons)}


def _torch() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU with {os.cpu_count()} cores"
    return f"torch {torch.__version__} on {device}"
