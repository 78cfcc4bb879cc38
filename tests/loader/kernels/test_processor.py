"""What a processor says of itself, as torch passes it on."""

import platform

import pytest
import torch
from auraflow_gguf.loader.kernels import processor

ALL = ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_vnni_supported")


@pytest.fixture
def says(monkeypatch):
    """A function that makes torch say of an x86 processor that it has these."""

    def say(*names: str) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        for name in ALL:
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in names, raising=False)

    return say


@pytest.mark.parametrize(
    ("names", "bfloat16", "int8"),
    [
        ((), False, False),
        (("_is_amx_tile_supported",), True, True),
        (("_is_avx512_bf16_supported",), True, False),
        (("_is_vnni_supported",), False, True),
    ],
    ids=str,
)
def test_x86(says, names, bfloat16, int8):
    says(*names)
    assert (processor.multiplies_bfloat16(), processor.multiplies_int8()) == (bfloat16, int8)


def test_a_torch_that_does_not_ask(says, monkeypatch):
    says(*ALL)
    for name in ALL:
        monkeypatch.delattr(torch.cpu, name)
    assert not processor.multiplies_bfloat16()
    assert not processor.multiplies_int8()


@pytest.mark.parametrize("supported", [False, True])
def test_arm(monkeypatch, supported):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert processor.multiplies_bfloat16() is supported
