"""`export` and `import`: what goes from one store to another comes out the same, and what is hostile changes nothing."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from compiled_logprobs.cli.main import app
from compiled_logprobs.errors import InputError, LogProbsError, ProfileError
from compiled_logprobs.machine.environment import environment_at, environment_of, fingerprint_of
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import archive, bundled_store, user_store
from compiled_logprobs.store.archive import export, merge, read_archive
from compiled_logprobs.store.files import Store, digest
from tests.helpers.stored_decisions import CPU, LARGE, all_measured, decided, measured, publish
from tests.store.test_store import (
    PROGRAM,
    small_disk,  # noqa: F401 - a fixture
)

OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
ELSEWHERE = dataclasses.replace(environment_of(), cpu_threads=96)
PROBLEMS = [LARGE, LARGE._replace(rows=2048), Problem("cpu", 64, 4096, torch.bfloat16, needs_grad=True)]


def run(*arguments, **options):
    return CliRunner().invoke(app, arguments, **options)


def filled(store: Store, **changes) -> Store:
    """With decisions for this environment and another, one of them without evidence."""
    for problem in PROBLEMS:
        decision = decided(problem, **changes)
        store.publish(environment_at(CPU), problem, decision.record(), {"seconds": {"eager": [2e-3, 0.1]}})
    elsewhere = decided(LARGE, environment=ELSEWHERE.to_dict(), **changes)
    store.publish(ELSEWHERE, LARGE, elsewhere.record())
    return store


def files(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.root)): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


def exported(store: Store, **options) -> bytes:
    target = io.BytesIO()
    export(store, target, **options)
    return target.getvalue()


def imported(data: bytes, store: Store, **options) -> list[archive.Merged]:
    return merge(store, read_archive(io.BytesIO(data)), **options)


def fates(merged) -> list[str]:
    return [one.fate for one in merged]


@pytest.fixture
def source(tmp_path) -> Store:
    return filled(Store(tmp_path / "source"))


@pytest.fixture
def target(tmp_path) -> Store:
    return Store(tmp_path / "target")


# Round trips


def test_what_is_exported_and_imported_is_the_same_byte_for_byte(source, target):
    data = exported(source)
    merged = imported(data, target)
    assert fates(merged) == ["added"] * 4
    assert files(target) == files(source)
    assert exported(target) == data
    assert fates(imported(data, target)) == ["same"] * 4


def test_what_ships_with_the_package_makes_the_round_trip(target):
    imported(exported(bundled_store()), target)
    there = {name: data for name, data in files(bundled_store()).items() if name != "README.md"}
    assert files(target) == there


def test_an_archive_is_lines_of_json_without_any_path(source):
    lines = [json.loads(line) for line in exported(source).splitlines()]
    assert lines[0] == {"archive": "compiled-logprobs", "schema": 1}
    assert [line["kind"] for line in lines[1:]].count("decision") == 4
    assert lines[-1]["kind"] == "end" and lines[-1]["decisions"] == 4
    assert str(source.root) not in exported(source).decode()


def test_the_evidence_is_left_out_on_demand(source, target):
    imported(exported(source, evidence=False), target)
    assert files(target) == {name: data for name, data in files(source).items() if ".evidence." not in name}


def test_one_environment_is_exported_alone(source, target):
    imported(exported(source, environments=[ELSEWHERE.fingerprint()]), target)
    assert list(target.environments()) == [ELSEWHERE.fingerprint()]
    assert target.environments()[ELSEWHERE.fingerprint()] == ELSEWHERE.to_dict()


def test_facts_that_cannot_be_read_come_from_the_decisions(source, target):
    for facts in source.root.rglob("environment.json"):
        facts.unlink()
    imported(exported(source), target)
    assert target.environments()[ELSEWHERE.fingerprint()] == ELSEWHERE.to_dict()


def test_what_no_import_would_take_is_left_out_and_told(source, target):
    record = {**decided(LARGE).record(), "measured_at": "yesterday"}
    source.publish(ELSEWHERE, LARGE, record)
    buffer = io.BytesIO()
    done = export(source, buffer)
    assert done.decisions == 3
    (why,) = done.left_out
    assert why.startswith("cpu-n1024-v1031-float32-unaligned.json: ")
    imported(buffer.getvalue(), target)


def test_nothing_to_export_is_an_error(target, source):
    with pytest.raises(ProfileError, match="holds no decision, and an archive of one or more is valid"):
        export(target, io.BytesIO())
    with pytest.raises(ProfileError, match=f"holds no decision for {'0' * 16}"):
        export(source, io.BytesIO(), environments=["0" * 16])


def test_more_than_an_archive_may_hold_is_an_error(source, monkeypatch):
    monkeypatch.setattr(archive, "MOST_BYTES", 10_000)
    with pytest.raises(ProfileError, match="more than 10000 bytes.*--no-evidence"):
        export(source, io.BytesIO())


# Merging


@pytest.mark.parametrize(
    ("there", "here", "replace", "fate", "why"),
    [
        (OLD, NEW, False, "replaced", "what was stored is older, of 2026-01-01"),
        (NEW, OLD, False, "kept", "what is stored is newer, of 2026-02-01"),
        (NEW, OLD, True, "replaced", "as was asked"),
        (NEW, NEW, False, "kept", "what is stored is as new"),
        (NEW, NEW, True, "replaced", "as was asked"),
        ("once", OLD, False, "replaced", "does not say when"),
    ],
)
def test_the_newer_of_two_decisions_stays(source, target, there, here, replace, fate, why):
    environment = environment_at(CPU)
    before = decided(LARGE, measured_at=there, seed=1)
    target.publish(environment, LARGE, before.record(), {"seconds": {}})
    source.publish(environment, LARGE, decided(LARGE, measured_at=here, seed=2).record())
    merged = {
        (one.entry.environment, one.entry.problem): one for one in imported(exported(source), target, replace=replace)
    }
    found = merged.pop((environment.fingerprint(), LARGE))
    assert found.fate == fate and why in found.why
    assert fates(merged.values()) == ["added"] * 3
    stored = target.read(environment.fingerprint(), LARGE)
    assert stored is not None and stored["seed"] == (2 if fate == "replaced" else 1)
    # The evidence is of the decision that is there: of the one that came there is none.
    assert target.evidence(environment.fingerprint(), LARGE) == (None if fate == "replaced" else {"seconds": {}})


def test_what_is_broken_is_replaced_and_what_a_newer_release_wrote_stays(source, target):
    filled(target, measured_at=NEW)
    key = fingerprint_of(CPU)
    broken, no_decision, newer = (target.path(key, problem) for problem in PROBLEMS)
    broken.write_text("{")
    target.publish(environment_at(CPU), PROBLEMS[1], {"chosen": "eager"})
    newer.write_text(json.dumps({**json.loads(newer.read_text()), "schema": 2}))
    there = newer.read_bytes()
    merged = {
        (one.entry.environment, one.entry.problem): one for one in imported(exported(source), target, replace=True)
    }
    assert [merged[key, problem].fate for problem in PROBLEMS] == ["added", "replaced", "kept"]
    assert merged[key, PROBLEMS[2]].why == "a newer release wrote what is stored"
    assert newer.read_bytes() == there and no_decision.exists()
    assert target.read(key, PROBLEMS[0]) is not None


def test_what_another_process_stores_meanwhile_is_seen(source, target):
    """Between the first look at what is stored and the writing."""
    filled(target, measured_at=OLD)
    newest = decided(LARGE, measured_at="2026-11-20T00:00:00Z", seed=7)

    class Raced(Store):
        def peek(self, environment, problem):
            found = super().peek(environment, problem)
            target.publish(environment_at(CPU), LARGE, newest.record(), {"seconds": {"eager": [1.0]}})
            return found

    data = exported(filled(Store(source.root), measured_at=NEW))
    merged = imported(data, Raced(target.root))
    assert sorted(fates(merged)) == ["kept", "replaced", "replaced", "replaced"]
    assert target.read(fingerprint_of(CPU), LARGE) == json.loads(json.dumps(newest.record()))
    assert target.evidence(fingerprint_of(CPU), LARGE) == {"seconds": {"eager": [1.0]}}
    assert not list(target.root.rglob(".*"))


# Hostile archives


def sealed(lines: list[dict]) -> bytes:
    """An archive of these lines, with right digests wherever there may be some."""
    whole = b""
    for line in lines:
        if isinstance(line.get("record"), dict) and "sha256" in line:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                line = {**line, "sha256": digest(line["record"])}
        if line.get("kind") == "end":
            line = {**line, "sha256": hashlib.sha256(whole).hexdigest()}
        whole += json.dumps(line).encode() + b"\n"
    return whole


def lines_of(data: bytes) -> list[dict]:
    return [json.loads(line) for line in data.splitlines()]


def changed(data: bytes, kind: str, /, **changes) -> bytes:
    """With other fields in the first line of that kind."""
    lines = lines_of(data)
    index = next(i for i, line in enumerate(lines) if line.get("kind") == kind)
    lines[index] = {**lines[index], **changes}
    return sealed(lines)


def in_record(data: bytes, kind: str, **changes) -> bytes:
    record = next(line["record"] for line in lines_of(data) if line.get("kind") == kind)
    return changed(data, kind, record={**record, **changes})


def swapped(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


def zeros(data: bytes) -> bytes:
    return b"0" * 50_000_000


HOSTILE = {
    "nothing": (lambda data: b"", "line 1: it is not there: the archive was cut"),
    "a picture": (lambda data: b"\x89PNG\r\n\x1a\n" + bytes(500), "line 1: it is not JSON in UTF-8"),
    "a zip": (lambda data: b"PK\x03\x04" + bytes(500), "line 1: it is not JSON in UTF-8"),
    "a number": (lambda data: b"1\n", "line 1: it is a int; an object is valid"),
    "50 MB": (zeros, "line 1: it has more than"),
    "50 MB of JSON": (lambda data: data[:40] + b'{"kind": "decision"}\n' * 2_500_000, "line "),
    "a line of 50 MB": (lambda data: data.splitlines(True)[0] + zeros(data), "line 2: it has more than"),
    "a long decision": (lambda data: in_record(data, "decision", reason="x" * 2**20), "it has more than 1048576 bytes"),
    "deep": (lambda data: data.splitlines(True)[0] + b"[" * 10**6, "line 2: it is not JSON in UTF-8"),
    "rather deep": (
        lambda data: data.splitlines(True)[0] + b'{"a":' * 100 + b"1" + b"}" * 100 + b"\n",
        "nested deeper than",
    ),
    "cut": (lambda data: data[: len(data) // 2], "it is not JSON in UTF-8"),
    "cut between lines": (lambda data: data[: data.rindex(b"\n", 0, -1) + 1], "the archive was cut"),
    "more after the end": (lambda data: data + b"{}\n", "something follows the last line"),
    "twice": (lambda data: data + data, "something follows the last line"),
    "another archive": (lambda data: swapped(data, b"compiled-logprobs", b"decompiled"), "line 1: it is not the first"),
    "a newer archive": (lambda data: swapped(data, b'"schema":1', b'"schema":2'), "line 1: a newer release wrote it"),
    "a newer decision": (lambda data: changed(data, "decision", schema=2), "with schema 2: upgrade compiled-logprobs"),
    "schema true": (lambda data: changed(data, "decision", schema=True), "its schema is True; valid is 1"),
    "one bit": (lambda data: swapped(data, b'"rounds":10', b'"rounds":11'), "line 3: its record was changed"),
    "a bit in the key": (lambda data: swapped(data, b'"rows":1024', b'"rows":1025'), "not of the decision in the line before"),
    "an order": (lambda data: sealed([lines_of(data)[i] for i in (0, 2, 1, 3, -1)]), "no line before it tells the facts"),
    "evidence alone": (lambda data: sealed([lines_of(data)[i] for i in (0, 1, 3, -1)]), "not of the decision in the line before"),
    "a count": (lambda data: changed(data, "end", decisions=5), "it tells of 5 decisions, and there are 3"),
    "a kind": (lambda data: changed(data, "evidence", kind="code"), "its kind is 'code'; environment, decision, evidence or end"),
    "a decision twice": (
        lambda data: sealed([lines_of(data)[i] for i in (0, 1, 2, 2, -1)]),
        "a line before it holds a decision for the same problem",
    ),
    "facts twice": (lambda data: sealed([lines_of(data)[i] for i in (0, 1, 1, 2, -1)]), "it tells the facts of"),
    "a key twice": (lambda data: swapped(data, b'"kind":', b'"kind":"end","kind":'), "an object has a key twice"),
    "NaN": (lambda data: swapped(data, b'"seconds":0.002', b'"seconds":NaN'), "NaN is not a finite number"),
    "1e999": (lambda data: swapped(data, b'"seconds":0.002', b'"seconds":1e999'), "is inf; valid are finite numbers"),
    "5000 digits": (lambda data: swapped(data, b'"seed":0', b'"seed":' + b"9" * 5000), "it is not JSON in UTF-8"),
    "100 digits": (lambda data: swapped(data, b'"seed":0', b'"seed":' + b"9" * 100), "is an integer of 333 bits"),
    "a path as environment": (lambda data: changed(data, "decision", environment="../../etc"), "its environment is '../../etc'"),
    "a path as device": (
        lambda data: changed(data, "decision", problem={**lines_of(data)[2]["problem"], "device_type": "../../x"}),
        "the problem's device_type is '../../x'",
    ),
    "a path as backend": (lambda data: in_record(data, "decision", left_out=["os.path:join"]), "is no name of a backend"),
    "no problem": (lambda data: changed(data, "decision", problem=None), "a problem is a NoneType"),
    "no record": (lambda data: changed(data, "decision", record=[1]), "its record was changed"),
    "no candidates": (lambda data: in_record(data, "decision", candidates={}), "its chosen backend"),
    "a winner not measured": (lambda data: in_record(data, "decision", chosen="flash_attn"), "not among those that it measured"),
    "a date to come": (lambda data: in_record(data, "decision", measured_at="9999-01-01T00:00:00Z"), "yet to come"),
    "no date": (lambda data: in_record(data, "decision", measured_at="\x1b[2J"), "it was measured at "),
    "facts of another": (lambda data: in_record(data, "environment", cpu_threads=7), "those of another environment"),
    "facts that nest": (lambda data: in_record(data, "environment", cpu_model={"a": 1}), "no object of single values"),
    "facts in a decision": (lambda data: in_record(data, "decision", environment={}), "those of another environment"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_told_and_changes_nothing(source, target, tmp_path, name):
    spoil, told = HOSTILE[name]
    filled(target, measured_at=OLD)
    before = files(target)
    data = exported(source, environments=[fingerprint_of(CPU)])
    file = tmp_path / "archive"
    file.write_bytes(spoil(data))
    result = run("import", str(file), "--out", str(target.root))
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("ProfileError: the archive cannot be used: line ")
    assert told in result.stderr
    assert "Export it again" in result.stderr and "Traceback" not in result.stderr
    assert all(line.isprintable() for line in result.stderr.splitlines())
    assert files(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "source", "target"]


def test_a_right_archive_stays_right_when_it_is_sealed_again(source, target):
    """So that what is told of the others is told for the reason that was put in."""
    assert fates(imported(sealed(lines_of(exported(source))), target)) == ["added"] * 4


NASTY = st.one_of(
    st.sampled_from(
        [
            *(
                None,
                True,
                -1,
                0,
                2,
                1.5,
                1e308,
                10**17,
                2**63,
                10**400,
                "",
                "x",
                "\x00",
                "\ud800",
                "../..",
                "cpu",
                [],
                {},
            ),
            *("9999-01-01T00:00:00Z", {"a": {}}, [[]], "eager", "x" * 10_000, {"eager": None}, {"\x1b[2J": 1}),
        ]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
)


def places(value, so_far=()):
    """Where in `value` something can be replaced."""
    yield so_far
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*so_far, key))


def with_other(value, place, other):
    if not place:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = with_other(value[place[0]], place[1:], other)
    return copy


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> bytes:
    return exported(filled(Store(tmp_path_factory.mktemp("base")), measured_at=OLD))


def taken_or_told(data: bytes, folder: Path) -> None:
    """It is imported or refused by an error of ours; what is stored is then readable, or nothing."""
    store = Store(folder / "store")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            merged = imported(data, store)
        except (ProfileError, InputError):
            assert not store.root.exists()
            return
    assert list(folder.iterdir()) == [store.root]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(store.records())) == len(merged)
        json.dumps([one.to_dict() for one in merged], allow_nan=False)
    again = exported(store)
    assert fates(imported(again, store)) == ["same"] * len(merged)
    for path in sorted(store.root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    store.root.rmdir()


PATIENT = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@PATIENT
@given(st.data())
def test_any_value_in_any_place_is_taken_or_told(base, tmp_path, drawn):
    """With right digests, as whoever means harm would write them."""
    lines = lines_of(base)
    index = drawn.draw(st.integers(0, len(lines) - 1))
    place = drawn.draw(st.sampled_from(list(places(lines[index]))))
    other = with_other(lines[index], place, drawn.draw(NASTY))
    lines[index] = other if isinstance(other, dict) else {"kind": other}
    try:
        data = sealed(lines)
    except ValueError:  # an integer of too many digits for this Python to write
        return
    taken_or_told(data, tmp_path)


@PATIENT
@given(st.data())
def test_any_damage_is_told(base, tmp_path, drawn):
    start = drawn.draw(st.integers(0, len(base)))
    end = drawn.draw(st.integers(start, min(len(base), start + 200)))
    data = base[:start] + drawn.draw(st.binary(max_size=20)) + base[end:]
    if data == base:
        return
    with pytest.raises(LogProbsError):
        imported(data, Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@PATIENT
@given(
    st.lists(st.binary(max_size=100) | st.sampled_from([b"{}", b"[", b'{"archive":"compiled-logprobs","schema":1}']))
)
def test_any_bytes_are_told(tmp_path, lines):
    with pytest.raises(ProfileError):
        imported(b"\n".join(lines), Store(tmp_path / "store"))


def test_a_foreign_backend_in_an_archive_is_never_imported(source, target, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    candidates = {**all_measured(), "evil": dataclasses.replace(measured("eager"), fingerprint="0" * 16)}
    publish(decided(LARGE, "evil", candidates=candidates), source)
    result = run("import", "-", "--out", str(target.root), input=exported(source))
    assert result.exit_code == 0, result.output
    assert "evil" in result.stdout and "evil" not in sys.modules


# Disks, rights and kills


def fill(place: Path) -> Path:
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1024)
    return filler


def test_a_full_disk_leaves_the_store_as_it_was(small_disk, source, tmp_path):  # noqa: F811
    place, _ = small_disk
    store = filled(Store(place / "profiles"), measured_at=OLD)
    before = files(store)
    filler = fill(place)
    # Room for some of the files, but not for all.
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - 12 * 1024)
    with pytest.raises(ProfileError, match="cannot be written: the disk is full.\n.*Free some space"):
        imported(exported(source), store)
    assert files(store) == before
    filler.unlink()
    assert fates(imported(exported(source), store)) == ["replaced"] * 4


def test_a_full_disk_leaves_no_half_archive_and_the_old_one(small_disk, tmp_path):  # noqa: F811
    place, _ = small_disk
    big = filled(user_store())
    file = place / "archive"
    file.write_text("the old one")
    fill(place)
    result = run("export", str(file), "--overwrite")
    assert result.exit_code == 2 and "ProfileError: the archive " in result.stderr
    assert "No space left on device" in result.stderr
    assert file.read_text() == "the old one" and sorted(p.name for p in place.iterdir()) == ["archive", "filler"]
    assert files(big)


def test_a_read_only_disk_is_told(small_disk, source):  # noqa: F811
    place, mount = small_disk
    store = filled(Store(place), measured_at=OLD)
    before = files(store)
    assert mount("remount,ro")
    with pytest.raises(ProfileError, match="the file system is read-only"):
        imported(exported(source), store)
    with pytest.raises(ProfileError, match="Read-only file system"):
        archive.save(place / "archive", lambda file: export(source, file))
    assert files(store) == before
    assert exported(store)  # reading it is all that export needs


KILLED = """
from stored_decisions import CPU, LARGE, decided
from compiled_logprobs import decisions
from compiled_logprobs.store.archive import merge, read_archive
import io

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

