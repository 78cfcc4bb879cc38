"""Runs a ComfyUI server with a copy of the pack in it, and sends prompts to it. Needs ComfyUI's own dependencies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch

from . import ROOT
from .cache import bytecode_variables
from .hosts import Host

STARTUP_SECONDS = 300
PROMPT_SECONDS = 1800

NOT_IN_THE_PACK = (".*", "__pycache__", "*.gguf", "*.safetensors", "build", "dist", "*.egg-info")

Workflow = dict[str, dict[str, Any]]
"""A prompt in API format: node id → ``{"class_type": …, "inputs": {…}}``."""

Progress = Callable[[str, int, int], None]
"""Called with a node's class, the step it has done and the number of its steps."""


class PromptError(RuntimeError):
    """A prompt that the server refused or that failed in a node; the message is the one that a person sees."""


class ServerError(RuntimeError):
    """The server did not start or has died; the message ends with the last lines of its log."""


def load_workflow(case: str) -> Workflow:
    """The prompt in ``tests/workflows/<case>/api.json``."""
    return json.loads((ROOT / "tests" / "workflows" / case / "api.json").read_text(encoding="utf-8"))


def set_inputs(workflow: Workflow, class_type: str, **inputs: Any) -> None:
    """Sets inputs of the one node of a class.

    Raises:
        ValueError: when the workflow has none or several of that class.
    """
    (node,) = (node for node in workflow.values() if node["class_type"] == class_type)
    node["inputs"].update(inputs)


def set_text_encoder(workflow: Workflow, path: Path) -> None:
    """Has the node ``clip`` load a text encoder, GGUF or not, by the node that loads such files."""
    workflow["clip"] = (
        {"class_type": "AuraFlowGGUFTextEncoderLoader", "inputs": {"text_encoder_name": path.name}}
        if path.suffix == ".gguf"
        else {"class_type": "CLIPLoader", "inputs": {"clip_name": path.name, "type": "stable_diffusion"}}
    )


def device_arguments() -> list[str]:
    """What ``main.py`` has to be told about the device: it finds GPUs itself and refuses to start without one."""
    return [] if torch.cuda.is_available() or torch.backends.mps.is_available() else ["--cpu"]


class Server:
    """A ComfyUI server in a process of its own; a context manager.

    Args:
        host: the ComfyUI; nothing in its folder is written.
        base: an empty folder for the pack's copy, inputs and outputs (ComfyUI's ``--base-directory``). Models may be
            put into its ``models/<kind>`` at any time.
        models: further model folders by kind, e.g. ``{"diffusion_models": folder}``.
        output: where images go, instead of ``base / "output"``.
        arguments: further ones for ``main.py``.

    Attributes:
        url: e.g. ``"http://127.0.0.1:40123"``.
        log: the file with all that the server prints.
    """

    def __init__(
        self,
        host: Host,
        base: Path,
        models: Mapping[str, Path],
        output: Path | None = None,
        arguments: Sequence[str] = (),
    ):
        self.host = host
        self.base = base
        self.models = models
        self.output = output or base / "output"
        self.arguments = arguments
        self.log = base / "server.log"
        self.url = f"http://127.0.0.1:{_free_port()}"

    def __enter__(self) -> Server:
        shutil.copytree(
            ROOT,
            self.base / "custom_nodes" / "auraflow-gguf",
            ignore=shutil.ignore_patterns(*NOT_IN_THE_PACK),
        )
        for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
            (self.base / "models" / kind).mkdir(parents=True)
        paths = self.base / "extra_model_paths.yaml"
        # JSON is YAML, and quotes a Windows path
        paths.write_text(json.dumps({"extra": {kind: str(folder) for kind, folder in self.models.items()}}))
        command = [sys.executable, str(self.host.path / "main.py"), *device_arguments()]
        command += ["--port", self.url.rsplit(":", 1)[1], "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--base-directory", str(self.base), "--output-directory", str(self.output)]
        command += ["--extra-model-paths-config", str(paths), "--database-url", "sqlite:///:memory:"]
        command += self.arguments
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.base,
                env={**os.environ, **bytecode_variables()},
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait(self) -> None:
        """Waits until the server ends or Ctrl-C is pressed."""
        with contextlib.suppress(KeyboardInterrupt):
            self._process.wait()

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def is_running(self) -> bool:
        return self._process.poll() is None

    def prompt(self, workflow: Workflow, progress: Progress = lambda node, step, steps: None) -> list[Path]:
        """Runs a workflow to its end.

        Returns:
            the image files it saved.

        Raises:
            PromptError: when the workflow is refused or a node fails.
            ServerError: when the server dies on it.
            TimeoutError: after half an hour.
        """
        return asyncio.run(asyncio.wait_for(self._prompt(workflow, progress), PROMPT_SECONDS))

    async def _prompt(self, workflow: Workflow, progress: Progress) -> list[Path]:
        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession(self.url) as session,
            session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as messages,
        ):
            async with session.post("/prompt", json={"prompt": workflow, "client_id": client}) as response:
                answer = await response.json()
            if response.status != 200:
                raise PromptError(_refusal(answer))
            images = []
            async for message in messages:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = message.json()
                data = event["data"]
                if data.get("prompt_id") != answer["prompt_id"]:
                    continue
                match event["type"]:
                    case "progress":
                        progress(workflow[data["node"]]["class_type"], data["value"], data["max"])
                    case "executed":
                        images += [self.output / image["subfolder"] / image["filename"] for image in _images(data)]
                    case "execution_error":
                        raise PromptError(f"{data['node_type']}: {data['exception_message'].strip()}")
                    case "execution_success":
                        return images
        raise ServerError(f"ComfyUI {self.host.version} went away while it ran the prompt.\n{self.log_tail()}")

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while self.is_running() and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/system_stats", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise ServerError(f"ComfyUI {self.host.version} in {self.host.path} did not start.\n{self.log_tail()}")


def _images(executed: dict) -> list[dict]:
    return (executed["output"] or {}).get("images", [])


def _refusal(answer: dict) -> str:
    """The sentence of a prompt that did not pass the server's validation: its own, and those of the nodes."""
    sentences = [answer["error"]["message"]]
    for node in answer["node_errors"].values():
        sentences += [f"{node['class_type']}: {error['message']}: {error['details']}" for error in node["errors"]]
    return "\n".join(sentences)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
