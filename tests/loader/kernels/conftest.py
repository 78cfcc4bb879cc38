import pytest
import torch
from auraflow_gguf.loader.kernels import processor
from auraflow_gguf.loader.kernels.native import build

from ...compiled import clang_or_skip


@pytest.fixture(params=[1, 3])
def threads(request):
    """How many torch works on."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def ours(monkeypatch):
    """What is computed in C of our own on AMD's processors is so on any."""
    monkeypatch.setattr(processor, "made_by_amd", lambda: True)


@pytest.fixture(params=["gcc", "clang"])
def compiler(request) -> str:
    """The path of one that compiles the C."""
    return clang_or_skip() if request.param == "clang" else build._compiler()
