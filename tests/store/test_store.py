"""Profiles on disk, whole after whatever happens to them: corruption, kills, a full disk, many writers at once."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import Environment, environment_of
from compiled_logprobs.problem import Problem, problem_name, problem_to_dict
from compiled_logprobs.store import ROOT_VARIABLE, bundled_store, project_store, stores, user_store
from compiled_logprobs.store.files import Store
from tests.helpers.stored_decisions import decided, evidence_of

ROOT = Path(__file__).parents[2]
HERE = dataclasses.replace(environment_of(), cpu_threads=2)
KEY = HERE.fingerprint()
PROBLEM = Problem("cpu", 512, 151936, torch.bfloat16, needs_grad=True)
FIRST, SECOND = (decided(PROBLEM, chosen, seed=seed) for seed, chosen in enumerate(("compiled", "cpp")))
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "profiles")


def environment_in(facts: dict) -> Environment:
    return Environment(**{field.name: facts.get(field.name) for field in dataclasses.fields(Environment)})


def temporary_files(store: Store) -> list[Path]:
    return list(store.root.rglob(".*"))


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
    assert not temporary_files(store)


def test_a_later_decision_replaces_an_earlier_one_and_its_evidence(store):
    path = store.publish(HERE, FIRST, evidence_of(FIRST))
    of_the_first = path.with_suffix(".evidence.json").read_bytes()
    store.publish(HERE, SECOND, evidence_of(SECOND))
    assert store.evidence(KEY, SECOND) == evidence_of(SECOND)
    path.with_suffix(".evidence.json").write_bytes(of_the_first)
    assert store.evidence(KEY, SECOND) is None  # it is of another decision
    store.publish(HERE, FIRST)
    assert store.read(KEY, PROBLEM) == FIRST and not list(store.root.rglob("*.evidence.json"))


def test_near_are_the_problems_that_differ_in_rows_only(store):
    for rows in (1024, 64, 512):
        for other in ({}, {"entropy": True}, {"vocab": 151937}):
            store.publish(HERE, decided(PROBLEM._replace(rows=rows, **other)))
    assert store.near(KEY, PROBLEM) == [PROBLEM._replace(rows=rows) for rows in (1024, 64)]
    assert store.near("0" * 16, PROBLEM) == []


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
        lambda: store.path(KEY, PROBLEM).unlink(),
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
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_file_is_a_miss_with_one_warning_and_heals(store, spoil, told):
    path = store.publish(HERE, FIRST)
    path.write_bytes(spoil(path.read_bytes()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert store.read(KEY, PROBLEM) is None
        assert store.read(KEY, PROBLEM) is None
        assert list(store.decisions()) == []
    assert [warning.category for warning in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert message.startswith(f"the stored profile {path} is passed over: ")
    assert told in message and "delete it" in message and message.replace("\n", "").isprintable()
    store.publish(HERE, FIRST)
    assert read_silently(store) == FIRST


def test_files_of_an_earlier_release_are_a_miss_with_one_warning_and_are_replaced(store):
    for problem in (PROBLEM, PROBLEM._replace(rows=8)):
        path = store.publish(HERE, decided(problem))
        path.write_text(json.dumps({"schema": 1, "sha256": "0" * 64, "record": {"chosen": "cpp"}}))
    facts = path.parents[1] / "environment.json"
    facts.write_text(json.dumps({"schema": 1, "sha256": "0" * 64, "record": HERE.to_dict()}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert list(store.decisions()) == [] and store.environments() == {}
    (warning,) = caught
    assert "an earlier release" in str(warning.message) and "`compiled-logprobs profile`" in str(warning.message)
    store.publish(HERE, FIRST)
    assert store.read(KEY, PROBLEM) == FIRST and store.environments() == {KEY: HERE.to_dict()}


def test_where_warnings_are_errors_a_wrong_file_is_said_on_standard_error(store, capsys):
    store.publish(HERE, FIRST).write_text("nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read(KEY, PROBLEM) is None
    assert "is passed over" in capsys.readouterr().err


def test_what_is_no_file_is_a_miss_with_a_warning(store):
    path = store.publish(HERE, FIRST)
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="it is not a regular file"):
        assert store.read(KEY, PROBLEM) is None
    path.rmdir()
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.warns(RuntimeWarning, match="it is not a regular file"):
        assert store.read(KEY, PROBLEM) is None


def test_a_wrong_file_hides_no_other(store):
    other = decided(PROBLEM._replace(rows=8))
    store.publish(HERE, other)
    path = store.publish(HERE, FIRST)
    path.write_text("{")
    path.with_name("notes.txt").write_text("of a person")
    (store.root / "v1" / "index.json").write_text("[]")
    (store.root / "v1" / "not an environment").mkdir()
    facts = path.parents[1] / "environment.json"
    facts.write_text("{}")
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

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, refused)
        with pytest.raises(ProfileError, match=f"cannot be written: {os.strerror(number)}.\n") as error:
            store.publish(HERE, SECOND, evidence_of(SECOND))
        with pytest.raises(ProfileError, match="cannot be written"):
            store.require_writable()
    assert isinstance(error.value.__cause__, OSError) and ROOT_VARIABLE in str(error.value)
    assert not temporary_files(store)
    assert read_silently(store) == FIRST and store.evidence(KEY, FIRST) == evidence_of(FIRST)


@pytest.mark.skipif(not AS_ROOT, reason="needs root, to become someone else")
def test_a_folder_of_someone_else_is_a_miss_with_a_warning(store):
    store.publish(HERE, FIRST)
    store.root.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.warns(RuntimeWarning, match="it cannot be read \\(Permission denied\\)"):
            assert store.read(KEY, PROBLEM) is None
        with pytest.warns(RuntimeWarning, match="it cannot be listed \\(Permission denied\\)"):
            assert list(store.decisions()) == []
        with pytest.raises(ProfileError, match="Permission denied.\n"):
            store.publish(HERE, FIRST)
    finally:
        os.seteuid(0)


def test_without_a_home_nothing_is_stored_and_what_to_do_is_said(tmp_path, monkeypatch):
    """As for a user that the system does not list: a container's, for instance."""
    monkeypatch.chdir(tmp_path)

    def no_home(*_):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv(ROOT_VARIABLE)
    monkeypatch.setattr("platformdirs.user_data_path", no_home)
    assert read_silently(user_store()) is None
    for store_something in (user_store().require_writable, lambda: user_store().publish(HERE, FIRST)):
        with pytest.raises(ProfileError, match=f"home folder of this user is not known.\n.*{ROOT_VARIABLE}"):
            store_something()
    assert not list(tmp_path.iterdir())


