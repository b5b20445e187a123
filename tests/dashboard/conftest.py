"""Each test of the dashboard has stores of its own, and nothing cached or running that another test left."""

from pathlib import Path

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
        return found, next(iter(found.labels().values()), frames.Profile("yours", "0" * 16))

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
        "maxUploadSize = 1000\nenableStaticServing = true\n[browser]\ngatherUsageStats = true\n"
    )
    settings = {"STREAMLIT_SERVER_ADDRESS": "0.0.0.0", "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "true"}
    settings["TMPDIR"] = str(folder)  # so that its runs wait for nobody else who measures
    with dashboard(folder, cwd=Path(__file__).parents[2], **settings) as running:
        yield running
