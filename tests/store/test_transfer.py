"""What goes to another store comes out the same, what is hostile is passed over, and what serves nobody goes."""

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import tarfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import environment_at, environment_of
from compiled_logprobs.problem import problem_name
from compiled_logprobs.store import transfer
from compiled_logprobs.store.files import EVIDENCE_LIMIT, KEPT, LIMIT, Store
from compiled_logprobs.store.transfer import export_archive, import_archive, prune
from tests.helpers.stored_decisions import CPU, LARGE, decided, evidence_of

HERE = environment_at(CPU)
KEY = HERE.fingerprint()
ELSEWHERE = dataclasses.replace(environment_of(), cpu_threads=96)
OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
FIRST = f"v1/{KEY}/decisions/{problem_name(LARGE)}.json"
FIRST_EVIDENCE = FIRST.replace(".json", ".evidence.json")


def filled(store: Store, **changes) -> Store:
    """With a decision for this environment and one, without evidence, for another."""
    decision = decided(**changes)
    store.publish(HERE, decision, evidence_of(decision, {"eager": [2e-3, 0.1]}))
    store.publish(ELSEWHERE, decided(environment=ELSEWHERE.to_dict(), **changes))
    return store


def files(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.root)): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


def packed(members: dict[str, bytes], link: str = "") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if name == link:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def fates(content: bytes, store: Store, **options) -> list[str]:
    return [one.fate for one in import_archive(store, io.BytesIO(content), **options)]


@pytest.fixture
def source(tmp_path) -> Store:
    return filled(Store(tmp_path / "source"), measured_at=OLD)


@pytest.fixture
def target(tmp_path) -> Store:
    return Store(tmp_path / "target")


def test_what_is_exported_and_imported_is_the_same_byte_for_byte(source, target):
    archive, decisions = export_archive(source)
    assert decisions == 2 and str(source.root).encode() not in gzip.decompress(archive)
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:  # nothing of its owner
        assert {(one.uname, one.gname, one.uid, one.gid, one.mtime) for one in members} == {("", "", 0, 0, 0)}
    assert fates(archive, target, dry_run=True) == ["added"] * 2 and not target.root.exists()
    assert fates(archive, target) == ["added"] * 2
    assert files(target) == files(source)
    assert export_archive(target) == (archive, 2)
    assert fates(archive, target) == ["same"] * 2


def test_history_is_taken_along_and_pruned(source, target):
    source.publish(HERE, decided(measured_at=NEW))
    archive, decisions = export_archive(source)
    assert decisions == 2 and fates(archive, target, dry_run=True) == ["added"] * 2 and not target.root.exists()
    assert fates(archive, target) == ["added"] * 2 and files(target) == files(source)
    ((past, data),) = ((name, data) for name, data in files(source).items() if "/history/" in name)
    assert fates(packed({past: b"{"}), target) == ["broken"] and files(target) == files(source)
    places = [target.root / past.replace("20260101", f"202501{day:02}") for day in range(1, KEPT + 2)]
    for place in places:
        place.write_bytes(data)
    places[-1].write_text("{")
    assert [one.path for one in prune(target, [KEY])] == [*places[:2], places[-1]]
    assert target.root / past in [one.path for one in prune(target, [KEY], older_than_days=1)]
    prune(target, [], other_environments=True)
    assert not files(target) and not list((target.root / "v1").iterdir())


def test_evidence_and_environments_are_left_out_on_demand(source, target):
    fates(export_archive(source, evidence=False)[0], target)
    assert files(target) == {name: data for name, data in files(source).items() if ".evidence." not in name}
    assert export_archive(source, [ELSEWHERE.fingerprint()])[1] == 1
    with pytest.raises(ProfileError, match=f"holds no decision for {'0' * 16}, and an archive of one or more is valid"):
        export_archive(source, ["0" * 16])


