"""One thread and the same examples in every run; what transformers deprecates is an error."""

import logging

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


class _Deprecations(logging.Handler):
    """Collects what transformers logs, rather than warns, about our use of it."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if "deprecat" in record.getMessage().lower():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_deprecation():
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert handler.messages == []
