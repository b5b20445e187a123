"""The page Live GPU, run by Streamlit's own test driver, with a stand-in for NVML's library."""

from pathlib import Path

import pytest

from tests.helpers.nvml_library import build, use

pytest.importorskip("streamlit", reason="the extra `dashboard` is not installed")

import streamlit as st
from compiled_logprobs_dashboard import runs as jobs
from streamlit.testing.v1 import AppTest

APP = Path(__file__).parent.parent / "compiled_logprobs" / "dashboard" / "app.py"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No machine of an earlier test, and no run of this user's."""
    monkeypatch.setattr(jobs, "state_folder", lambda: tmp_path / "run")
    st.cache_resource.clear()
    yield
    st.cache_resource.clear()


@pytest.fixture
def page(library, monkeypatch):
    """Opens the page, with that library or without."""

    def open_page(with_library: bool = True, **environment: str) -> AppTest:
        use(library if with_library else None, monkeypatch)
        for name, value in environment.items():
            monkeypatch.setenv(f"FAKE_NVML_{name}", value)
        test = AppTest.from_file(str(APP), default_timeout=60).run()
        test.switch_page("app_pages/live_gpu.py").run()
        assert not test.exception, test.exception
        return test

    return open_page


OF_A_GPU = ("A kernel was running", "Power", "Temperature")


def metrics(test: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in test.metric}


def texts(test: AppTest) -> str:
    shown = [*test.caption, *test.info, *test.warning, *test.error, *test.subheader, *test.markdown]
    return "\n".join(one.value for one in shown).replace("\\", "")


def test_without_a_library_it_says_so_and_shows_this_machine(page):
    test = page(with_library=False)
    assert "No NVIDIA GPU is reported on here: NVML, the library of NVIDIA's driver, does not start" in texts(test)
    assert {"Processors busy", "Load", "Memory in use"} <= metrics(test).keys()
    assert "A kernel was running" not in metrics(test)
    assert "Not told here, so not drawn: power" in texts(test)


def test_one_gpu(page):
    test = page(GPUS="1")
    said = texts(test)
    assert [one.value.replace("\\", "") for one in test.subheader] == ["0: NVIDIA Fake 80GB", "The last minutes"]
    shown = metrics(test)
    assert shown["A kernel was running"] == "0 %" and shown["Power"] == "350 W" and shown["Temperature"] == "60 °C"
    assert "1001 MHz" in [metric.value for metric in test.metric]
    assert "No process computes on it" in said and "nothing holds the clocks down" in said
    assert "driver 999.1" in said
    help_text = next(metric.help for metric in test.metric if metric.label == "A kernel was running")
    assert "does not mean that the GPU is full" in help_text


def test_two_gpus_and_a_slice(page):
    test = page()
    assert [one.value.replace("\\", "") for one in test.subheader][:3] == [
        "0: NVIDIA Fake 80GB",
        "1: NVIDIA Fake 80GB",
        "1, slice 0: NVIDIA Fake 80GB MIG 1g.10gb",
    ]
    assert "MIG on" in texts(test) and "MIG off" in texts(test)
    processes = [frame.value for frame in test.dataframe if "process" in frame.value]
    assert list(processes[0]["process"]) == [4711, 4712] and list(processes[0]["memory"]) == ["0.0 GiB", "n/a"]


def test_throttling_is_said_in_words(page):
    test = page(REASONS="0x44")
    assert any("power cap, thermal slowdown by the hardware" in one.value for one in test.warning)


def test_an_idle_gpu_is_no_warning(page):
    test = page(REASONS="0x1")
    assert not test.warning and "idle: clocks are low for lack of work" in texts(test)


def test_what_this_user_may_not_see_is_na(page):
    test = page(HIDDEN="4", GPUS="2")
    assert "Processes: n/a" in texts(test) and "No process computes on it" not in texts(test)


@pytest.mark.parametrize(
    ("code", "said"), [("15", "GPU is lost"), ("4", "Insufficient Permissions"), ("999", "Unknown Error")]
)
def test_a_gpu_that_does_not_answer_is_said_and_shows_no_figure(page, code, said):
    test = page(RETURN=code)
    assert all(said in one.value for one in test.error) and len(test.error) == 2
    assert {one.value for one in test.metric if one.label in OF_A_GPU} == {"n/a"}


@pytest.mark.parametrize("at", [{"LOST_AT": "handle"}, {}], ids=["handle", "reads"])
def test_a_lost_gpu_is_shown_and_so_are_the_others(page, at):
    test = page(LOST="0", **at)
    assert [one.value.replace("\\", "") for one in test.subheader][:3] == [
        "0: n/a",
        "1: NVIDIA Fake 80GB",
        "1, slice 0: NVIDIA Fake 80GB MIG 1g.10gb",
    ]
    (error,) = test.error
    assert "GPU is lost: it has fallen off the bus" in error.value.replace("\\", "")
    for label in OF_A_GPU:
        values = [metric.value for metric in test.metric if metric.label == label]
        assert values[0] == "n/a" and "n/a" not in values[1:3], label


def test_figures_that_are_not_supported_are_na_and_never_0(page):
    test = page(RETURN="3")
    shown = metrics(test)
    assert not test.error
    for label in ("Memory in use", "A kernel was running", "Power", "Temperature"):
        values = {metric.value for metric in test.metric if metric.label == label}
        assert "n/a" in values, label
    assert shown and "0 %" not in {metric.value for metric in test.metric if metric.label == "A kernel was running"}


def test_charts_have_an_alternative(page):
    test = page()
    charts = test.get("plotly_chart")
    assert charts and all(chart.proto.alt for chart in charts)


def test_while_a_run_measures_it_does_not_look_by_itself(page, monkeypatch):
    monkeypatch.setattr(jobs, "latest", lambda: object())
    monkeypatch.setattr(jobs, "is_running", lambda job: True)
    test = page()
    (refresh,) = test.get("button_group")
    assert refresh.value == "off"
