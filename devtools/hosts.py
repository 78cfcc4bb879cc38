"""Finds ComfyUI, the host, in the places where it may stand, or clones a pinned release. Standard library only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_folder, locked

REPOSITORY = "https://github.com/Comfy-Org/ComfyUI"
RELEASE = "0.33.0"
"""What is cloned where no ComfyUI is found."""


class HostError(RuntimeError):
    """A ComfyUI that was named is none; the message says which."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI on disk.

    Attributes:
        path: its root, the folder of ``main.py``.
        version: as ``comfyui_version.py`` has it, e.g. ``"0.33.0"``.
    """

    path: Path
    version: str

    @property
    def requirements(self) -> Path:
        return self.path / "requirements.txt"


def read_host(path: Path) -> Host | None:
    """The ComfyUI in ``path`` or, as in the portable build, in ``path/ComfyUI``; None where there is none."""
    for root in (path, path / "ComfyUI"):
        version_file = root / "comfyui_version.py"
        if version_file.is_file() and (root / "main.py").is_file():
            version = re.search(r'__version__ = "([^"]+)"', version_file.read_text(encoding="utf-8"))
            return Host(root.absolute(), version[1])
    return None


def find_hosts(root: Path, *, clone: bool) -> list[Host]:
    """Every ComfyUI to work with, the one to prefer first.

    First comes the first of: ``COMFYUI_PATH``; the ComfyUI in whose ``custom_nodes`` the pack stands; ``~/ComfyUI``;
    a clone of the pinned release in the cache folder. After it, for the tests: ``~/ComfyUI-0.16`` and the folders in
    ``AURAFLOW_GGUF_EXTRA_HOSTS``.

    Args:
        root: the pack's folder.
        clone: whether to clone where nothing is found.

    Raises:
        HostError: when an environment variable names a folder that holds no ComfyUI.
    """
    hosts = [_first(root, clone), read_host(Path.home() / "ComfyUI-0.16")]
    extra = os.environ.get("AURAFLOW_GGUF_EXTRA_HOSTS", "")
    hosts += [_named("AURAFLOW_GGUF_EXTRA_HOSTS", path) for path in extra.split(os.pathsep) if path]
    return list({host.path.resolve(): host for host in hosts if host}.values())


def newest(hosts: list[Host]) -> Host | None:
    return max(hosts, key=lambda host: [int(part) for part in re.findall(r"\d+", host.version)], default=None)


def _first(root: Path, clone: bool) -> Host | None:
    if named := os.environ.get("COMFYUI_PATH"):
        return _named("COMFYUI_PATH", named)
    around = read_host(root.parent.parent) if root.parent.name == "custom_nodes" else None
    return around or read_host(Path.home() / "ComfyUI") or _cloned(clone)


def _named(variable: str, path: str) -> Host:
    host = read_host(Path(path).expanduser())
    if host is None:
        raise HostError(f"{variable} names {path}, which holds no ComfyUI (main.py and comfyui_version.py)")
    return host


def _cloned(clone: bool) -> Host | None:
    target = cache_folder() / f"ComfyUI-{RELEASE}"
    if target.exists() or not clone:
        return read_host(target)
    if shutil.which("git") is None:
        print("No ComfyUI found, and no git to clone one with", file=sys.stderr)
        return None
    print(f"No ComfyUI found: cloning {REPOSITORY} v{RELEASE} to {target}", flush=True)
    with locked(target.with_name(f"{target.name}.lock")), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        if not target.exists():
            partial = Path(folder) / target.name
            command = ["git", "clone", "--quiet", "--depth=1", f"--branch=v{RELEASE}", REPOSITORY, str(partial)]
            environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
            cloned = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
            if cloned.returncode == 0:
                partial.rename(target)
            else:
                reason = (cloned.stderr.strip().splitlines() or ["git says no reason"])[-1]
                print(f"ComfyUI could not be cloned: {reason.removeprefix('fatal: ')}", file=sys.stderr)
    return read_host(target)