@pytest.mark.parametrize(
    ("there", "here", "fate", "why"),
    [
        (OLD, NEW, "replaced", "what was stored is older, of 2026-01-01"),
        (NEW, OLD, "kept", "what is stored is as new, or newer, of 2026-02-01"),
        (NEW, NEW, "kept", "what is stored is as new"),
    ],
)
def test_the_newer_of_two_decisions_stays(source, target, there, here, fate, why):
    before, after = decided(measured_at=there, seed=1), decided(measured_at=here, seed=2)
    target.publish(HERE, before, evidence_of(before))
    source.publish(HERE, after)
    (told,) = import_archive(target, io.BytesIO(export_archive(source, [KEY])[0]))
    assert told.fate == fate and why in told.why
    stored = target.read(KEY, LARGE)
    assert stored == (after if fate == "replaced" else before)
    # The evidence is of the decision that is there: of the one that came there is none.
    assert target.evidence(KEY, stored) == (None if fate == "replaced" else evidence_of(before))


def test_what_cannot_be_used_is_replaced(source, target):
    filled(target, measured_at=NEW)
    for name in (FIRST, f"v1/{KEY}/environment.json"):
        (target.root / name).write_text("{")
    assert sorted(fates(export_archive(source)[0], target)) == ["kept", "replaced"]
    assert target.read(KEY, LARGE) == source.read(KEY, LARGE) and target.environments() == source.environments()


