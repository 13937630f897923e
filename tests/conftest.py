"""One thread and the same examples in every run."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tokendrop", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tokendrop")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
