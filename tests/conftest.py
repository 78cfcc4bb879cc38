"""Makes the pack importable as ``auraflow_gguf``, from its folder, whatever the folder is called."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _register_pack() -> None:
    if "auraflow_gguf" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "auraflow_gguf", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["auraflow_gguf"] = module
    spec.loader.exec_module(module)


_register_pack()
