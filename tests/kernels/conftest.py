"""What the kernels do not write is NaN here."""

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote_is_nan():
    """Under deterministic algorithms torch fills new memory with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
