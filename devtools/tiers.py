"""``dev.py test``: the tests in tiers, and at the end what each tier ran on."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree as ET

import torch

from . import browser
from .cache import cache_folder
from .hosts import Host

ROOT = Path(__file__).resolve().parent.parent
SERVER_TESTS = ("tests/host/test_server.py", "tests/host/test_workflows.py")


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
class Runner:
    """Runs tiers: what they work with.

    Attributes:
        hosts: every ComfyUI to test in.
        pytest_arguments: passed on to each pytest.
    """

    hosts: list[Host]
    pytest_arguments: list[str]

    def lint(self) -> Iterator[Result | LeftOut]:
        begin = time.monotonic()
        codes = [_call(["ruff", *check, "."]) for check in (["check"], ["format", "--check"])]
        failed = sum(code != 0 for code in codes)
        yield Result("lint", f"ruff {version('ruff')}", len(codes) - failed, failed, 0, time.monotonic() - begin)

    def unit(self) -> Iterator[Result | LeftOut]:
        yield self._pytest(
            "unit",
            ["tests", "--ignore=tests/host", "--ignore=tests/interop", "--ignore=tests/browser"],
            f"gguf {version('gguf')}",
        )

    def interop(self) -> Iterator[Result | LeftOut]:
        yield self._pytest("interop", ["tests/interop"], f"diffusers {version('diffusers')}, gguf {version('gguf')}")

    def host(self) -> Iterator[Result | LeftOut]:
        yield from self._in_every_host("host", ["tests/host", *(f"--ignore={path}" for path in SERVER_TESTS)])

    def server(self) -> Iterator[Result | LeftOut]:
        yield from self._in_every_host("server", list(SERVER_TESTS))

    def browser(self) -> Iterator[Result | LeftOut]:
        try:
            chromium = browser.installed_chromium()
            for host in self.hosts:
                browser.frontend_arguments(host)
        except browser.BrowserError as error:
            yield LeftOut("browser", str(error))
            return
        yield from self._in_every_host("browser", ["tests/browser"], f" with {chromium}")

    def _in_every_host(self, tier: str, paths: list[str], also: str = "") -> Iterator[Result | LeftOut]:
        for host in self.hosts:
            ran_on = f"ComfyUI {host.version} in {host.path}{also}"
            yield self._pytest(tier, paths, ran_on, {"COMFYUI_PATH": str(host.path)})
        if not self.hosts:
            yield LeftOut(tier, "no ComfyUI was found and none could be cloned; COMFYUI_PATH names one")

    def _pytest(self, tier: str, paths: list[str], ran_on: str, variables: dict[str, str] | None = None) -> Result:
        print(f"\n=== {tier}: {ran_on}", flush=True)
        begin = time.monotonic()
        with TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            code = _call(["pytest", *paths, f"--junitxml={report}", *self.pytest_arguments], variables)
            counts = _count(report)
        if code not in (0, 1) and not (code == 5 and self.pytest_arguments):
            # Broken off (a crash, an import error in a conftest), or nothing collected where nothing was deselected.
            counts = {**counts, "failed": counts["failed"] or 1}
        return Result(tier, f"{ran_on}, {_torch()}", **counts, seconds=time.monotonic() - begin)


TIERS: dict[str, Callable[[Runner], Iterator[Result | LeftOut]]] = {
    "lint": Runner.lint,
    "unit": Runner.unit,
    "interop": Runner.interop,
    "host": Runner.host,
    "server": Runner.server,
    "browser": Runner.browser,
}


def main(arguments: list[str], hosts: list[Host]) -> int:
    """Runs the tiers.

    Args:
        arguments: ``[--tier NAME]… [-- pytest arguments]``.
        hosts: every ComfyUI to test in; none leaves the tiers out that need one.

    Returns:
        the exit code, 1 when anything failed.
    """
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="dev.py test", epilog="Arguments after -- go to pytest.")
    parser.add_argument("--tier", action="append", choices=TIERS, help="run only this tier; may be repeated")
    options = parser.parse_args(arguments[:split])
    runner = Runner(hosts, arguments[split + 1 :])
    results = [result for tier in options.tier or TIERS for result in TIERS[tier](runner)]

    print(f"\nPython {platform.python_version()} on {platform.platform()}")
    print(*results, sep="\n")
    ran = [result for result in results if isinstance(result, Result)]
    failed = sum(result.failed for result in ran)
    print(f"{sum(result.passed for result in ran)} passed, {failed} failed")
    return 1 if failed else 0


def _call(module: list[str], variables: dict[str, str] | None = None) -> int:
    """Runs ``python -m`` in the project's root, and keeps bytecode out of the host's folder."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(cache_folder() / "pycache"), **(variables or {})}
    return subprocess.call([sys.executable, "-m", *module], cwd=ROOT, env=environment)


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
