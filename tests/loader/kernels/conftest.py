import pytest
import torch


@pytest.fixture(params=[1, 3])
def threads(request):
    """How many torch works on."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
