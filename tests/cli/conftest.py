"""What tests of the command line share: it runs in this process, and nothing that it registers or imports stays."""

import sys
from collections.abc import Callable

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from compiled_logprobs.choose import tune
from compiled_logprobs.cli.main import app
from tests.helpers.stored_decisions import FakeTuner, decided


@pytest.fixture
def run(monkeypatch) -> Callable[..., Result]:
    """Calls the command line in this process, with the backends and the import path put back afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    registry = sys.modules["compiled_logprobs.backends"]  # a function of that name stands before it in the package
    for table in ("_targets", "_from_hidden"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine take ten times as long
    yield lambda *arguments, **options: CliRunner().invoke(app, arguments, **options)
    torch.set_num_threads(threads)


@pytest.fixture
def tuner(monkeypatch, tmp_path) -> FakeTuner:
    """Nothing is measured; the lock is this test's own."""
    made = FakeTuner()
    made.answer = lambda problem: decided(problem, seed=len(made.asked))
    monkeypatch.setattr(tune, "Tuner", made)
    monkeypatch.setattr("compiled_logprobs.tuning.tuner.tempfile.gettempdir", lambda: str(tmp_path))
    return made
