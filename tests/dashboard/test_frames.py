"""Profiles as DataFrames: what a row holds, which files are read, what is stale, and what serves a shape."""

import dataclasses
import json
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import torch
from compiled_logprobs_dashboard import frames as module
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.answers import look_up
from compiled_logprobs_dashboard.frames import CANDIDATES, DECISIONS, Profile, device_name, sources
from compiled_logprobs_dashboard.tables.overview import decisions, maps, squares

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import bucket
from compiled_logprobs.store.files import Store
from tests.helpers import dashboard_stores as stores
from tests.helpers.stored_decisions import decided

SHAPE = stores.problem()
OURS = Profile("yours", stores.here().fingerprint())


@pytest.fixture
def read(monkeypatch):
    """The files of decisions that are opened."""
    opened: list[Path] = []
    real = module.read_decision
    monkeypatch.setattr(module, "read_decision", lambda path: opened.append(path) or real(path))
    module._rows.cache_clear()
    return opened


def test_a_row_holds_what_the_decision_holds(load):
    frames, _ = load("one")
    decision, row = stores.good(), frames.decisions.iloc[0]
    assert row["timed_rows"] == decision.measured_rows
    for name in ("chosen", "baseline", "measured_at", "tuning_seconds", "problem"):
        assert row[name] == getattr(decision, name), name
    assert (row["rows"], row["vocab"], row["dtype"], row["mode"]) == (512, stores.QWEN, "bfloat16", "backward")
    assert row["name"] == "512 x 151,936 bfloat16 on cpu, backward" and row["against"] == "plain log_softmax"
    assert (row["bandwidth_read"], row["bandwidth_copy"], row["bandwidth_in_place"]) == (3.5e10, 3.1e10, 4.5e10)
    assert (row["source"], row["environment"]) == OURS and pd.isna(row["stale"])
    for backend, candidate in decision.candidates.items():
        (line,) = frames.candidates[frames.candidates["backend"] == backend].to_dict("records")
        assert line["key"] == row["key"] and line["chosen"] == (backend == "cpp")
        assert line["outcome"] == candidate.outcome and len(line["passed"]) == len(candidate.checks)
        speedup, over_plain = candidate.speedup, candidate.speedup_over_plain
        values = {"seconds": candidate.seconds, "ratio": speedup and speedup.median}
        values |= {"speedup": over_plain and over_plain.median, "speedup_low": over_plain and over_plain.low}
        for column, value in values.items():
            assert pd.isna(line[column]) if value is None else line[column] == value, column


def test_columns_are_there_without_any_row_or_figure(load):
    frames, profile = load("no profile")
    assert set(frames.decisions) == {*DECISIONS, "device", "stale"} and set(frames.candidates) == set(CANDIDATES)
    assert frames.decisions.empty and frames.environments.empty and frames.broken.empty and frames.backends == ()
    assert frames.facts(profile) == {} and look_up(frames, profile, SHAPE).kind == "none"
    frames, _ = load("partial")  # what was not measured stays missing
    assert frames.candidates["extra_multiple"].isna().all() and frames.decisions["bandwidth_read"].isna().all()
    assert frames.environments["device_type"].tolist() == ["cpu"], "a decision tells facts, too"


def test_only_what_changed_is_read_again(load, read, scenario):
    where = scenario("many")
    first, _ = load()
    assert len(first.decisions) == 42 and len(set(read)) == 42
    changed, removed, new = (stores.problem(rows) for rows in (64, 512, 4096))
    stores.publish(where, stores.good(changed, measured_at=stores.EARLIER))
    stores.publish(where, stores.good(new))
    where.path(OURS.environment, removed).unlink()
    read.clear()
    frames, _ = load()
    assert {path.name for path in read} >= {where.path(OURS.environment, what).name for what in (changed, new)}
    assert len(read) <= 2 + len(where.folders()), "and one of each folder, for its facts"
    same = frames.of(OURS).query(f"mode == 'backward' and dtype == 'bfloat16' and vocab == {stores.QWEN}")
    assert same.set_index("rows")["measured_at"].to_dict() == {64: stores.EARLIER, 2048: stores.AT, 4096: stores.AT}
    chosen = frames.candidates[frames.candidates["chosen"]].set_index("key")["backend"]
    assert (frames.decisions.set_index("key")["chosen"] == chosen).all(), "each candidate belongs to its decision"


def test_files_that_cannot_be_read_are_listed_with_the_reason(load, scenario):
    facts = scenario("corrupt").path(OURS.environment, stores.problem()).parents[1] / "environment.json"
    facts.write_text("{")
    facts.parent.joinpath("decisions", os.fsdecode(b"\xff.json")).write_text("{}")  # a name that is no text
    frames, _ = load()
    assert len(frames.decisions) == len(frames.environments) == 1 and set(frames.broken["source"]) == {"yours"}
    reasons = frames.broken.set_index(frames.broken["path"].str.extract("(n[0-9]+|environment)")[0])["reason"]
    said = {"n1": "JSON", "n3": "JSON", "n4": "another problem", "n24": "regular", "environment": "JSON"}
    assert len(reasons) == 6 and all(words in reasons[name] for name, words in said.items())


def test_each_source_has_profiles_of_its_own(scenario, monkeypatch, tmp_path):
    other = Store(tmp_path / "other")
    stores.SCENARIOS["all failed"](other)
    assert sources() == {"yours": scenario("one")}
    frames = module.load({**sources(), "project": other})
    assert frames.decisions["source"].tolist() == ["yours", "project", "project"]
    assert frames.decisions["key"].tolist() == [0, 1, 2] and set(frames.candidates["key"]) == {0, 1, 2}
    assert len(frames.environments) == 2 and len(frames.of(OURS)) == 1
    monkeypatch.setenv("COMPILED_LOGPROBS_PROFILES", str(tmp_path / "nowhere"))
    assert list(sources()) == ["bundled"]


