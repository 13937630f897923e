"""One thread and the same examples in every run; what transformers deprecates is an error."""

import logging
from pathlib import Path

import device
import families_table
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tokendrop", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tokendrop")
torch.set_num_threads(1)
device.use()


# Files that take long come first, so that two workers end together.
LONG = ("distributed", "examples", "study", "cli", "callbacks", "analysis", "engine")


def pytest_collection_modifyitems(items):
    def place(item):
        room = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONG.index(room) if room in LONG else len(LONG)

    items.sort(key=place)


def pytest_addoption(parser):
    parser.addoption("--families-table", action="store_true", help="write docs/families.md from this run's results")


def pytest_configure(config):
    if config.getoption("--families-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(families_table.Collector())


@pytest.fixture
def cell(request, record_property):
    """Records what a family can do, and holds docs/families.md to it."""

    def found(family, column, result="pass"):
        record_property("cell", [family, column, result])
        if not request.config.getoption("--families-table"):
            assert families_table.committed()[0][family, column] == result

    return found


@pytest.fixture
def refusal(request, record_property):
    """Records what is refused for a family and why, and holds docs/families.md to it."""

    def found(family, what, message):
        record_property("refusal", [family, what, message])
        if not request.config.getoption("--families-table"):
            assert family in families_table.committed()[1][what, message]

    return found


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
        message = record.getMessage()
        # Janus and assisted decoding call transformers' own `generate` this way.
        if "deprecat" in message.lower() and not message.startswith("Passing `generation_config`"):
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_deprecation():
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert handler.messages == []