NOT_A_STORES = "it is no file of a store"
HOSTILE = {
    "a path that leads out": ("../../evil.json", bytes, NOT_A_STORES),
    "an absolute path": ("/tmp/evil.json", bytes, NOT_A_STORES),
    "code": (f"v1/{KEY}/decisions/evil.py", bytes, NOT_A_STORES),
    "a link": (FIRST, bytes, NOT_A_STORES),
    "a large one": (FIRST, lambda data: data + b" " * LIMIT, f"it has more than {LIMIT} bytes"),
    "no JSON": (FIRST, lambda data: b"{", "it is not JSON"),
    "another environment": (FIRST.replace(KEY, "0" * 16), bytes, "its facts are those of another"),
    "a path as device": (FIRST, lambda data: data.replace(b'"cpu"', b'"../x"', 1), "valid"),
    "a date to come": (FIRST, lambda data: data.replace(OLD.encode(), b"9999-01-01T00:00:00Z"), "not to come"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_passed_over_with_its_reason_and_the_rest_is_stored(source, target, tmp_path, name):
    place, spoil, why = HOSTILE[name]
    members = {name: data for name, data in files(source).items() if name != FIRST_EVIDENCE}
    members[place] = spoil(members.pop(FIRST))
    archive = packed(members, link=FIRST if name == "a link" else "")
    told = {one.fate: one.why for one in import_archive(target, io.BytesIO(archive))}
    assert told.keys() == {"broken", "added"} and why in told["broken"]
    assert files(target).items() <= files(source).items() and FIRST not in files(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_any_folder_of_a_store_is_an_archive_and_evidence_of_another_decision_is_left_out(source, target):
    evidence = json.dumps(json.loads(files(source)[FIRST_EVIDENCE]) | {"seed": 99}).encode()
    assert fates(packed(files(source) | {FIRST_EVIDENCE: evidence}), target) == ["added"] * 2
    assert target.evidence(KEY, target.read(KEY, LARGE)) is None
    large = files(source)[FIRST_EVIDENCE] + b" " * LIMIT  # as raw times may be, but no decision
    assert fates(packed(files(source) | {FIRST_EVIDENCE: large}), Store(target.root / "other")) == ["added"] * 2
    too_large = packed(files(source) | {FIRST_EVIDENCE: b" " * (EVIDENCE_LIMIT + 1)})
    assert sorted(fates(too_large, target, dry_run=True)) == ["broken", "same", "same"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        lambda data: gzip.compress(b"no tar" * 1000),
    ],
    ids=["cut", "one bit", "no tar"],
)
def test_what_is_no_whole_archive_changes_nothing(source, target, spoil):
    with pytest.raises(ProfileError, match="the archive cannot be used: .*\nValid is a .tar.gz"):
        fates(spoil(export_archive(source)[0]), target)
    assert not target.root.exists()


def test_an_archive_that_unpacks_to_too_much_is_refused(target, monkeypatch):
    monkeypatch.setattr(transfer, "MOST_BYTES", 2**20)
    with pytest.raises(ProfileError, match="it has more than 1048576 bytes unpacked.*\n.*--no-evidence"):
        fates(gzip.compress(bytes(2**24)), target)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_inside_is_told_or_does_not_matter(source, tmp_path, drawn):
    """Of the tar, which no digest guards against whoever means harm."""
    content = gzip.decompress(export_archive(source, [ELSEWHERE.fingerprint()])[0])
    start = drawn.draw(st.integers(0, 2000) | st.integers(0, len(content)))
    data = content[:start] + drawn.draw(st.binary(max_size=20)) + content[start + drawn.draw(st.integers(0, 50)) :]
    store = Store(tmp_path / "store")
    with contextlib.suppress(ProfileError):
        result = import_archive(store, io.BytesIO(gzip.compress(data, 1)))
        assert all(store.read(one.environment, one.decision.problem) for one in result if one.decision is not None)
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "store"}


# Pruning

GOOD, BROKEN, STALE, AGED = (LARGE._replace(rows=2**n) for n in range(10, 14))
ABANDONED, AT_WORK = ".0123456789abcdef.tmp", ".fedcba9876543210.tmp"


@pytest.fixture
def mixed(tmp_path) -> Store:
    """With one of everything."""
    store = Store(tmp_path / "mixed")
    forty_days = (datetime.now(timezone.utc) - timedelta(days=40)).strftime("%Y-%m-%dT%H:%M:%SZ")
    for problem in (GOOD, BROKEN, STALE, AGED):
        decision = decided(problem, **({"measured_at": forty_days} if problem is AGED else {}))
        store.publish(HERE, decision, evidence_of(decision))
    store.publish(ELSEWHERE, decided(GOOD, environment=ELSEWHERE.to_dict()))
    store.path(KEY, BROKEN).write_text("{")
    stale = store.path(KEY, STALE)
    stale.unlink()
    for name in (ABANDONED, AT_WORK, "notes.txt"):
        stale.with_name(name).write_text("half")
    for path in (stale.with_suffix(".evidence.json"), stale.with_name(ABANDONED)):
        os.utime(path, (time.time() - 3700,) * 2)
    (store.root / "v2").mkdir()
    (store.root / "v2" / "file.json").write_text("of another release")
    return store


WASTE = (problem_name(BROKEN), problem_name(STALE), ABANDONED)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, "nothing"),
        ({"older_than_days": 50}, "nothing"),
        ({"older_than_days": math.inf}, "nothing"),
        ({"older_than_days": 30}, problem_name(AGED)),
        ({"other_environments": True}, ELSEWHERE.fingerprint()),
    ],
)
def test_what_is_pruned(mixed, options, more):
    before = files(mixed)
    gone = {name: data for name, data in before.items() if any(part in name for part in (*WASTE, more))}
    dry = prune(mixed, [KEY], **options, dry_run=True)
    assert files(mixed) == before
    pruned = prune(mixed, [KEY], **options)
    assert pruned == dry and files(mixed).items() == before.items() - gone.items()
    assert {str(file.path.relative_to(mixed.root)): file.bytes for file in pruned} == {n: len(gone[n]) for n in gone}
    assert prune(mixed, [KEY], **options) == [] and not (mixed.root / "v1" / more).exists()


def test_what_cannot_be_read_at_present_stays(mixed, monkeypatch):
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert {file.path.name for file in prune(mixed, [KEY], older_than_days=30)} == {
        ABANDONED,
        f"{problem_name(STALE)}.evidence.json",
    }


def test_what_cannot_be_removed_is_told(mixed, monkeypatch):
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=OSError(30, "Read-only file system")))
    with pytest.raises(ProfileError, match="cannot be removed: Read-only file system"):
        prune(mixed, [KEY])
    assert prune(Store(mixed.root / "none"), [KEY]) == []