# Kills and crowds: one program imports the package and forks what is to be killed

PROGRAM = """
import dataclasses, json, os, signal, sys, time, warnings
from pathlib import Path
from compiled_logprobs.store.files import Store
from tests.helpers.stored_decisions import decided, evidence_of
from tests.store.test_store import HERE, KEY, PROBLEM

warnings.simplefilter("error", RuntimeWarning)
BASE = decided(PROBLEM)

def publish(store, number):
    decision = dataclasses.replace(BASE, seed=number, reason=f"{number}" * 500)
    store.publish(HERE, decision, evidence_of(decision))

def number_in(store):
    decision = store.read(KEY, PROBLEM)
    assert decision is None or decision.reason == f"{decision.seed}" * 500, "torn"
    assert decision is None or store.evidence(KEY, decision) in (None, evidence_of(decision))
    return -1 if decision is None else decision.seed

def fork(work, *arguments):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(*arguments)
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid
"""

KILLED_AT_EVERY_STEP = """
def write(store, step):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.listdir", "fsync"):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
    real = os.fsync
    os.fsync = lambda descriptor: (sys.audit("fsync"), real(descriptor))
    sys.addaudithook(hook)
    publish(store, 1)

outcomes = []
for existing in (False, True):
    for step in range(1, 100):
        store = Store(Path(sys.argv[1]) / f"{existing}{step}")
        if existing:
            publish(store, 0)
        status = os.waitpid(fork(write, store, step), 0)[1]
        assert status in (0, signal.SIGKILL), status
        outcomes.append([existing, number_in(store)])
        if status == 0:
            break
        publish(store, 2)
        assert number_in(store) == 2
print(json.dumps(outcomes))
"""

CROWD = """
def write(store, writer):
    for number in range(writer, writer + 8 * 8, 8):
        publish(store, number)

def read(store):
    for _ in range(8):
        assert number_in(store) >= 0 and list(store.decisions()) and store.environments() == {KEY: HERE.to_dict()}

store = Store(Path(sys.argv[1]))
publish(store, 0)
pids = [fork(write, store, writer) for writer in range(8)] + [fork(read, store) for _ in range(8)]
print(json.dumps([[os.waitpid(pid, 0)[1] for pid in pids], [path.name for path in store.root.rglob(".*")]]))
"""


def run_program(program: str, store: Store) -> list:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM + program, str(store.root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "dashboard")))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new_decision(store):
    outcomes = run_program(KILLED_AT_EVERY_STEP, store)
    for existed in (False, True):
        numbers = [number for before, number in outcomes if before == existed]
        old = 0 if existed else -1
        assert numbers == sorted(numbers) and set(numbers) == {old, 1} and len(numbers) > 10


@pytest.mark.slow
def test_many_writers_and_readers_meet_whole_decisions_only(store):
    codes, temporary = run_program(CROWD, store)
    assert codes == [0] * 16 and temporary == []


# Which stores there are


def test_the_stores_in_the_order_in_which_they_are_asked(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    assert user_store() == Store(tmp_path / "user")
    assert project_store() is None
    assert stores() == {"user store": user_store(), "bundled profiles": bundled_store()}
    Store(tmp_path / "profiles").publish(HERE, FIRST)
    assert list(stores().items()) == [
        ("user store", user_store()),
        ("project profiles", Store(tmp_path / "profiles")),
        ("bundled profiles", bundled_store()),
    ]
    monkeypatch.setenv(ROOT_VARIABLE, "profiles")
    assert stores() == {"user store": user_store(), "bundled profiles": bundled_store()}


def test_the_user_store_lies_in_the_data_folder_unless_the_variable_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv(ROOT_VARIABLE, "")
    assert user_store().root.is_relative_to(tmp_path)
    monkeypatch.delenv(ROOT_VARIABLE)
    assert "compiled-logprobs" in user_store().root.parts
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
        assert environment_in(facts[environment]).fingerprint() == environment