def bring(store, data, step):
    die_at(step)
    merge(store, read_archive(io.BytesIO(data)))

environment = environment_at(CPU)
key = environment.fingerprint()
problems = [LARGE, LARGE._replace(rows=2048)]
data = open(sys.argv[2], "rb").read()
root, outcomes = Path(sys.argv[1]), []
fingerprint_of(CPU)
for existing in (False, True):
    for step in range(1, 400):
        store = Store(root / f"{existing}{step}")
        if existing:
            for problem in problems:
                old = decided(problem, measured_at="2026-01-01T00:00:00Z", seed=1)
                store.publish(environment, problem, old.record(), {"seed": 1})
        status = os.waitpid(fork(bring, store, data, step), 0)[1]
        assert status in (0, signal.SIGKILL), status
        found = [(store.read(key, problem) or {"seed": -1})["seed"] for problem in problems]
        assert set(found) <= {1 if existing else -1, 2}, found
        for problem, seed in zip(problems, found):
            assert store.evidence(key, problem) in (None, {"seed": seed})
        outcomes.append([existing, found])
        merged = merge(store, read_archive(io.BytesIO(data)))  # it is brought to an end by doing it again
        assert [store.read(key, problem)["seed"] for problem in problems] == [2, 2]
        if status == 0:
            assert [one.fate for one in merged] == ["same", "same"]
            break
