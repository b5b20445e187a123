"""Profiles on disk, whole after whatever happens to them: corruption, kills, a full disk, many writers at once."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import typing
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import environment_of
from compiled_logprobs.problem import (
    DTYPES,
    Problem,
    problem_from_dict,
    problem_from_name,
    problem_name,
    problem_to_dict,
)
from compiled_logprobs.store import ROOT_VARIABLE, bundled_store, project_store, stores, user_store
from compiled_logprobs.store import files as module
from compiled_logprobs.store.files import Store

HERE = dataclasses.replace(environment_of(), cpu_threads=2)
KEY = HERE.fingerprint()
PROBLEM = Problem("cpu", 512, 151936, torch.bfloat16, needs_grad=True)
RECORD = {"chosen": "compiled", "interval": [1.5, 2.0], "why": "2 × as fast", "failed": None}
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0

KINDS = {
    str: st.sampled_from(["cpu", "cuda", "xpu", "n1", "my_device"]),
    int: st.integers(0, 10**18 - 1) | st.integers(0, 12),
    bool: st.booleans(),
    torch.dtype: st.sampled_from(DTYPES),
}
FIELDS = typing.get_type_hints(Problem)  # from the class, so that a field that is added to it is tried, too
PROBLEMS = st.builds(
    Problem,
    **{name: KINDS[kind] if kind in KINDS else st.sampled_from(typing.get_args(kind)) for name, kind in FIELDS.items()},
)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "profiles")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 256 KiB; given with a function that mounts it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        return AS_ROOT and subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("size=256k"):
        pytest.skip("needs the right to mount a file system")
    yield place, mount
    subprocess.run(["umount", "-l", str(place)], check=True)


def temporary_files(store: Store) -> list[Path]:
    return list(store.root.rglob(".*"))


def read_silently(store: Store) -> dict | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return store.read(KEY, PROBLEM)


# Names and problems


@given(PROBLEMS)
def test_a_problem_comes_back_from_its_dict(problem):
    stored = json.loads(json.dumps(problem_to_dict(problem)))
    assert problem_from_dict(stored) == problem


@given(PROBLEMS)
def test_a_problem_comes_back_from_its_name(problem):
    assert problem_from_name(problem_name(problem)) == problem


@given(st.text("cpu-nv0123456789float_kgrdtys", max_size=60))
def test_a_name_that_was_given_to_none_is_none(name):
    found = problem_from_name(name)
    assert found is None or problem_name(found) == name


@given(PROBLEMS, PROBLEMS, st.sampled_from(Problem._fields))
def test_two_problems_share_a_name_only_if_they_are_equal(one, another, field):
    assert (problem_name(one) == problem_name(another)) == (one == another)
    almost = one._replace(**{field: getattr(another, field)})  # two random ones differ in more than a name might forget
    assert (problem_name(one) == problem_name(almost)) == (one == almost)


@given(PROBLEMS)
def test_a_name_is_a_safe_file_name_everywhere(problem):
    name = problem_name(problem)
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")  # lower case: some file systems know no other
    assert len(name) < 200


def test_names_show_what_differs_from_a_plain_forward():
    assert problem_name(Problem("cpu", 512, 151936, torch.float32)) == "cpu-n512-v151936-float32"
    every = Problem(
        *("cuda", 4, 8, torch.float16, torch.float64, 3, True, True, "per_token", True, True, "rows", False)
    )  # fmt: skip
    assert problem_name(every) == (
        "cuda-n4-v8-float16-out_float64-k3-grad-entropy-t_per_token-masked-inplace-layout_rows-unaligned"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": -1}, "the problem's rows is -1; valid is an integer from 0"),
        ({"rows": True}, "rows is True"),
        ({"vocab": 5.0}, "vocab is 5.0"),
        ({"dtype": "int8"}, "dtype is 'int8'; valid is one of float32, bfloat16"),
        ({"dtype": ["float32"]}, "dtype is ['float32']"),
        ({"temperature": "hot"}, "valid is one of none, number, per_token"),
        ({"needs_grad": 1}, "needs_grad is 1; valid is true or false"),
        ({"device_type": "../../elsewhere"}, "device_type is '../../elsewhere'"),
        ({"device_type": "CUDA"}, "lower-case letters"),
        ({"colour": "red"}, "colour; valid is an object of device_type, rows"),
    ],
    ids=str,
)
def test_a_problem_that_cannot_be_is_refused(change, told):
    with pytest.raises(ProfileError) as error:
        problem_from_dict({**problem_to_dict(PROBLEM), **change})
    assert told in str(error.value)
    for other in ({"rows": 1}, [], None, "cpu"):
        with pytest.raises(ProfileError, match="a problem is "):
            problem_from_dict(other)


# Publishing and reading


def test_what_is_published_is_read_again(store):
    assert read_silently(store) is None
    path = store.publish(HERE, PROBLEM, RECORD, {"rounds": [0.25, 1e-9]})
    assert path == store.root / "v1" / KEY / "decisions" / f"{problem_name(PROBLEM)}.json"
    assert read_silently(store) == RECORD
    assert store.evidence(KEY, PROBLEM) == {"rounds": [0.25, 1e-9]}
    assert list(store.decisions()) == list(store.records(KEY)) == [(KEY, PROBLEM, RECORD)]
    assert store.environments() == {KEY: HERE.to_dict()}
    text = path.read_text(encoding="utf-8")
    assert text.startswith('{\n  "environment": "')
    assert json.loads(text).keys() == {"schema", "environment", "problem", "sha256", "record"}
    assert not temporary_files(store)


def test_a_later_record_replaces_an_earlier_one_and_its_evidence(store):
    store.publish(HERE, PROBLEM, RECORD, {"rounds": [1.0]})
    store.publish(HERE, PROBLEM, {"chosen": "eager"}, {"rounds": [2.0]})
    assert store.evidence(KEY, PROBLEM) == {"rounds": [2.0]}
    store.publish(HERE, PROBLEM, RECORD)
    assert store.read(KEY, PROBLEM) == RECORD
    assert store.evidence(KEY, PROBLEM) is None
    assert not list(store.root.rglob("*.evidence.json"))


def test_evidence_of_another_decision_is_passed_over(store):
    path = store.publish(HERE, PROBLEM, RECORD, {"rounds": [1.0]})
    beside = path.with_suffix(".evidence.json")
    of_the_first = beside.read_bytes()
    store.publish(HERE, PROBLEM, {"chosen": "eager"}, {"rounds": [2.0]})
    beside.write_bytes(of_the_first)
    assert store.evidence(KEY, PROBLEM) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=50, deadline=None)  # each waits for the disk
@given(st.dictionaries(st.text(st.characters()), json_values, max_size=4))
def test_any_plain_record_survives_bit_for_bit(tmp_path_factory, record):
    store = Store(tmp_path_factory.getbasetemp() / "any")
    store.publish(HERE, PROBLEM, record)
    assert json.dumps(read_silently(store)) == json.dumps(json.loads(json.dumps(record, sort_keys=True)))


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"a": [{"b": 1.0}, {"b": float("nan")}]}, "record.a[1].b is nan; valid are finite numbers"),
        ({"a": float("-inf")}, "record.a is -inf"),
        ({"a": torch.ones(1)}, "record.a is a Tensor; valid are JSON's own types"),
        ({"a": {1: 2}}, "record.a has the key 1; valid are strings"),
        ({"a": 10**5000}, "record.a is an integer of"),
        ({"a": "x" * 2**20}, "valid are at most 1048576"),
    ],
    ids=["nan", "inf", "tensor", "key", "integer", "size"],
)
def test_what_could_not_be_read_again_is_refused(store, record, told):
    with pytest.raises(ProfileError) as error:
        store.publish(HERE, PROBLEM, record)
    assert told in str(error.value)
    assert not store.root.exists()


def test_the_deepest_record_that_is_stored_is_read_and_a_deeper_one_refused(store):
    record: dict = {}
    for _ in range(module.DEPTH):
        record = {"a": record}
    store.publish(HERE, PROBLEM, record)
    assert read_silently(store) == record
    with pytest.raises(ProfileError, match="nested deeper than 32 levels"):
        store.publish(HERE, PROBLEM, {"a": record})


def test_near_are_the_problems_that_differ_in_rows_only(store):
    for rows in (1024, 64, 512):
        store.publish(HERE, PROBLEM._replace(rows=rows), RECORD)
        store.publish(HERE, PROBLEM._replace(rows=rows, entropy=True), RECORD)
        store.publish(HERE, PROBLEM._replace(rows=rows, vocab=151937), RECORD)
    path = store.publish(HERE, PROBLEM._replace(rows=2048), RECORD)
    assert store.near(KEY, PROBLEM) == [PROBLEM._replace(rows=rows) for rows in (64, 1024, 2048)]
    path.write_text("")
    with pytest.warns(RuntimeWarning, match="it is empty"):
        assert store.near(KEY, PROBLEM) == [PROBLEM._replace(rows=rows) for rows in (64, 1024)]
    assert store.near("0" * 16, PROBLEM) == []


def test_a_key_that_leads_out_of_the_store_is_refused(store):
    with pytest.raises(ProfileError, match="is no environment; valid is a fingerprint"):
        store.read("../../etc", PROBLEM)
    with pytest.raises(ProfileError, match="device_type"):
        store.read(KEY, PROBLEM._replace(device_type="../x"))


# Files that are not what they should be


def edited(**changes) -> typing.Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: b"", "it is empty"),
        (lambda data: data[: len(data) // 2], "it is not JSON in UTF-8"),
        (lambda data: data.replace(b"compiled", b"c\xff\xfeled"), "it is not JSON in UTF-8"),
        (lambda data: data.decode().encode("utf-16"), "it is not JSON in UTF-8"),
        (lambda data: data + b" " * 2**20, "it has more than 1048576 bytes"),
        (lambda data: data.replace(b"compiled", b"compoled"), "the digest is another"),
        (lambda data: data.replace(b"1.5", b"NaN"), "interval[0] is nan"),
        (lambda data: data.replace(b"1.5", b"-Infinity"), "interval[0] is -inf"),
        (lambda data: data.replace(b"1.5", b"1e999"), "interval[0] is inf"),
        (lambda data: data.replace(b"1.5", b"9" * 5000), "it is not JSON in UTF-8"),
        (lambda data: b'{"record": ' * 100 + b"1" + b"}" * 100, "nested deeper than"),
        (lambda data: b"[" * 10**6, "it is not JSON in UTF-8"),
        (lambda data: b"[1, 2]", "it is not an object with a record"),
        (lambda data: b"null", "it is not an object with a record"),
        (edited(schema=2), "a newer release wrote it, with schema 2"),
        (edited(schema=0), "it is not an object with a record and schema 1"),
        (edited(schema=True), "it is not an object with a record and schema 1"),
        (edited(record=[RECORD]), "it is not an object with a record"),
        (edited(sha256=None), "the digest is another"),
        (edited(environment="0" * 16), "it is of another environment, '0000000000000000'"),
        (edited(problem=problem_to_dict(PROBLEM._replace(rows=513))), "it is of another problem, cpu-n513-"),
        (edited(problem={**problem_to_dict(PROBLEM), "rows": "512"}), "the problem's rows is '512'"),
        (edited(problem={"\x1b[2J": 1}), "a problem is ?[2J; valid is an object of"),
        (edited(problem=None), "a problem is a NoneType"),
    ],
)
def test_a_wrong_file_is_a_miss_with_one_warning_and_heals(store, spoil, told):
    path = store.publish(HERE, PROBLEM, RECORD)
    path.write_bytes(spoil(path.read_bytes()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert store.read(KEY, PROBLEM) is None
        assert store.read(KEY, PROBLEM) is None
        assert list(store.decisions()) == []
    assert [warning.category for warning in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert message.startswith(f"the stored profile {path} is passed over: ")
    assert told in message
    assert f"A profile is JSON of schema {module.SCHEMA}" in message
    assert caught[0].filename == __file__
    if "newer release" in told:
        assert "Upgrade compiled-logprobs, or delete" not in message
        assert "Upgrade compiled-logprobs" in message
        return
    assert "delete it" in message
    store.publish(HERE, PROBLEM, RECORD)
    assert read_silently(store) == RECORD


def test_what_is_no_file_is_a_miss_with_a_warning(store):
    path = store.publish(HERE, PROBLEM, RECORD)
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="it is not a regular file"):
        assert store.read(KEY, PROBLEM) is None
    path.rmdir()
    module._warned.clear()
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.warns(RuntimeWarning, match="it is not a regular file"):
        assert store.read(KEY, PROBLEM) is None


def test_what_a_newer_release_wrote_is_not_replaced(store):
    path = store.publish(HERE, PROBLEM, RECORD)
    for file in (path, path.parents[1] / "environment.json"):
        before = file.read_bytes()
        newer = edited(schema=2)(before)
        file.write_bytes(newer)
        with pytest.raises(ProfileError, match="a newer release wrote what is there.\n.* Upgrade compiled-logprobs"):
            store.publish(HERE, PROBLEM, {"chosen": "eager"})
        assert file.read_bytes() == newer
        file.write_bytes(before)


def test_a_wrong_file_hides_no_other(store):
    other = PROBLEM._replace(rows=8)
    store.publish(HERE, other, RECORD)
    path = store.publish(HERE, PROBLEM, RECORD)
    path.write_text("{")
    path.with_name("notes.txt").write_text("of a person")
    (store.root / "v1" / "index.json").write_text("[]")
    (store.root / "v1" / "not an environment").mkdir()
    facts = path.parents[1] / "environment.json"
    facts.write_text("{}")
    with pytest.warns(RuntimeWarning, match="it is not JSON in UTF-8"):
        assert list(store.decisions()) == [(KEY, other, RECORD)]
    with pytest.warns(RuntimeWarning, match="it is not an object with a record"):
        assert store.environments() == {}
    store.publish(HERE, PROBLEM, RECORD)
    assert store.environments() == {KEY: HERE.to_dict()}


def test_nothing_is_imported_because_a_file_says_so(store, tmp_path, monkeypatch):
    (tmp_path / "named_by_a_profile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    names = {"chosen": "named_by_a_profile:backend", "__reduce__": ["os.system", ["false"]], "py/object": "os.system"}
    store.publish(HERE, PROBLEM, names, {"module": "named_by_a_profile"})
    before = set(sys.modules)
    assert read_silently(store) == names
    assert list(store.decisions()) == [(KEY, PROBLEM, names)]
    assert store.evidence(KEY, PROBLEM)
    assert store.environments()
    assert set(sys.modules) == before


# Disks and rights


def test_a_full_disk_is_told_and_costs_nothing_that_was_stored(small_disk):
    place, _ = small_disk
    store = Store(place / "profiles")
    store.publish(HERE, PROBLEM, RECORD, {"rounds": [1.0]})
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1024)
    with pytest.raises(ProfileError, match="cannot be written: the disk is full.\n.*Free some space") as error:
        store.publish(HERE, PROBLEM, {"chosen": "eager"}, {"rounds": [0.0] * 10000})
    assert isinstance(error.value.__cause__, OSError)
    assert ROOT_VARIABLE in str(error.value)
    assert not temporary_files(store)
    assert read_silently(store) == RECORD
    assert store.evidence(KEY, PROBLEM) == {"rounds": [1.0]}
    filler.unlink()
    store.publish(HERE, PROBLEM, {"chosen": "eager"})
    assert read_silently(store) == {"chosen": "eager"}


def test_a_read_only_disk_is_read_and_a_new_record_refused(small_disk):
    place, mount = small_disk
    store = Store(place)
    store.publish(HERE, PROBLEM, RECORD)
    assert mount("remount,ro")
    assert read_silently(store) == RECORD
    with pytest.raises(ProfileError, match="the file system is read-only.\n.*Make it writable"):
        store.publish(HERE, PROBLEM, {"chosen": "eager"})
    with pytest.raises(ProfileError, match="the file system is read-only"):
        Store(place / "deeper").publish(HERE, PROBLEM, RECORD)
    assert read_silently(store) == RECORD


def test_a_folder_of_someone_else_is_a_miss_with_a_warning(store):
    if not AS_ROOT:
        pytest.skip("needs root, to become someone else")
    store.publish(HERE, PROBLEM, RECORD)
    store.root.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.warns(RuntimeWarning, match="it cannot be read \\(Permission denied\\)"):
            assert store.read(KEY, PROBLEM) is None
        with pytest.warns(RuntimeWarning, match="it cannot be listed \\(Permission denied\\)"):
            assert list(store.decisions()) == []
        with pytest.raises(ProfileError, match="this process may not write there.\n.*Make it writable"):
            store.publish(HERE, PROBLEM, RECORD)
    finally:
        os.seteuid(0)


def test_a_store_where_a_file_is_in_the_way_is_a_miss_and_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    assert read_silently(store) is None
    assert list(store.decisions()) == []
    with pytest.raises(ProfileError, match="Not a directory.\n"):
        store.publish(HERE, PROBLEM, RECORD)


def test_no_folder_is_made_for_a_home_that_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError, match="home folder of this user is not known.\n.*Set HOME"):
        Store(Path("~/.local/share")).publish(HERE, PROBLEM, RECORD)
    assert not list(tmp_path.iterdir())


def test_without_a_home_nothing_is_stored_and_what_to_do_is_said(tmp_path, monkeypatch):
    """As for a user that the system does not list: a container's, for instance."""
    monkeypatch.chdir(tmp_path)

    def no_home(*_):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv(ROOT_VARIABLE)
    monkeypatch.setattr("platformdirs.user_data_path", no_home)
    assert read_silently(user_store()) is None
    for store_something in (user_store().require_writable, lambda: user_store().publish(HERE, PROBLEM, RECORD)):
        with pytest.raises(ProfileError, match="home folder of this user is not known.\n.*Set HOME"):
            store_something()
    assert not list(tmp_path.iterdir())


