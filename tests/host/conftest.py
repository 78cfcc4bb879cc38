"""Fixtures for tests in a real ComfyUI: the one that ``COMFYUI_PATH`` names, else the first that dev.py would find."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from auraflow_gguf.devtools import small_workflows as quick
from auraflow_gguf.devtools.cache import cache_folder
from auraflow_gguf.devtools.hosts import Host, find_hosts
from auraflow_gguf.devtools.server import ROOT, Server, device_arguments

HOSTS = find_hosts(ROOT, clone=False)
if not HOSTS:
    raise pytest.UsageError("tests/host needs a ComfyUI: set COMFYUI_PATH, or run `python dev.py test`")


def _enter_host(host: Host) -> None:
    """Makes ``comfy`` and the host's modules importable, set to this machine's device and a base directory of ours."""
    base = cache_folder() / f"in-process-{host.version}"
    base.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(host.path))
    from comfy.cli_args import args

    args.base_directory = str(base)
    args.cpu = "--cpu" in device_arguments()
    import utils.extra_config  # noqa: F401 (as main.py does, before ComfyUI's nodes put another utils on sys.path)


_enter_host(HOSTS[0])


@pytest.fixture(scope="session")
def host() -> Host:
    """The ComfyUI that these tests run in."""
    return HOSTS[0]


@pytest.fixture(autouse=True, scope="session")
def _gguf_folders() -> None:
    """What the pack's on_load does in a server; what else it does wants one, see test_server.py."""
    from auraflow_gguf.nodes.folders import register_gguf_folders

    register_gguf_folders()


@pytest.fixture(autouse=True, scope="session")
def _inference_mode() -> Iterator[None]:
    """ComfyUI executes nodes inside ``torch.inference_mode()``."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server with the pack in it and the random models of the demo."""
    with Server(host, tmp_path_factory.mktemp("comfyui"), quick.server_models()) as running:
        quick.add_files(running)
        yield running
