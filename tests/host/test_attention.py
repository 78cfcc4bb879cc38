"""ComfyUI's AuraFlow attends by our own C on a CPU, and by what its user chooses where there is a choice."""

import comfy.cli_args
import pytest
import torch
from auraflow_gguf.loader.comfyui import attention as door
from auraflow_gguf.loader.comfyui.model import load_model
from auraflow_gguf.loader.kernels import processor
from comfy.ldm.modules import attention as host

from ..compiled import function_or_skip
from .aura_files import load_dense, make_gguf
from .sampling import relative_error, sample

SETTINGS = {"steps": 2, "size": 16, "tokens": 9}


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    function_or_skip("attention.c", "attention")
    monkeypatch.setattr(processor, "made_by_amd", lambda: True)


@pytest.fixture
def calls(monkeypatch) -> list[torch.Size]:
    """The shape of each query that our own C takes."""
    taken, attention = [], door.attention
    monkeypatch.setattr(door, "attention", lambda q, k, v, s: taken.append(q.shape) or attention(q, k, v, s))
    return taken


def load():
    return load_model(make_gguf("Q4_0"), torch.float32)


def by_host(*_, **__):
    return "by the host"


def test_latents_equal_those_of_the_hosts_attention(calls):
    model = load()
    latents = sample(model, **SETTINGS)
    assert len(calls) >= 4  # one in each layer, at each step
    assert set(calls) == {torch.Size((calls[0][0], 12, calls[0][2], 256))}
    calls.clear()
    assert relative_error(latents, sample(load_dense(make_gguf("Q4_0")), **SETTINGS)) < 1e-5
    assert calls == []  # a dense model is the host's alone
    assert torch.equal(sample(model.clone(), **SETTINGS), latents)
    assert calls


@pytest.mark.parametrize("argument", [None, "use_quad_cross_attention"])
def test_what_the_user_chooses_stays(monkeypatch, argument):
    if argument:
        monkeypatch.setattr(comfy.cli_args.args, argument, True)
    else:
        monkeypatch.setattr(host, "optimized_attention", host.attention_pytorch)
    assert door.OVERRIDE not in load().model_options["transformer_options"]


def test_a_node_may_choose_another(calls):
    model = load().clone()
    others = []

    def another(func, *args, **kwargs):
        others.append(func)
        return func(*args, **kwargs)

    model.model_options["transformer_options"][door.OVERRIDE] = another
    sample(model, **SETTINGS)
    assert others
    assert calls == []


@pytest.mark.parametrize(
    "asked",
    [
        {"mask": torch.zeros(1, 5)},
        {"skip_reshape": False},
        {"skip_output_reshape": True},
        {"scale": 2.0},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_what_auraflow_does_not_ask_is_left_to_the_host(calls, asked):
    x = torch.randn(1, 2, 5, 32)
    plain = {"skip_reshape": True, "transformer_options": {}, "attn_precision": None}
    assert door.attend(by_host, x, x, x, 2, **plain | asked) == "by the host"
    assert calls == []
    expected = host.attention_sub_quad(x, x, x, 2, skip_reshape=True)
    torch.testing.assert_close(door.attend(by_host, x, x, x, 2, **plain), expected)


@pytest.mark.parametrize("trained", range(3))
def test_gradients_go_through_the_hosts(calls, trained):
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [torch.randn(1, 2, 5, 32, requires_grad=i == trained) for i in range(3)]
        assert door.attend(by_host, *inputs, 2, skip_reshape=True) == "by the host"
    assert calls == []


def test_a_compiled_model_keeps_the_hosts_in_its_graph(calls):
    x = torch.randn(1, 2, 5, 32)
    run = torch.compile(lambda x: door.attend(host.attention_pytorch, x, x, x, 2, skip_reshape=True), backend="eager")
    torch.testing.assert_close(run(x), host.attention_sub_quad(x, x, x, 2, skip_reshape=True))
    assert calls == []
