"""`prune`: what goes by which option, what always stays, and that it only says so when asked to."""

import dataclasses
import json
import os
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compiled_logprobs.choose import pruning
from compiled_logprobs.choose.pruning import Asked, prune
from compiled_logprobs.cli.main import app
from compiled_logprobs.machine.environment import environment_at, environment_of, fingerprint_of
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from tests.helpers.stored_decisions import CPU, LARGE, all_measured, decided
from tests.store.test_store import (
    AS_ROOT,
    small_disk,  # noqa: F401 - a fixture
)

ELSEWHERE = dataclasses.replace(environment_of(), cpu_threads=96)
GOOD, BROKEN, NEWER, ORPHANED, STALE, FOREIGN, OLD, NO_DECISION = (LARGE._replace(rows=2**n) for n in range(10, 18))
ABANDONED = ".0123456789abcdef.tmp"


def run(*arguments):
    return CliRunner().invoke(app, ("prune", *arguments))


def days_ago(days: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.fixture
def store() -> Store:
    """The user's, with one of everything."""
    made, here = user_store(), environment_at(CPU)
    stale, foreign = all_measured(), all_measured()
    stale["compiled"] = dataclasses.replace(stale["compiled"], fingerprint="0" * 16)
    foreign["theirs"] = foreign.pop("compiled")
    for decision in (
        decided(GOOD),
        decided(BROKEN),
        decided(NEWER),
        decided(ORPHANED),
        decided(STALE, "compiled", candidates=stale),
        decided(FOREIGN, "theirs", candidates=foreign),
        decided(OLD, measured_at=days_ago(40)),
    ):
        made.publish(here, decision.problem, decision.record(), {"seconds": {}})
    made.publish(here, NO_DECISION, {"chosen": "eager"}, {"seconds": {}})
    made.publish(ELSEWHERE, GOOD, decided(GOOD).record(), {"seconds": {}})
    at(made, BROKEN).write_text("{")
    at(made, NEWER).write_text(json.dumps({**json.loads(at(made, NEWER).read_text()), "schema": 2}))
    at(made, ORPHANED).unlink()
    for name, age in ((ABANDONED, 3700), (".fedcba9876543210.tmp", 60)):
        at(made, GOOD).with_name(name).write_text("half")
        os.utime(at(made, GOOD).with_name(name), (time.time() - age,) * 2)
    at(made, GOOD).with_name("notes.txt").write_text("of a person")
    (made.root / "v2").mkdir()
    (made.root / "v2" / "file").write_text("of a newer release")
    return made


def at(store: Store, problem, environment=None) -> Path:
    return store.path((environment or environment_at(CPU)).fingerprint(), problem)


def files(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.root)): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


def both(*problems) -> set[str]:
    """The names of the files of these decisions."""
    names = [at(Store(Path()), problem).name for problem in problems]
    return {*names, *(name.replace(".json", ".evidence.json") for name in names)}


BY_DEFAULT = {*both(BROKEN, NO_DECISION), *(both(ORPHANED) - {at(Store(Path()), ORPHANED).name}), ABANDONED}


@pytest.mark.parametrize(
    ("arguments", "gone"),
    [
        ((), BY_DEFAULT),
        (("--broken",), BY_DEFAULT),
        (("--stale",), both(STALE)),
        (("--unregistered",), both(FOREIGN)),
        (("--older-than", "30"), both(OLD)),
        (("--older-than", "50"), set()),
        (("--older-than", "30", "--stale", "--broken"), both(OLD, STALE) | BY_DEFAULT),
    ],
    ids=str,
)
def test_what_each_option_removes(store, arguments, gone):
    before = files(store)
    dry = run(*arguments, "--dry-run")
    assert dry.exit_code == 0 and files(store) == before
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    after = files(store)
    removed = before.keys() - after.keys()
    assert {Path(name).name for name in removed} == gone
    assert {name: before[name] for name in after} == after
    told = json.loads(result.stdout)
    assert {one["path"] for one in told["files"]} == {str(store.root / name) for name in removed}
    assert told["bytes"] == sum(len(before[name]) for name in removed) and not told["dry_run"]
    assert f"{len(gone)} files, {told['bytes']} bytes, would be removed from {store.root}" in dry.stdout
    assert run(*arguments).stdout == f"0 files, 0 bytes, removed from {store.root}\n"


def test_other_environments_go_with_their_facts(store):
    before = files(store)
    assert run("--other-environments").exit_code == 0
    folder = f"v1/{ELSEWHERE.fingerprint()}/"
    assert files(store) == {name: data for name, data in before.items() if not name.startswith(folder)}
    assert not (store.root / folder).exists()


