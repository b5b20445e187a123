"""What tests of choices share: a stand-in for the tuner, for the short check, and for the current folder."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from compiled_logprobs import store
from compiled_logprobs.choose import rule, tune
from compiled_logprobs.store.files import Store
from tests.helpers.stored_decisions import FakeTuner


@pytest.fixture
def fake(monkeypatch, mode, tmp_path) -> FakeTuner:
    """New problems are measured, by a stand-in; its lock is this test's own."""
    mode("tune")
    made = FakeTuner()
    monkeypatch.setattr(tune, "Tuner", made)
    monkeypatch.setattr("compiled_logprobs.tuning.tuner.tempfile.gettempdir", lambda: str(tmp_path))
    return made


@pytest.fixture
def checks(monkeypatch) -> dict[str, bool]:
    """No check is run: a backend passes unless this says otherwise."""
    passed: dict[str, bool] = {}
    monkeypatch.setattr(rule, "check_backend", lambda name, *_, **__: SimpleNamespace(passed=passed.get(name, True)))
    return passed


@pytest.fixture
def nothing_measures(monkeypatch):
    def fail(*_, **__):
        pytest.fail("it measured")

    monkeypatch.setattr(tune, "Tuner", fail)
    monkeypatch.setattr(rule, "check_backend", fail)


@pytest.fixture
def own_registry(monkeypatch):
    """A registry that forgets what a test registers."""
    module = sys.modules["compiled_logprobs.backends"]  # a function of that name stands before it in the package
    for table in ("_targets", "_from_hidden"):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    monkeypatch.setattr(module, "_loaded", dict(module._loaded))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The current folder, which has no profiles yet; nor has the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "bundled_store", lambda: Store(tmp_path / "bundled"))
    return tmp_path
