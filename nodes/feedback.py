"""What a node shows at its place in the graph: a bar while it works, and a line when it is done."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from .services import running_server


def shown_progress() -> Callable[[int, int], None]:
    """A progress callback that moves the node's bar, and stops when the person interrupts."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


def show_line(node: type[io.ComfyNode], line: str) -> None:
    """Write a line into a node with `io.Hidden.unique_id`; without a server, or outside of a graph, it has no place."""
    server = running_server()
    if server is not None and node.hidden is not None and node.hidden.unique_id is not None:
        server.send_progress_text(line, node.hidden.unique_id)