def test_of_another_environment_only_what_is_asked_for_goes(store):
    """Whether a backend has changed, or is registered, is known for this machine only."""
    for environment in (ELSEWHERE,):
        store.publish(environment, STALE, store.peek(fingerprint_of(CPU), STALE))
        store.publish(environment, FOREIGN, store.peek(fingerprint_of(CPU), FOREIGN))
    run("--stale", "--unregistered")
    assert at(store, STALE, ELSEWHERE).exists() and at(store, FOREIGN, ELSEWHERE).exists()
    assert not at(store, STALE).exists() and not at(store, FOREIGN).exists()


def test_what_a_newer_release_wrote_stays_whatever_is_asked(store):
    newer = at(store, NEWER).read_bytes()
    facts = at(store, GOOD, ELSEWHERE).parents[1] / "environment.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "schema": 2}))
    everything = ("--broken", "--stale", "--unregistered", "--other-environments", "--older-than", "0")
    assert run(*everything).exit_code == 0
    assert at(store, NEWER).read_bytes() == newer
    assert at(store, GOOD, ELSEWHERE).exists() and facts.exists()
    assert (store.root / "v2" / "file").read_text() == "of a newer release"
    assert at(store, GOOD).with_name("notes.txt").exists()
    assert at(store, GOOD).with_name(".fedcba9876543210.tmp").exists()  # of a writer that may be at work


def test_a_winner_that_cannot_run_at_present_is_not_stale(store, monkeypatch):
    monkeypatch.setattr(pruning, "why_not", lambda *_: "there is no compiler")
    assert prune(store, Asked(stale=True), [fingerprint_of(CPU)], dry_run=True) == []


def test_what_serves_where_rows_are_invariant_keeps_a_decision(store):
    record = store.peek(fingerprint_of(CPU), STALE)
    record["candidates"]["compiled"]["row_invariant"] = False
    store.publish(environment_at(CPU), STALE, record)
    assert prune(store, Asked(stale=True), [fingerprint_of(CPU)], dry_run=True) == []


def test_what_is_replaced_meanwhile_stays(store, monkeypatch):
    """Another process heals the file after it was judged."""
    real = pruning._removed

    def removed(waste, seen):
        if waste.path == at(store, BROKEN):
            store.publish(environment_at(CPU), BROKEN, decided(BROKEN).record(), {"seconds": {}})
        return real(waste, seen)

    monkeypatch.setattr(pruning, "_removed", removed)
    result = run()
    assert result.exit_code == 0 and at(store, BROKEN).name not in result.stdout
    assert store.read(fingerprint_of(CPU), BROKEN) is not None


def test_what_is_no_file_stays(store):
    path = at(store, BROKEN)
    path.unlink()
    path.mkdir()
    assert run().exit_code == 0 and path.is_dir()


def test_what_may_not_be_read_stays():
    if not AS_ROOT:
        pytest.skip("needs root, to become someone else")
    with tempfile.TemporaryDirectory() as folder:  # which others may enter, unlike the folders of tests
        os.chmod(folder, 0o755)
        store = Store(Path(folder))
        for problem in (GOOD, BROKEN):
            path = store.publish(environment_at(CPU), problem, decided(problem).record())
            path.write_text("{")
        at(store, GOOD).chmod(0o600)
        os.seteuid(65534)
        try:
            found = [path for path, _ in store.rubbish()]
        finally:
            os.seteuid(0)
        assert found == [at(store, BROKEN)]


def test_a_read_only_disk_is_told(small_disk):  # noqa: F811
    place, mount = small_disk
    store = Store(place)
    path = store.publish(environment_at(CPU), GOOD, decided(GOOD).record())
    path.write_text("{")
    assert mount("remount,ro")
    result = run("--store", str(place))
    assert result.exit_code == 2
    assert "it is still there: Read-only file system" in result.stdout
    assert f"0 files, 0 bytes, removed from {place}" in result.stdout
    assert path.read_text() == "{"


def test_a_store_that_is_not_there_has_nothing_to_remove(tmp_path):
    result = run("--store", str(tmp_path / "none"))
    assert result.exit_code == 0 and result.stdout.startswith("0 files, 0 bytes, removed from ")
    assert not (tmp_path / "none").exists()


def test_a_backend_of_ones_own_is_known_when_it_is_named(store, monkeypatch):
    """Then the decisions that chose it are not of an unknown one, and go only if its code has changed."""
    from tests.helpers.backends_for_tuning import registered

    theirs = all_measured()
    theirs["right"] = theirs.pop("compiled")
    store.publish(environment_at(CPU), FOREIGN, decided(FOREIGN, "right", candidates=theirs).record())
    with registered():
        result = run("--unregistered", "--backend", "backends_for_tuning:Right", "--dry-run")
        assert result.stdout.startswith("0 files"), result.output
        result = run("--stale", "--backend", "backends_for_tuning:Right", "--dry-run", "--json")
        assert str(at(store, FOREIGN)) in {one["path"] for one in json.loads(result.stdout)["files"]}