def test_stale_says_what_is_another(load, scenario):
    where = scenario("other device")
    stores.publish(where, stores.good())
    old = dataclasses.replace(stores.here(), torch="1.0.0")
    stores.publish(where, stores.good(), old)
    changed = stores.with_changes(stores.good_candidates(), "cpp", fingerprint="0" * 16)
    stores.publish(where, stores.good(stores.problem(64), candidates=changed))
    foreign = {**stores.good_candidates(), "third": stores.good_candidates()["cpp"]}
    stores.publish(where, decided(stores.problem(128), "third", candidates=foreign))
    by = load()[0].decisions.set_index(["environment", "rows"])["stale"]
    here = OURS.environment
    assert pd.isna(by[here, 512])
    assert by[old.fingerprint(), 512] == f"measured with torch 1.0.0; this machine has {stores.here().torch}"
    assert by[here, 64] == "backend cpp has changed since this was measured"
    assert by[here, 128] == "backend third, which it chose, is not registered here"
    assert by[stores.H100.fingerprint(), 2048].str.startswith("measured with torch 2.12.0;").all()


def test_facts_that_are_no_facts_count_as_missing(load, scenario):
    path = scenario("one").path(OURS.environment, stores.problem()).parents[1] / "environment.json"
    path.write_text(json.dumps(stores.here().to_dict() | {"cpu_threads": "many", "torch": 5, "driver": "x" * 10**4}))
    frames, profile = load()
    facts = frames.facts(profile)
    assert facts["cpu_threads"] is None and facts["torch"] is None and len(facts["driver"]) < 1000
    assert pa.Table.from_pandas(frames.environments).num_rows == 1, "as Streamlit sends it"


def test_devices_are_told_apart(load):
    assert device_name(dataclasses.asdict(stores.H100)) == "NVIDIA H100 80GB HBM3, 132 SMs"
    assert device_name({"device_type": "cpu", "cpu_model": "Some CPU", "cpu_threads": 4}) == "Some CPU, 4 threads"
    assert device_name({}) == "unknown device"
    frames, profile = load("other device")
    facts = frames.facts(profile)
    assert facts.items() >= dataclasses.asdict(stores.H100).items() and not facts["here"] and facts["decisions"] == 4
    assert set(frames.decisions["against"]) == {"eager"}, "plain log_softmax was not timed"
    assert frames.candidates["speedup"].equals(frames.candidates["ratio"])


def test_this_machine_comes_first(load):
    frames, first = load("many")
    assert first == OURS and next(iter(frames.profiles)) == OURS.environment and len(frames.profiles) == 3
    labels = [frames.label(profile) for profile in frames.profiles.values()]
    assert len(set(labels)) == 3 and sum("torch 2.12.0" in label for label in labels) == 2, "also by torch"


def test_the_decision_behind_a_row_is_read_when_it_is_asked_for(load, scenario):
    where = scenario("one")
    frames, _ = load()
    decision = frames.decision(0)
    assert decision.problem == stores.problem()
    assert set(frames.evidence(0, decision).seconds) == {"eager", "cpp", "compiled"}
    path = where.path(OURS.environment, stores.problem())
    for act, words in ((lambda: path.write_text("{"), "JSON"), (path.unlink, "no longer there")):
        act()
        with pytest.raises(ProfileError, match=words):
            frames.decision(0)


@pytest.mark.parametrize(
    ("rows", "kind", "found"),
    [(1, "rule", None), (64, "exact", 64), (100, "nearest", 64), (500, "exact", 512), (10**6, "nearest", 2048)],
)
def test_what_serves_a_shape(load, rows, kind, found):
    frames, profile = load("many")
    for other in ({"dtype": torch.float16}, {"vocab": stores.QWEN + 8}):
        assert look_up(frames, profile, SHAPE._replace(**other)).kind == "none", "was never measured"
    answer = look_up(frames, profile, SHAPE._replace(rows=rows))
    assert answer.kind == kind and answer.problem == bucket(stores.problem(rows))
    assert (None if answer.key is None else frames.decision(answer.key).problem.rows) == found


@pytest.mark.parametrize(
    ("name", "mode", "kind"), [("many", "forward, entropy", "nearest"), ("undecided", "backward", "undecided")]
)
def test_the_nearest_kind_of_problem_serves_and_what_is_undecided_is_called_so(load, name, mode, kind):
    frames, profile = load(name)
    answer = look_up(frames, profile, stores.problem(mode=mode))
    assert answer.kind == kind and (frames.decision(answer.key).problem == answer.problem) == (kind == "undecided")


def test_what_was_replaced_is_in_the_past(load, scenario):
    where = scenario("dated")
    frames, profile = load()
    assert set(frames.past.of(profile)["measured_at"]) == {stores.EARLIER} and len(frames.past.of(profile)) == 2
    assert set(frames.past.candidates_of(profile)["key"]) == set(frames.past.of(profile)["key"])
    next((where.root / "v1").rglob("history/*/*.json")).write_text("{")
    assert len(load()[0].past.decisions) == 1, "what cannot be read is passed over"


@pytest.mark.slow
def test_thousands_of_decisions_are_read_once(scenario, read):
    stores.generate(scenario("no profile"), 5_000)
    frames = selection.current_frames()
    assert len(frames.decisions) == len(set(read)) == 5_000
    read.clear()
    maps(squares(frames, OURS, decisions(frames, OURS)))
    look_up(frames, OURS, SHAPE)
    assert read == [], "what is looked at is answered from the frames"
