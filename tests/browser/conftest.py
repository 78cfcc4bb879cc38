"""A server with the frontend that its host was released with, and a browser that shows its editor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from auraflow_gguf.devtools import small_workflows as quick
from auraflow_gguf.devtools.browser import TIMEOUT_MS, Editor, browser, frontend_arguments
from auraflow_gguf.devtools.cache import cache_folder
from auraflow_gguf.devtools.hosts import find_hosts
from auraflow_gguf.devtools.random_models import cached_auraflow, write_hollow_fit
from auraflow_gguf.devtools.server import ROOT, Server
from playwright.sync_api import expect

BAD_FILE = "bad.gguf"
FITTED_FILE = "fitted.gguf"

expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    host = find_hosts(ROOT, clone=False)[0]
    base: Path = tmp_path_factory.mktemp("comfyui")
    with Server(host, base, quick.server_models(), arguments=frontend_arguments(host)) as running:
        quick.add_files(running)
        with open(cached_auraflow(), "rb") as whole:
            (running.base / "models" / "diffusion_models" / BAD_FILE).write_bytes(whole.read(2**20))
        write_hollow_fit(running.base / "models" / "diffusion_models" / FITTED_FILE)
        yield running


@pytest.fixture(scope="session")
def shared_editor() -> Iterator[Editor]:
    with browser() as opened:
        yield opened


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep a picture of what the browser showed when a test failed."""
    report = yield
    if report.failed and report.when == "call" and "shared_editor" in item.funcargs:
        path = cache_folder() / "browser" / f"{re.sub(r'[^a-z0-9]+', '-', item.name.lower())}.png"
        path.parent.mkdir(exist_ok=True)
        item.funcargs["shared_editor"].page.screenshot(path=path)
        report.sections.append(("the browser showed", str(path)))
    return report


@pytest.fixture
def same_editor(shared_editor: Editor, server: Server) -> Iterator[Editor]:
    """The editor with an empty graph, loaded by the first of the tests in a row that share it."""
    shared_editor.errors.clear()
    if shared_editor.page.evaluate("() => window.isShared"):
        shared_editor.clear()
    else:
        shared_editor.open(server.url)
        shared_editor.page.evaluate("() => { window.isShared = true; }")
    yield shared_editor
    assert shared_editor.errors == []


@pytest.fixture
def editor(shared_editor: Editor, server: Server) -> Iterator[Editor]:
    """The editor with an empty graph; no script may throw while a test uses it."""
    shared_editor.errors.clear()
    shared_editor.open(server.url)
    yield shared_editor
    assert shared_editor.errors == []