def test_only_old_temporary_files_of_ours_are_removed(store):
    path = store.publish(HERE, PROBLEM, RECORD)
    old, new, foreign = (path.with_name(name) for name in (f".{'a' * 16}.tmp", f".{'b' * 16}.tmp", ".notes.tmp"))
    for file in (old, new, foreign):
        file.write_text("half")
    for file in (old, foreign):
        os.utime(file, (time.time() - 3700,) * 2)
    store.publish(HERE, PROBLEM, RECORD)
    assert set(temporary_files(store)) == {new, foreign}
    assert list(store.decisions()) == [(KEY, PROBLEM, RECORD)]


# Kills and crowds: one program imports the package and forks what is to be killed

PROGRAM = """
import dataclasses, json, os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from compiled_logprobs.machine.environment import environment_of
from compiled_logprobs.problem import Problem
from compiled_logprobs.store.files import Store

warnings.simplefilter("error", RuntimeWarning)
HERE = dataclasses.replace(environment_of(), cpu_threads=2)
KEY = HERE.fingerprint()
PROBLEM = Problem("cpu", 512, 151936, torch.bfloat16, needs_grad=True)

def record(number):
    return {"number": number, "filler": [number] * 500}

def number_in(store, problem=PROBLEM):
    found = store.read(KEY, problem)
    assert found is None or found == record(found["number"]), "torn"
    return -1 if found is None else found["number"]

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

KILLED_AT_RANDOM = """
def write(store, first, pipe):
    for number in range(first, first + 10**6):
        os.write(pipe, b"%d begun\\n" % number)
        store.publish(HERE, PROBLEM, record(number), {"number": number})
        os.write(pipe, b"%d done\\n" % number)

