"""Profiles on disk, whole after whatever happens to them: corruption, kills, a full disk, many writers at once."""

import dataclasses
import errno
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import Environment, environment_of
from compiled_logprobs.problem import Problem, problem_name, problem_to_dict
from compiled_logprobs.store import ROOT_VARIABLE, bundled_store, stores, user_store
from compiled_logprobs.store.files import KEPT, Store
from tests.helpers.stored_decisions import decided, evidence_of

ROOT = Path(__file__).parents[2]
HERE = dataclasses.replace(environment_of(), cpu_threads=2)
KEY = HERE.fingerprint()
PROBLEM = Problem("cpu", 512, 151936, torch.bfloat16, needs_grad=True)
FIRST, SECOND = (decided(PROBLEM, chosen, seed=seed) for seed, chosen in enumerate(("compiled", "cpp")))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "profiles")


def read_silently(store: Store) -> Decision | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return store.read(KEY, PROBLEM)


# Publishing and reading


def test_what_is_published_is_read_again(store):
    assert read_silently(store) is None
    path = store.publish(HERE, FIRST, evidence_of(FIRST, {"eager": [0.25, 1e-9]}))
    assert path == store.root / "v1" / KEY / "decisions" / f"{problem_name(PROBLEM)}.json"
    assert read_silently(store) == FIRST
    assert store.evidence(KEY, FIRST) == evidence_of(FIRST, {"eager": [0.25, 1e-9]})
    assert list(store.decisions()) == list(store.decisions(KEY)) == [(KEY, FIRST)]
    assert list(store.problems()) == [(KEY, PROBLEM)] and list(store.decisions("0" * 16)) == []
    assert store.environments() == {KEY: HERE.to_dict()}
    assert path.read_text(encoding="utf-8").startswith('{\n  "problem": {\n    "device_type": "cpu",')
    assert not list(store.root.rglob(".*"))


def test_a_later_decision_replaces_an_earlier_one_and_its_evidence(store):
    path = store.publish(HERE, FIRST, evidence_of(FIRST))
    of_the_first = path.with_suffix(".evidence.json").read_bytes()
    store.publish(HERE, SECOND, evidence_of(SECOND))
    assert store.evidence(KEY, SECOND) == evidence_of(SECOND)
    path.with_suffix(".evidence.json").write_bytes(of_the_first)
    assert store.evidence(KEY, SECOND) is None  # it is of another decision
    store.publish(HERE, FIRST)
    assert store.read(KEY, PROBLEM) == FIRST and not list(store.root.rglob("*.evidence.json"))


def test_what_is_replaced_is_kept_as_history_which_is_bounded(store):
    days = [decided(PROBLEM, measured_at=f"2026-11-{day:02}T12:00:00Z", seed=day) for day in range(1, KEPT + 4)]
    for one in (*days, days[-1]):  # the last twice: it is no history of itself
        store.publish(HERE, one)
    assert store.history(KEY, PROBLEM) == days[-1 - KEPT : -1] and store.read(KEY, PROBLEM) == days[-1]
    assert list(store.decisions()) == [(KEY, days[-1])] and list(store.problems()) == [(KEY, PROBLEM)]
    store.past(KEY, days[-2]).write_text("{")
    with pytest.warns(RuntimeWarning, match="is passed over"):
        assert store.history(KEY, PROBLEM) == days[-1 - KEPT : -2]
    store.past(KEY, days[-2]).unlink()
    store.publish(HERE, decided(PROBLEM, measured_at="<b>"))
    store.publish(HERE, decided(PROBLEM))
    assert len(store.history(KEY, PROBLEM)) == KEPT, "what has no date has no place in it"


def test_problems_of_the_same_device_vocabulary_and_dtype_are_listed_without_reading_them(store):
    alike = [PROBLEM._replace(rows=64, temperature="number"), PROBLEM._replace(out_dtype=torch.bfloat16)]
    for other in (*alike, PROBLEM._replace(vocab=15193), PROBLEM._replace(vocab=1519361, rows=2)):
        store.publish(HERE, decided(other))
        store.path(KEY, other).write_bytes(b"{")
    assert set(store.alike(KEY, PROBLEM)) == set(alike) and store.alike("0" * 16, PROBLEM) == []


def test_a_key_that_leads_out_of_the_store_is_refused(store):
    with pytest.raises(ProfileError, match="is no environment; valid is a fingerprint"):
        store.read("../../etc", PROBLEM)
    with pytest.raises(ProfileError, match="device_type"):
        store.read(KEY, PROBLEM._replace(device_type="../x"))


