"""What goes to another store comes out the same, what is hostile is passed over, and what serves nobody goes."""

import dataclasses
import gzip
import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import environment_at, environment_of
from compiled_logprobs.problem import Problem, problem_name
from compiled_logprobs.store import transfer
from compiled_logprobs.store.files import EVIDENCE_LIMIT, LIMIT, Store
from compiled_logprobs.store.transfer import export_archive, import_archive, prune
from tests.helpers.stored_decisions import CPU, LARGE, decided, evidence_of

HERE = environment_at(CPU)
KEY = HERE.fingerprint()
ELSEWHERE = dataclasses.replace(environment_of(), cpu_threads=96)
PROBLEMS = [LARGE, LARGE._replace(rows=2048), Problem("cpu", 64, 4096, torch.bfloat16, needs_grad=True)]
OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
FIRST = f"v1/{KEY}/decisions/{problem_name(LARGE)}.json"
FIRST_EVIDENCE = FIRST.replace(".json", ".evidence.json")


def filled(store: Store, **changes) -> Store:
    """With decisions for this environment and another, one of them without evidence."""
    for problem in PROBLEMS:
        decision = decided(problem, **changes)
        store.publish(HERE, decision, evidence_of(decision, {"eager": [2e-3, 0.1]}))
    store.publish(ELSEWHERE, decided(LARGE, environment=ELSEWHERE.to_dict(), **changes))
    return store


def files(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.root)): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


def imported(content: bytes, store: Store, **options) -> list[transfer.Imported]:
    return import_archive(store, io.BytesIO(content), **options)


def fates(result) -> list[str]:
    return [one.fate for one in result]


@pytest.fixture
def source(tmp_path) -> Store:
    return filled(Store(tmp_path / "source"), measured_at=OLD)


@pytest.fixture
def target(tmp_path) -> Store:
    return Store(tmp_path / "target")


# Round trips


def test_what_is_exported_and_imported_is_the_same_byte_for_byte(source, target):
    archive, decisions = export_archive(source)
    assert decisions == 4
    assert fates(imported(archive, target, dry_run=True)) == ["added"] * 4 and not target.root.exists()
    assert fates(imported(archive, target)) == ["added"] * 4
    assert files(target) == files(source)
    assert export_archive(target) == (archive, 4)
    assert fates(imported(archive, target)) == ["same"] * 4


def test_an_archive_tells_nothing_of_its_owner_and_any_folder_of_a_store_is_one(source, target):
    content, by_hand = export_archive(source)[0], io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert {(one.uname, one.gname, one.uid, one.mtime) for one in archive} == {("", "", 0, 0)}
        assert set(archive.getnames()) == {name for name in files(source) if "/decisions/" in name}
    assert str(source.root).encode() not in gzip.decompress(content)
    with tarfile.open(fileobj=by_hand, mode="w:gz") as archive:
        archive.add(source.root / "v1", "v1")
    assert fates(imported(by_hand.getvalue(), target)) == ["added"] * 4 and files(target) == files(source)


def test_evidence_and_environments_are_left_out_on_demand(source, target):
    imported(export_archive(source, evidence=False)[0], target)
    assert files(target) == {name: data for name, data in files(source).items() if ".evidence." not in name}
    assert export_archive(source, [ELSEWHERE.fingerprint()])[1] == 1
    with pytest.raises(ProfileError, match=f"holds no decision for {'0' * 16}, and an archive of one or more is valid"):
        export_archive(source, ["0" * 16])


# Which of two stays


@pytest.mark.parametrize(
    ("there", "here", "fate", "why"),
    [
        (OLD, NEW, "replaced", "what was stored is older, of 2026-01-01"),
        (NEW, OLD, "kept", "what is stored is as new, or newer, of 2026-02-01"),
        (NEW, NEW, "kept", "what is stored is as new"),
    ],
)
def test_the_newer_of_two_decisions_stays(source, target, there, here, fate, why):
    before, after = decided(LARGE, measured_at=there, seed=1), decided(LARGE, measured_at=here, seed=2)
    target.publish(HERE, before, evidence_of(before))
    source.publish(HERE, after)
    result = {(one.environment, one.decision.problem): one for one in imported(export_archive(source)[0], target)}
    told = result.pop((KEY, LARGE))
    assert told.fate == fate and why in told.why
    assert fates(result.values()) == ["added"] * 3
    stored = target.read(KEY, LARGE)
    assert stored == (after if fate == "replaced" else before)
    # The evidence is of the decision that is there: of the one that came there is none.
    assert target.evidence(KEY, stored) == (None if fate == "replaced" else evidence_of(before))


