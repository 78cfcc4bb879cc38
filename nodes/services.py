"""Services of ComfyUI that a process may be without."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server import PromptServer


def running_server() -> PromptServer | None:
    """ComfyUI's server, or None in a process that has none, such as a script that uses ComfyUI as a library.

    Who starts a server has imported its module: to import it here would need all that a server needs.
    """
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
