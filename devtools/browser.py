"""A headless Chromium with ComfyUI's editor in it, for the browser tests and the pictures in the documentation."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Playwright, sync_playwright

from .cache import cache_folder, locked
from .hosts import Host

FRONTEND = "comfyui-frontend-package"
WINDOW = {"width": 1600, "height": 1000}
TIMEOUT_MS = 60_000  # of whatever is waited for; a slow machine is no failure

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# No tour, no question about models that the pack's templates name and nobody has.
_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.RightSidePanel.ShowErrorsTab": True,
    "Comfy.NodeSearchBoxImpl.FollowCursor": False,
    "Comfy.UserData.RestoreWorkflow": False,
    "Comfy.Workflow.Persist": False,
}

# In the graph's coordinates; a node's position is that of what is below its title.
_GRAPH_BOUNDS = """() => [
    Math.min(...app.graph.nodes.map((node) => node.pos[0])),
    Math.min(...app.graph.nodes.map((node) => node.pos[1] - 30)),
    Math.max(...app.graph.nodes.map((node) => node.pos[0] + node.size[0])),
    Math.max(...app.graph.nodes.map((node) => node.pos[1] + node.size[1])),
]"""


class BrowserError(RuntimeError):
    """The browser or the frontend cannot be had; the message says why and what the person can do."""


def find_chromium(playwright: Playwright) -> Path:
    """A Chromium or Chrome of this machine, else Playwright's own.

    Raises:
        BrowserError: there is none.
    """
    if found := next(filter(None, map(shutil.which, _NAMES)), None):
        return Path(found)
    for place in (*map(Path, _PLACES), Path(playwright.chromium.executable_path)):
        if place.exists():
            return place
    raise BrowserError("no Chromium or Chrome was found; install one, or run `playwright install chromium`")


def installed_chromium() -> str:
    """Name and version of the Chromium that the tests run in.

    Raises:
        BrowserError: there is none.
    """
    with sync_playwright() as playwright:
        path = find_chromium(playwright)
    shown = subprocess.run([str(path), "--version"], capture_output=True, text=True).stdout.strip()
    return shown or str(path)


def frontend_arguments(host: Host) -> list[str]:
    """What the host's ``main.py`` must be told to serve the frontend that the host was released with: nothing if it is
    the installed one, else the folder of a copy in the cache, fetched if it is lacking.

    Raises:
        BrowserError: pip cannot fetch it.
    """
    wanted = re.search(rf"^{FRONTEND}==(\S+)", host.requirements.read_text(encoding="utf-8"), re.MULTILINE)[1]
    if wanted == importlib.metadata.version(FRONTEND):
        return []
    target = cache_folder() / "frontends" / wanted
    with locked(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
                command += ["--disable-pip-version-check", "--target", f"{folder}/it", f"{FRONTEND}=={wanted}"]
                if subprocess.call(command):
                    raise BrowserError(f"pip could not fetch {FRONTEND} {wanted}, the frontend of {host.version}")
                Path(folder, "it").rename(target)
    return ["--front-end-root", str(target / "comfyui_frontend_package" / "static")]


class Editor:
    """ComfyUI's editor in a page.

    Attributes:
        page: Playwright's page.
        errors: what scripts of the pack or the page threw.
    """

    def __init__(self, page: Page):
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, url: str, **settings: Any) -> None:
        """Load the editor with an empty graph.

        Args:
            url: the server's.
            settings: those of the frontend to change, with ``_`` for the dots in their names.
        """
        changed = {name.replace("_", "."): value for name, value in settings.items()}
        response = self.page.request.post(f"{url}/api/settings", data=_SETTINGS | changed)
        if not response.ok:
            raise BrowserError(f"the server refused the settings: {response.status} {response.text()}")
        self.page.goto(url)
        self.page.wait_for_function(
            """() => {
                const manager = window.app?.extensionManager;
                if (!window.app?.graph || manager?.spinner !== false) return false;
                if (manager.workflow?.activeWorkflow) return true;
                // Older editors open no workflow by themselves when they restore none.
                window.readySince ??= performance.now();
                if (performance.now() - window.readySince > 3000 && !window.opensWorkflow) {
                    window.opensWorkflow = true;
                    manager.command.execute('Comfy.NewBlankWorkflow');
                }
                return false;
            }"""
        )
        self.clear()

    def clear(self) -> None:
        self.page.evaluate("() => { app.clean(); app.graph.clear(); }")

    def load(self, graph: dict) -> None:
        """Show a graph, in the schema of the editor."""
        self.page.evaluate("graph => app.loadGraphData(graph)", graph)

    def prompt(self) -> dict[str, Any]:
        """The graph as a prompt in API format, as the queue button sends it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def set_widgets(self, class_type: str, **values: Any) -> None:
        """Set widgets of every node of a class, as a person would."""
        self.page.evaluate(
            """([type, values]) => {
                for (const node of app.graph.nodes.filter((node) => node.type === type))
                    for (const [name, value] of Object.entries(values)) {
                        const widget = node.widgets.find((widget) => widget.name === name);
                        widget.value = value;
                        widget.callback?.(value);
                    }
            }""",
            [class_type, values],
        )

    def fit(self) -> None:
        """Show the whole graph, no larger than life."""
        self.page.evaluate(
            f"""() => {{
                const [left, top, right, bottom] = ({_GRAPH_BOUNDS})();
                const view = app.canvas.canvas.getBoundingClientRect();
                const [width, height] = [right - left, bottom - top];
                const scale = Math.min((view.width - 160) / width, (view.height - 160) / height, 1);
                app.canvas.ds.scale = scale;
                app.canvas.ds.offset[0] = (view.width / scale - width) / 2 - left;
                app.canvas.ds.offset[1] = (view.height / scale - height) / 2 - top;
                app.canvas.setDirty(true, true);
            }}"""
        )

    def bounds(self) -> tuple[int, int, int, int]:
        """Where the graph is in the page, in pixels: left, top, right, bottom."""
        return tuple(
            self.page.evaluate(
                f"""() => {{
                    const view = app.canvas.canvas.getBoundingClientRect();
                    const {{ scale, offset }} = app.canvas.ds;
                    return ({_GRAPH_BOUNDS})().map((value, index) =>
                        Math.round((value + offset[index % 2]) * scale + (index % 2 ? view.top : view.left)));
                }}"""
            )
        )

    def frame(self) -> None:
        """Wait until what has changed is drawn."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@contextlib.contextmanager
def browser(**options: Any) -> Iterator[Editor]:
    """An editor in a fresh profile of a headless Chromium; ``options`` are those of Playwright's context."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=find_chromium(playwright),
            headless=True,
            args=list(_FLAGS),
            **{"viewport": WINDOW, "locale": "en-US", **options},
        )
        context.set_default_timeout(TIMEOUT_MS)
        try:
            yield Editor(context.pages[0])
        finally:
            context.close()