print(json.dumps(outcomes))
"""


def test_an_import_killed_at_any_step_loses_nothing_that_was_stored(tmp_path):
    source = Store(tmp_path / "source")
    for problem in PROBLEMS[:2]:
        decision = decided(problem, measured_at=NEW, seed=2)
        source.publish(environment_at(CPU), problem, decision.record(), {"seed": 2})
    file = tmp_path / "archive"
    file.write_bytes(exported(source))
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            PROGRAM + KILLED,
            str(tmp_path / "stores"),
            str(file),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    for existed in (False, True):
        found = [seeds for before, seeds in outcomes if before == existed]
        old = 1 if existed else -1
        assert found[0] == [old, old] and found[-1] == [2, 2]
        assert [2, old] in found  # between the two
        assert len(found) > 15


# The command line


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_export_and_import_by_the_command_line(here, target):
    filled(user_store())
    key = fingerprint_of(CPU)
    first = run("export")
    assert first.exit_code == 0, first.output
    file = here / f"compiled-logprobs-{key}.jsonl"
    assert first.stdout == f"{file.name}: 3 decisions of 1 environment, {file.stat().st_size} bytes\n"
    assert list(here.iterdir()) == [file]
    result = run("import", file.name, "--out", str(target.root))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("nothing was stored for it") == 3
    assert result.stdout.endswith(f"3 decisions: 3 added; in {target.root}\n")
    found = json.loads(run("import", file.name, "--out", str(target.root), "--json").stdout)
    assert [one["fate"] for one in found["decisions"]] == ["same"] * 3
    assert found["decisions"][0].keys() == {"environment", "problem", "chosen", "measured_at", "fate", "why"}


def test_an_import_for_another_machine_says_so(here, target):
    filled(user_store())
    run("export", "all", "--environment", ELSEWHERE.fingerprint())
    result = run("import", "all", "--out", str(target.root))
    assert result.exit_code == 0
    assert f"Environment {ELSEWHERE.fingerprint()}, not this machine" in result.stdout
    assert "None is for this machine" in result.stdout


def test_an_archive_through_pipes(here, target):
    filled(user_store())
    sent = run("export", "-", "--all")
    assert sent.exit_code == 0 and sent.stderr.startswith("4 decisions of 2 environments, ")
    assert run("import", "-", "--out", str(target.root), input=sent.stdout_bytes).exit_code == 0
    assert files(target) == files(user_store())


@pytest.mark.parametrize("source", ["project", "./profiles"])
def test_where_to_export_from(here, source):
    filled(Store(here / "profiles"))
    result = run("export", "archive", "--from", source, "--all", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["file"] == "archive" and found["decisions"] == 4 and len(found["environments"]) == 2
    assert found["bytes"] == (here / "archive").stat().st_size and found["left_out"] == []


def test_a_file_that_exists_is_replaced_on_demand_only(here):
    filled(user_store())
    (here / "archive").write_text("precious")
    (here / "link").symlink_to("archive")
    for name in ("archive", "link"):
        result = run("export", name)
        assert result.exit_code == 2 and "which exists; a new file is valid" in result.stderr
    assert (here / "archive").read_text() == "precious"
    assert run("export", "link", "--overwrite").exit_code == 0
    assert (here / "link").is_symlink() and read_archive((here / "archive").open("rb"))


def test_what_appears_meanwhile_is_not_replaced(here, source):
    def write(file):
        (here / "archive").write_text("precious")
        return export(source, file)

    with pytest.raises(InputError, match="which exists; a new file is valid"):
        archive.save(here / "archive", write)
    assert (here / "archive").read_text() == "precious"
    assert {path.name for path in here.iterdir()} == {"archive", "source"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "/dev/null", "--overwrite"), "got /dev/null, which is no file; the name of a file is valid, or -"),
        (("export", "no/such/folder/archive"), "cannot be written (No such file or directory)"),
        (("export", "-", "--json"), "got - and --json, which both write to standard output"),
        (("export", "--all", "--environment", "0" * 16), "got --environment and --all; one of them is valid"),
        (("export", "--environment", "0" * 16), f"holds no decision for {'0' * 16}"),
        (("export", "--from", "project"), "got 'project'; a current folder that holds profiles is valid"),
        (("import", "no such file"), "got 'no such file', which cannot be opened (No such file or directory)"),
        (("import", "."), "got '.', which cannot be opened (Is a directory)"),
    ],
)
def test_what_cannot_be_done_is_said(here, arguments, said):
    filled(user_store())
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr
    assert list(here.iterdir()) == []


def test_nothing_is_written_where_there_is_nothing_to_export(here):
    result = run("export", "archive")
    assert result.exit_code == 2 and "`compiled-logprobs profile` measures some" in result.stderr
    assert list(here.iterdir()) == []
