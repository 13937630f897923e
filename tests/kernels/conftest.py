"""What the kernels do not write is NaN here."""

import device
import pytest
import torch


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote_is_nan():
    """Under deterministic algorithms torch fills new memory with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def values_are_looked_at(monkeypatch):
    """On an accelerator, where looking costs a synchronisation, only where it is asked for."""
    if device.DEVICE.type != "cpu":
        monkeypatch.setenv("TOKENDROP_DEBUG", "1")