def test_what_cannot_be_used_is_replaced(source, target):
    filled(target, measured_at=NEW)
    for name in (FIRST, f"v1/{KEY}/environment.json"):
        (target.root / name).write_text("{")
    result = imported(export_archive(source)[0], target)
    assert sorted(fates(result)) == ["kept", "kept", "kept", "replaced"]
    assert target.read(KEY, LARGE) == source.read(KEY, LARGE) and target.environments() == source.environments()


# Hostile archives


def members_of(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive}


def packed(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in members.items():
            member = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name = name
            if isinstance(data, bytes):
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data) if isinstance(data, bytes) else None)
    return content.getvalue()


def link(kind: bytes, to: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, to
    return member


def edited(**changes) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


NOT_A_STORES = "it is no file of a store"
HOSTILE = {
    "a path that leads out": ("../../evil.json", lambda data: data, NOT_A_STORES),
    "an absolute path": ("/tmp/evil.json", lambda data: data, NOT_A_STORES),
    "a path through a folder": (f"v1/{KEY}/decisions/../../../evil.json", lambda data: data, NOT_A_STORES),
    "another folder": (f"v2/{KEY}/decisions/{problem_name(LARGE)}.json", lambda data: data, NOT_A_STORES),
    "code": (f"v1/{KEY}/decisions/evil.py", lambda data: b"raise SystemExit", NOT_A_STORES),
    "a symbolic link": (FIRST, lambda data: link(tarfile.SYMTYPE, "/etc/passwd"), NOT_A_STORES),
    "a hard link": (FIRST, lambda data: link(tarfile.LNKTYPE, "/etc/passwd"), NOT_A_STORES),
    "a pipe": (FIRST, lambda data: link(tarfile.FIFOTYPE, ""), NOT_A_STORES),
    "a large one": (FIRST, lambda data: data + b" " * LIMIT, f"it has more than {LIMIT} bytes"),
    "large evidence": (FIRST_EVIDENCE, lambda data: b" " * (EVIDENCE_LIMIT + 1), f"more than {EVIDENCE_LIMIT} bytes"),
    "no JSON": (FIRST, lambda data: b"{", "it is not JSON"),
    "another environment": (FIRST.replace(KEY, "0" * 16), lambda data: data, "its facts are those of another"),
    "another problem": (FIRST.replace("n1024", "n512"), lambda data: data, "it is of another problem"),
    "a path as device": (FIRST, lambda data: data.replace(b'"cpu"', b'"../x"', 1), "valid"),
    "a winner not measured": (FIRST, edited(chosen="flash_attn"), "not among those that it measured"),
    "a date to come": (FIRST, edited(measured_at="9999-01-01T00:00:00Z"), "not to come"),
    "no date": (FIRST, edited(measured_at="\x1b[2J"), "it was measured at "),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_passed_over_with_its_reason_and_the_rest_is_stored(source, target, tmp_path, name):
    place, spoil, why = HOSTILE[name]
    members = members_of(export_archive(source, [KEY])[0])
    base = FIRST_EVIDENCE if "evidence" in place else FIRST
    data = spoil(members.pop(base))
    if base == FIRST:
        members.pop(FIRST_EVIDENCE)
    result = imported(packed({**members, place: data}), target)
    (told,) = (one for one in result if one.fate == "broken")
    assert why in told.why
    assert fates(result).count("added") == (3 if base == FIRST_EVIDENCE else 2)
    assert set(files(target)) <= set(files(source)) and (base == FIRST_EVIDENCE or FIRST not in files(target))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_evidence_of_another_decision_is_left_out(source, target):
    members = members_of(export_archive(source, [KEY])[0])
    members[FIRST_EVIDENCE] = edited(seed=99)(members[FIRST_EVIDENCE])
    assert fates(imported(packed(members), target)) == ["added"] * 3
    assert target.evidence(KEY, target.read(KEY, LARGE)) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: b"\x89PNG\r\n\x1a\n" + bytes(500),
        lambda data: data[: len(data) // 2],
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        lambda data: gzip.compress(b"no tar" * 1000),
    ],
    ids=["nothing", "a picture", "cut", "one bit", "no tar"],
)
def test_what_is_no_whole_archive_changes_nothing(source, target, spoil):
    with pytest.raises(ProfileError, match="the archive cannot be used: .*\nValid is a .tar.gz"):
        imported(spoil(export_archive(source)[0]), target)
    assert not target.root.exists()


def test_an_archive_that_unpacks_to_too_much_is_refused(source, target, monkeypatch):
    monkeypatch.setattr(transfer, "MOST_BYTES", 2**20)
    with pytest.raises(ProfileError, match="it has more than 1048576 bytes unpacked.*\n.*--no-evidence"):
        imported(gzip.compress(bytes(2**24)), target)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_inside_is_told_or_does_not_matter(source, tmp_path, drawn):
    """Of the tar, which no digest guards against whoever means harm."""
    content = gzip.decompress(export_archive(source, [ELSEWHERE.fingerprint()])[0])
    start = drawn.draw(st.integers(0, 2000) | st.integers(0, len(content)))
    data = content[:start] + drawn.draw(st.binary(max_size=20)) + content[start + drawn.draw(st.integers(0, 50)) :]
    store = Store(tmp_path / "store")
    try:
        result = imported(gzip.compress(data, 1), store)
    except ProfileError:
        return
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "store"}
    assert all(store.read(one.environment, one.decision.problem) for one in result if one.decision is not None)


