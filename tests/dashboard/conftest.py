"""Each test of the dashboard has stores of its own, and nothing cached or running that another test left."""

import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

pytest.importorskip("streamlit", reason="the extra `dashboard` is not installed")

import streamlit as st
from compiled_logprobs_dashboard import frames, runs

from compiled_logprobs import store
from compiled_logprobs.store import ROOT_VARIABLE
from compiled_logprobs.store.files import Store
from tests.helpers import nvml_library
from tests.helpers.dashboard_server import dashboard
from tests.helpers.dashboard_stores import SCENARIOS


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    st.cache_resource.clear()
    monkeypatch.setattr(runs, "RUNS", runs.Runs())
    monkeypatch.setattr(runs, "user_state_path", lambda *_, **__: tmp_path)
    yield
    st.cache_resource.clear()
    if (run := runs.RUNS.latest) is not None:
        run.process.kill()
        run.process.wait()


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """Whatever else this machine does, and measures."""
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def program(monkeypatch):
    """Runs that program in place of `compiled-logprobs profile`."""
    popen = subprocess.Popen

    def use(text: str) -> None:
        monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", text], **rest))

    return use


@pytest.fixture
def scenario(monkeypatch, tmp_path):
    """From a scenario's name to its store, which is then the only one."""
    where = Store(tmp_path / "profiles")
    where.root.mkdir()
    monkeypatch.setenv(ROOT_VARIABLE, str(where.root))
    monkeypatch.setattr(store, "project_store", lambda: None)
    monkeypatch.setattr(store, "bundled_store", lambda: where)

    def make(name: str) -> Store:
        SCENARIOS[name](where)
        return where

    return make


@pytest.fixture
def load(scenario):
    """From a scenario's name, or none for what is stored, to the frames and the profile that is shown first."""

    def of(name: str | None = None):
        if name is not None:
            scenario(name)
        found = frames.load(frames.sources())
        return found, next(iter(found.profiles.values()), frames.Profile("yours", "0" * 16))

    return of


@pytest.fixture(scope="session")
def nvml(tmp_path_factory):
    """The stand-in for NVML's library."""
    return nvml_library.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A dashboard that runs, with the profiles of the checkout, of a user whose settings would open it to the world."""
    folder = tmp_path_factory.mktemp("user")
    (folder / ".streamlit").mkdir()
    (folder / ".streamlit" / "config.toml").write_text(
        '[server]\naddress = "0.0.0.0"\nallowedHosts = ["*"]\nenableCORS = false\nenableXsrfProtection = false\n'
        "enableStaticServing = true\n"
    )
    settings = {"STREAMLIT_SERVER_ADDRESS": "0.0.0.0", "TMPDIR": str(folder)}  # its runs wait for nobody who measures
    with dashboard(folder, cwd=Path(__file__).parents[2], **settings) as running:
        yield running
