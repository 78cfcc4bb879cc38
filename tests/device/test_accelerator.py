"""The simulated accelerator itself: numbers, one device, its limit and counters, and the order of streams."""

import pytest
import torch

from .simulated import accelerator
from .simulated.accelerator import Stream, counters, current_stream, limited, reset

DEVICE = torch.device("simulated", 0)
OTHER = torch.device("simulated", 1)


def noise(*shape, device=DEVICE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def test_operators_give_the_numbers_of_the_cpu():
    x, w = noise(3, 8), noise(5, 8)

    def some(x, w):
        y = torch.nn.functional.linear(x, w)
        y[:, 1:3] += 1
        y[y > 1] = 0.5
        z = torch.cat([y, y.flip(0)]).view(2, 15).to(torch.bfloat16).float()
        return [y, z, y.softmax(-1), torch.nn.functional.layer_norm(y, (5,)), y.argmax(), y[[0, 2]], *y.chunk(2, 1)]

    for ours, theirs in zip(some(x, w), some(x.cpu(), w.cpu()), strict=True):
        assert ours.device == DEVICE
        torch.testing.assert_close(ours.cpu(), theirs)
    assert (x.sum().item(), bool(torch.equal(x, x.clone()))) == (x.cpu().sum().item(), True)


def test_views_share_memory_and_results_given_a_place_use_it():
    x = torch.zeros(4, 4, device=DEVICE)
    before = counters()
    x[1:].view(-1).add_(1)
    assert x.sum().item() == 12
    assert counters().blocks == before.blocks
    out = torch.empty(0, device=DEVICE)
    torch.mm(x, x, out=out)
    assert torch.equal(out.cpu(), x.cpu() @ x.cpu())
    assert counters().allocated == before.allocated + out.nbytes


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, there: x + there,
        lambda x, there: torch.nn.functional.linear(there, x),
        lambda x, there: torch.cat([x, there]),
        lambda x, there: torch.mm(x, x, out=there),
        lambda x, there: x.index_select(0, there[0].long()),
    ],
)
@pytest.mark.parametrize("device", [torch.device("cpu"), OTHER])
def test_tensors_of_two_devices_are_refused(operation, device):
    with pytest.raises(RuntimeError, match="device"):
        operation(noise(3, 3), torch.ones(3, 3, device=device))
    assert torch.equal((noise(3) * torch.tensor(2.0)).cpu(), noise(3).cpu() * 2)


def test_memory_is_limited_and_counted():
    start = counters()
    with limited(start.allocated + 4000):
        x = torch.empty(500, device=DEVICE)
        assert x.isnan().all()
        with pytest.raises(torch.OutOfMemoryError, match="simulated:0 is out of memory: tried to allocate 2400 bytes"):
            torch.empty(600, device=DEVICE)
        with pytest.raises(torch.OutOfMemoryError):
            x.double()
    reset()
    assert counters().allocated == start.allocated + 2000
    y = x + 1
    del x, y
    assert counters().peak == start.allocated + 4000
    assert counters()[1:4:2] == start[1:4:2]


def test_what_is_copied_is_counted():
    reset()
    reset(1)
    x = noise(100)
    x.cpu()
    x[:10].to(OTHER)
    x.clone()
    assert counters()[4:] == (400, 400, 0)
    assert counters(1)[4:] == (0, 0, 40)
    x.sum().item()
    assert counters().to_host == 404


def test_page_locked_memory():
    x = torch.ones(8).pin_memory()
    assert x.is_pinned()
    assert x[3:].is_pinned()
    y = torch.ones(8)
    assert not y.is_pinned()
    assert accelerator.cudart().cudaHostRegister(y.data_ptr(), y.nbytes, 1) == 0
    assert y.is_pinned()
    assert accelerator.cudart().cudaHostUnregister(y.data_ptr()) == 0
    assert accelerator.cudart().cudaHostUnregister(y.data_ptr()) != 0
    assert not y.is_pinned()


def test_a_stream_has_to_wait_for_what_another_writes():
    stream, x = Stream(DEVICE), noise(8) * 1
    with (
        pytest.raises(RuntimeError, match=r"stream \d+ of simulated:0 reads a buffer of 32 bytes that stream 0"),
        stream,
    ):
        x + 1
    stream.wait_stream(current_stream(DEVICE))
    with stream:
        y = x * 2
    with pytest.raises(RuntimeError, match=r"aten::add.*has written, and has not waited for that stream"):
        y + 1
    event = stream.record_event()
    current_stream(DEVICE).wait_event(event)
    assert torch.equal((y + 1).cpu(), 2 * x.cpu() + 1)


def test_a_stream_has_to_wait_for_those_that_read_what_it_writes():
    stream, x = Stream(DEVICE), noise(8)
    stream.wait_stream(current_stream(DEVICE))
    with stream:
        x.sum()
    with pytest.raises(RuntimeError, match="writes a buffer of 32 bytes that stream"):
        x.zero_()
    accelerator.synchronize(DEVICE)
    x.zero_()


def test_memory_is_not_given_back_while_another_stream_uses_it():
    stream = Stream(DEVICE)

    def use_elsewhere(then):
        x = noise(8)
        stream.wait_stream(current_stream(DEVICE))
        with stream:
            x.sum()
        then(x)

    use_elsewhere(lambda x: None)
    with pytest.raises(RuntimeError, match="or did when the memory was given back"):
        noise(8)
    current_stream(DEVICE).wait_stream(stream)
    use_elsewhere(lambda x: x.record_stream(stream))
    noise(8)
    use_elsewhere(lambda x: current_stream(DEVICE).wait_stream(stream))
    noise(8)