# Pruning

GOOD, BROKEN, STALE, AGED = (LARGE._replace(rows=2**n) for n in range(10, 14))
ABANDONED, AT_WORK = ".0123456789abcdef.tmp", ".fedcba9876543210.tmp"


def path_of(store: Store, problem: Problem) -> Path:
    return store.path(KEY, problem)


def age(path: Path) -> None:
    os.utime(path, (time.time() - 3700,) * 2)


@pytest.fixture
def mixed(tmp_path) -> Store:
    """With one of everything."""
    store = Store(tmp_path / "mixed")
    forty_days = (datetime.now(timezone.utc) - timedelta(days=40)).strftime("%Y-%m-%dT%H:%M:%SZ")
    for problem in (GOOD, BROKEN, STALE, AGED):
        decision = decided(problem, **({"measured_at": forty_days} if problem is AGED else {}))
        store.publish(HERE, decision, evidence_of(decision))
    store.publish(ELSEWHERE, decided(GOOD, environment=ELSEWHERE.to_dict()))
    path_of(store, BROKEN).write_text("{")
    path_of(store, STALE).unlink()
    beside = path_of(store, STALE).with_suffix(".evidence.json")
    age(beside)
    for name in (ABANDONED, AT_WORK, "notes.txt"):
        beside.with_name(name).write_text("half")
    age(beside.with_name(ABANDONED))
    (store.root / "v2").mkdir()
    (store.root / "v2" / "file.json").write_text("of another release")
    return store


def both(*problems: Problem) -> set[str]:
    return {f"{problem_name(problem)}{end}" for problem in problems for end in (".json", ".evidence.json")}


BROKEN_FILES = both(BROKEN) | {f"{problem_name(STALE)}.evidence.json", ABANDONED}


@pytest.mark.parametrize(("days", "aged"), [(None, set()), (50, set()), (30, both(AGED))])
def test_what_is_pruned(mixed, days, aged):
    before, gone = files(mixed), BROKEN_FILES | aged
    dry = prune(mixed, [KEY], older_than_days=days, dry_run=True)
    assert files(mixed) == before
    pruned = prune(mixed, [KEY], older_than_days=days)
    assert pruned == dry and {file.path.name for file in pruned} == gone
    assert files(mixed) == {name: data for name, data in before.items() if Path(name).name not in gone}
    assert sum(file.bytes for file in pruned) == sum(map(len, before.values())) - sum(map(len, files(mixed).values()))
    assert prune(mixed, [KEY], older_than_days=days) == []


def test_other_environments_go_with_their_facts(mixed):
    prune(mixed, [KEY])
    before = files(mixed)
    prune(mixed, [KEY], other_environments=True)
    folder = f"v1/{ELSEWHERE.fingerprint()}"
    assert files(mixed) == {name: data for name, data in before.items() if not name.startswith(folder)}
    assert not (mixed.root / folder).exists()


def test_what_cannot_be_read_at_present_stays(mixed, monkeypatch):
    real = Path.open

    def denied(self, *arguments, **options):
        if self == path_of(mixed, BROKEN):
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    assert path_of(mixed, BROKEN) not in {file.path for file in prune(mixed, [KEY])}


def test_what_cannot_be_removed_is_told(mixed, monkeypatch):
    def read_only(self, **_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(ProfileError, match="cannot be removed: Read-only file system"):
        prune(mixed, [KEY])
    assert prune(Store(mixed.root / "none"), [KEY]) == []