def test_every_change_of_a_store_changes_its_newest(store):
    seen = [store.newest()]
    for change in (
        lambda: store.publish(HERE, FIRST),
        lambda: store.publish(HERE, SECOND),
        store.path(KEY, PROBLEM).unlink,
    ):
        change()
        seen.append(store.newest())
    assert len(set(seen)) == 4 and seen[-1] == store.newest()


# Files that are not what they should be


def edited(**changes) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data[: len(data) // 2], "it is not JSON in UTF-8"),
        (lambda data: data + b" " * 2**20, "it has more than 1048576 bytes"),
        (edited(problem=problem_to_dict(PROBLEM._replace(rows=513))), "it is of another problem, cpu-n513-"),
        (edited(problem={"\x1b[2J": 1}), "a problem is ?[2J; valid is an object of"),
        (None, "it is not a regular file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_file_is_a_miss_with_one_warning_and_heals(store, spoil, told):
    path = store.publish(HERE, FIRST)
    data = path.read_bytes()
    path.unlink()
    path.mkdir() if spoil is None else path.write_bytes(spoil(data))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert store.read(KEY, PROBLEM) is None
        assert store.read(KEY, PROBLEM) is None
        assert list(store.decisions()) == []
    assert [warning.category for warning in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert message.startswith(f"the stored profile {path} is passed over: ")
    assert told in message and "delete it" in message and message.replace("\n", "").isprintable()
    if spoil is None:
        path.rmdir()
    store.publish(HERE, FIRST)
    assert read_silently(store) == FIRST


def test_files_of_an_earlier_release_are_a_miss_with_one_warning_and_are_replaced(store):
    for rows in (512, 8):
        path = store.publish(HERE, decided(PROBLEM._replace(rows=rows)))
        for file in (path, path.parents[1] / "environment.json"):
            file.write_text(json.dumps({"schema": 1, "sha256": "0" * 64, "record": {"chosen": "cpp"}}))
    path.with_name(f"{path.stem}-layout_other.json").write_text("{}")
    with pytest.warns(RuntimeWarning, match="(?s)an earlier release.*`compiled-logprobs profile`") as caught:
        assert list(store.decisions()) == [] and store.environments() == {}
    assert len({str(warning.message) for warning in caught}) == 1
    path.parents[1].rename(path.parents[2] / ("0" * 16))  # as that release called this environment
    with pytest.warns(RuntimeWarning, match="(?s)an earlier release.*`compiled-logprobs profile`") as caught:
        assert store.read(KEY, PROBLEM) is None and store.read(KEY, PROBLEM) is None
    assert len(caught) == 1
    (path.parents[2] / ("0" * 16)).rename(path.parents[1])
    store.publish(HERE, FIRST)
    assert store.read(KEY, PROBLEM) == FIRST and store.environments() == {KEY: HERE.to_dict()}


def test_a_wrong_file_hides_no_other(store):
    other = decided(PROBLEM._replace(rows=8))
    store.publish(HERE, other)
    path = store.publish(HERE, FIRST)
    path.write_text("{")
    path.with_name("notes.txt").write_text("of a person")
    (path.parents[1] / "environment.json").write_text("{}")
    with pytest.warns(RuntimeWarning, match="it is not JSON"):
        assert list(store.decisions()) == [(KEY, other)]
    with pytest.warns(RuntimeWarning, match="it is of another environment, None"):
        assert store.environments() == {}


def test_nothing_is_imported_because_a_file_says_so(store, tmp_path, monkeypatch):
    (tmp_path / "named_by_a_profile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    candidates = {**FIRST.candidates, "named_by_a_profile:backend": FIRST.winner}
    named = dataclasses.replace(FIRST, candidates=candidates, chosen="named_by_a_profile:backend")
    store.publish(HERE, named, evidence_of(named))
    before = set(sys.modules)
    assert read_silently(store) == named
    assert store.evidence(KEY, named) and store.environments()
    assert set(sys.modules) == before


# Disks and rights


@pytest.mark.parametrize(("failing", "number"), [("replace", errno.EROFS), ("fsync", errno.ENOSPC)])
def test_what_the_disk_refuses_is_told_and_costs_nothing_that_was_stored(store, monkeypatch, failing, number):
    store.publish(HERE, FIRST, evidence_of(FIRST))
    with monkeypatch.context() as patched:
        patched.setattr(os, failing, Mock(side_effect=OSError(number, os.strerror(number))))
        with pytest.raises(ProfileError, match=f"cannot be written: {os.strerror(number)}.\n") as error:
            store.publish(HERE, SECOND, evidence_of(SECOND))
        with pytest.raises(ProfileError, match="cannot be written"):
            store.require_writable()
    assert isinstance(error.value.__cause__, OSError) and ROOT_VARIABLE in str(error.value)
    assert not list(store.root.rglob(".*"))
    assert read_silently(store) == FIRST and store.evidence(KEY, FIRST) == evidence_of(FIRST)


def test_a_folder_of_someone_else_is_a_miss_with_a_warning(store, monkeypatch):
    store.publish(HERE, FIRST)
    for method, told in (("open", "read"), ("iterdir", "listed")):
        monkeypatch.setattr(Path, method, Mock(side_effect=PermissionError(13, "Permission denied")))
        with pytest.warns(RuntimeWarning, match=rf"it cannot be {told} \(Permission denied\)"):
            assert list(store.decisions()) == []
    with pytest.raises(ProfileError, match="Permission denied.\n"):
        store.publish(HERE, SECOND)


def test_without_a_home_nothing_is_stored_and_what_to_do_is_said(tmp_path, monkeypatch):
    """As for a user that the system does not list: a container's, for instance."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ROOT_VARIABLE)
    monkeypatch.setattr("platformdirs.user_data_path", Mock(side_effect=RuntimeError("no home directory")))
    assert read_silently(user_store()) is None
    with pytest.raises(ProfileError, match=f"home folder of this user is not known.\n.*{ROOT_VARIABLE}"):
        user_store().publish(HERE, FIRST)
    assert not list(tmp_path.iterdir())


# Kills and crowds


@pytest.mark.parametrize("before", [None, FIRST], ids=["empty", "filled"])
def test_at_every_step_of_a_writer_the_old_or_the_new_decision_is_there(store, before):
    """What another process reads meanwhile, and what is left if the writer is killed there."""
    if before:
        store.publish(HERE, before, evidence_of(before))
    seen = []

    def look(frame, event, _):
        if not frame.f_code.co_filename.endswith(("store/files.py", "contextlib.py")):
            return None
        sys.settrace(None)
        decision = read_silently(store)
        seen.append(decision)
        assert decision is None or store.evidence(KEY, decision) in (None, evidence_of(decision))
        sys.settrace(look)
        return look

    sys.settrace(look)
    try:
        store.publish(HERE, SECOND, evidence_of(SECOND))
    finally:
        sys.settrace(None)
    assert [decision for decision, _ in itertools.groupby(seen)] == [before, SECOND]
    assert len(seen) > 20


def test_many_writers_and_readers_meet_whole_decisions_only(store):
    def write(writer: int) -> None:
        for number in range(writer, 40, 4):
            decision = dataclasses.replace(FIRST, seed=number, reason=f"{number}" * 500)
            store.publish(HERE, decision, evidence_of(decision))

    def read(_: int) -> None:
        for _ in range(10):
            decision = store.read(KEY, PROBLEM)
            assert decision.reason == f"{decision.seed}" * 500
            assert list(store.decisions()) and store.environments() == {KEY: HERE.to_dict()}

    write(36)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: job[0](job[1]), [(work, n) for n in range(4) for work in (write, read)]))
    assert not list(store.root.rglob(".*"))


# Which stores there are


def test_the_stores_in_the_order_in_which_they_are_asked_each_folder_once(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    bundled, project = {"bundled profiles": bundled_store()}, {"project profiles": Store(tmp_path / "profiles")}
    assert list(stores().items()) == [*{"user store": Store(tmp_path / "user"), **bundled}.items()]
    project["project profiles"].publish(HERE, FIRST)
    assert list(stores().items()) == [*{"user store": Store(tmp_path / "user"), **project, **bundled}.items()]
    monkeypatch.setenv(ROOT_VARIABLE, "profiles")
    assert stores() == {"user store": user_store(), **bundled}


def test_the_user_store_lies_in_the_data_folder_unless_the_variable_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv(ROOT_VARIABLE, "")
    assert user_store() == Store(tmp_path / "data" / "compiled-logprobs")
    monkeypatch.setenv(ROOT_VARIABLE, "~/elsewhere")
    assert user_store() == Store(tmp_path / "elsewhere")


def test_the_bundled_store_is_that_of_this_checkout():
    """Read without a warning: names and fingerprints are what they were in the process that stored it."""
    assert bundled_store().root == ROOT / "profiles"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = list(bundled_store().decisions())
        facts = bundled_store().environments()
    assert stored
    for environment, decision in stored:
        assert decision.winner.measured and decision.environment == facts[environment]
        home = {field.name: decision.environment.get(field.name) for field in dataclasses.fields(Environment)}
        assert Environment(**home).fingerprint() == environment
