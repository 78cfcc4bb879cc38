"""What a processor multiplies in hardware, as torch says or shows."""

import platform
import time

import pytest
import torch
from auraflow_gguf.loader.kernels import processor

ALL = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


@pytest.fixture
def says(monkeypatch):
    """A function that makes torch say of an x86 processor that it has these."""

    def say(*names: str) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        for name in ALL:
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in names, raising=False)

    return say


@pytest.mark.parametrize("names", [(), *((name,) for name in ALL), ALL], ids=str)
def test_x86(says, names):
    says(*names)
    assert processor.multiplies_bfloat16() == bool(names)


def test_a_torch_that_does_not_ask(says, monkeypatch):
    says(*ALL)
    for name in ALL:
        monkeypatch.delattr(torch.cpu, name)
    assert not processor.multiplies_bfloat16()


@pytest.fixture
def asked_anew():
    for function in (processor.made_by_amd, processor.multiplies_int8):
        function.cache_clear()
    yield
    for function in (processor.made_by_amd, processor.multiplies_int8):
        function.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_vendor_by_linux(monkeypatch, tmp_path, vendor):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: one\n")
    monkeypatch.setattr(processor, "CPUINFO", cpuinfo)
    assert processor.made_by_amd() == (vendor == "AuthenticAMD")


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_vendor_by_windows(monkeypatch, tmp_path, vendor):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(platform, "processor", lambda: f"AMD64 Family 25 Model 33 Stepping 0, {vendor}")
    assert processor.made_by_amd() == (vendor == "AuthenticAMD")


@pytest.mark.usefixtures("asked_anew")
def test_a_processor_that_multiplies_int8_in_no_time(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda x, weight: None)
    assert processor.multiplies_int8()


@pytest.mark.usefixtures("asked_anew")
def test_a_processor_that_multiplies_int8_slowly(monkeypatch):
    runs = []
    monkeypatch.setattr(torch, "_int_mm", lambda x, weight: runs.append(time.sleep(0.3)))
    assert not processor.multiplies_int8()
    assert not processor.multiplies_int8()
    assert len(runs) == 3  # and not once more: it is not asked again


@pytest.mark.usefixtures("asked_anew")
def test_a_torch_without_products_of_int8(monkeypatch):
    monkeypatch.delattr(torch, "_int_mm")
    assert not processor.multiplies_int8()


@pytest.mark.usefixtures("asked_anew")
def test_a_torch_without_products_of_int8_on_cpus(monkeypatch):
    def raise_not_implemented(x, weight):
        raise NotImplementedError("Could not run 'aten::_int_mm' with arguments from the 'CPU' backend.")

    monkeypatch.setattr(torch, "_int_mm", raise_not_implemented)
    assert not processor.multiplies_int8()


@pytest.mark.parametrize("supported", [False, True])
def test_arm(monkeypatch, supported):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert processor.multiplies_bfloat16() is supported