store, stored, begun, outcomes = Store(Path(sys.argv[1])), -1, -1, []
for kill in range(40):
    reading, writing = os.pipe()
    pid = fork(write, store, begun + 1, writing)
    os.close(writing)
    with os.fdopen(reading) as lines:
        steps = [lines.readline().split()]
        time.sleep(random.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        steps += [line.split() for line in lines]
    begun = int(steps[-1][0])
    done = max([int(number) for number, step in steps if step == "done"], default=stored)
    stored = number_in(store)
    evidence = store.evidence(KEY, PROBLEM)
    assert stored in (done, begun), (done, begun, stored)
    assert evidence in (None, {"number": stored}), (evidence, stored)
    outcomes.append(["old", "new"][stored == begun])
print(json.dumps(outcomes))
"""

KILLED_AT_EVERY_STEP = """
def die_at(step):
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

def write(store, step):
    die_at(step)
    store.publish(HERE, PROBLEM, record(1), {"number": 1})

root, outcomes = Path(sys.argv[1]), []
for existing in (False, True):
    for step in range(1, 100):
        store = Store(root / f"{existing}{step}")
        if existing:
            store.publish(HERE, PROBLEM, record(0), {"number": 0})
        status = os.waitpid(fork(write, store, step), 0)[1]
        assert status in (0, signal.SIGKILL), status
        outcomes.append([existing, number_in(store), store.evidence(KEY, PROBLEM), status])
        assert status == 0 or store.publish(HERE, PROBLEM, record(2)) and number_in(store) == 2
        if status == 0:
            break
print(json.dumps(outcomes))
"""

CROWD = """
def write(store, writer, end):
    number = writer
    while time.time() < end:
        number += 16
        store.publish(HERE, PROBLEM, record(number), {"number": number})
        store.publish(HERE, PROBLEM._replace(rows=writer), record(number))
        assert number_in(store, PROBLEM._replace(rows=writer)) == number

def read(store, end):
    count = 0
    while time.time() < end:
        assert number_in(store) >= 0 or count == 0
        store.evidence(KEY, PROBLEM)
        count += len(list(store.decisions())) + len(store.near(KEY, PROBLEM)) + len(store.environments())
    assert count > 0

store, end = Store(Path(sys.argv[1])), time.time() + 30
pids = [fork(write, store, writer, end) for writer in range(16)] + [fork(read, store, end) for _ in range(16)]
codes = [os.waitpid(pid, 0)[1] for pid in pids]
print(json.dumps([codes, len(list(store.decisions())), [path.name for path in store.root.rglob(".*")]]))
"""


def run_program(program: str, store: Store) -> list:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM + program, str(store.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


def test_a_writer_killed_at_random_leaves_the_old_or_the_new_record(store):
    outcomes = run_program(KILLED_AT_RANDOM, store)
    assert len(outcomes) == 40
    assert set(outcomes) == {"old", "new"}


def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new_record(store):
    outcomes = run_program(KILLED_AT_EVERY_STEP, store)
    for existed in (False, True):
        found = [(number, evidence) for before, number, evidence, _ in outcomes if before == existed]
        old = (0, {"number": 0}) if existed else (-1, None)
        assert found[0] == old
        assert found[-1] == (1, {"number": 1})
        assert {number for number, _ in found} == {old[0], 1}
        assert [number for number, _ in found] == sorted(number for number, _ in found)
        assert all(evidence in (None, {"number": number}) for number, evidence in found)
        assert len(found) > 10


def test_many_writers_and_readers_meet_whole_records_only(store):
    """16 of each, for 30 s."""
    codes, stored, temporary = run_program(CROWD, store)
    assert codes == [0] * 32
    assert stored == 17  # the one that all write, and one of each writer
    assert temporary == []


# Which stores there are


def test_the_stores_in_the_order_in_which_they_are_asked(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    assert user_store() == Store(tmp_path / "user")
    assert project_store() is None
    assert stores() == {"user store": user_store(), "bundled profiles": bundled_store()}
    Store(tmp_path / "profiles").publish(HERE, PROBLEM, RECORD)
    assert project_store() == Store(tmp_path / "profiles")
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
    assert user_store().root.is_relative_to(tmp_path)
    assert "compiled-logprobs" in user_store().root.parts
    monkeypatch.setenv(ROOT_VARIABLE, "~/elsewhere")
    assert user_store() == Store(tmp_path / "elsewhere")


def test_the_bundled_store_is_that_of_this_checkout_and_ships_in_the_wheel(tmp_path):
    pytest.importorskip("hatchling")
    repository = Path(__file__).parent.parent
    assert bundled_store().root == repository / "profiles"
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=repository, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / made.stdout.strip()) as wheel:
        assert "compiled_logprobs/profiles/README.md" in wheel.namelist()


def test_what_ships_with_the_project_can_be_trusted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = list(bundled_store().decisions())
        assert {environment for environment, _, _ in stored} <= set(bundled_store().environments())
