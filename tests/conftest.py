"""Every test starts from an empty store of its own, and measures nothing unless it asks to."""

import pytest

from compiled_logprobs import policy
from compiled_logprobs.choose import memory
from compiled_logprobs.store import ROOT_VARIABLE
from compiled_logprobs.tuning import headway


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Note of each test whether `make quick` takes it, before any is deselected: tests/test_house.py counts."""
    config.is_quick = [not any(map(item.get_closest_marker, ("slow", "browser", "gpu"))) for item in items]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path_factory):
    monkeypatch.delenv("COLUMNS", raising=False)  # which pytest-xdist sets, and no user of a pipe has
    monkeypatch.setenv(policy.MODE_VARIABLE, "off")
    policy._of_process.cache_clear()
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path_factory.mktemp("profiles")))
    monkeypatch.setattr(memory, "MEMORY", memory.Memory())
    monkeypatch.setattr(headway, "cache_folder", lambda: None)  # so that no process is the first
    yield
    policy._of_process.cache_clear()


@pytest.fixture
def mode(monkeypatch):
    """Sets the mode as its environment variable does for a new process."""

    def change(name: str) -> None:
        monkeypatch.setenv(policy.MODE_VARIABLE, name)
        policy._of_process.cache_clear()

    return change
