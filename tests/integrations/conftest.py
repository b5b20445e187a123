"""No network, and no profile of this machine: the default rule chooses the backend, so that runs can be compared."""

import os
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="huggingface-")
os.environ["COMPILED_LOGPROBS_MODE"] = "off"
os.environ["COMPILED_LOGPROBS_PROFILES"] = tempfile.mkdtemp(prefix="profiles-")

_figures: list[str] = []


@pytest.fixture
def report():
    """Takes lines to be printed when all tests have run."""
    return _figures.append


def pytest_terminal_summary(terminalreporter):
    if _figures:
        terminalreporter.section("figures")
    for line in _figures:
        terminalreporter.write_line(line)
