"""`export`, `import` and `prune` on the command line: what they print and write, and their exit codes."""

import dataclasses
import io
import json
import tarfile

import pytest

from compiled_logprobs.machine.environment import environment_of, fingerprint_of
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from tests.helpers.stored_decisions import CPU, LARGE, decided, publish

ELSEWHERE = dataclasses.replace(environment_of(), cpu_threads=96)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and a user's store with two decisions for this machine and one for another."""
    monkeypatch.chdir(tmp_path)
    for problem in (LARGE, LARGE._replace(rows=2048)):
        publish(decided(problem))
    user_store().publish(ELSEWHERE, decided(environment=ELSEWHERE.to_dict()))
    return tmp_path


def test_export_and_import(run, here):
    first = run("export")
    assert first.exit_code == 0, first.output
    file = here / f"compiled-logprobs-{fingerprint_of(CPU)}.tar.gz"
    assert first.stdout == f"{file.name}: 2 decisions, {file.stat().st_size} bytes\n"
    result = run("import", file.name, "--out", "target")
    assert result.exit_code == 0 and result.stdout.count("nothing was stored for it") == 2, result.output
    assert result.stdout.endswith("2 decisions: 2 added; in target\n")
    told = json.loads(run("import", file.name, "--out", "target", "--json").stdout)
    assert [one["fate"] for one in told["decisions"]] == ["same"] * 2
    assert told["decisions"][0]["decision"]["problem"]["vocab"] == LARGE.vocab
    told = json.loads(run("export", "other", "--environment", ELSEWHERE.fingerprint(), "--json").stdout)
    assert told == {"file": "other", "decisions": 1, "bytes": (here / "other").stat().st_size}
    assert "None is for this machine" in run("import", "other", "--out", "target").stdout
    assert run("export", "all", "--from", "target", "--all").stdout.startswith("all: 3 decisions, ")
    assert "got all, which cannot be written (File exists). Valid is a new file" in run("export", "all").stderr


def test_what_is_broken_in_an_archive_is_told_and_exit_1(run, here):
    publish(decided(), Store(here / "spoilt"))
    with tarfile.open("archive", "w:gz") as archive:
        archive.add("spoilt/v1", "v1")
        archive.addfile(tarfile.TarInfo("\x1b[2J.json"), io.BytesIO())
    result = run("import", "archive", "--out", "target")
    assert result.exit_code == 1 and "1 added" in result.stdout
    assert "broken: ?[2J.json: it is no file of a store" in result.stdout


def test_prune_says_what_goes(run, here):
    path = user_store().path(fingerprint_of(CPU), LARGE)
    path.write_text("{")
    dry = run("prune", "--dry-run")
    assert dry.exit_code == 0 and path.exists()
    assert f"{path.relative_to(user_store().root)} (1 bytes): broken: " in dry.stdout
    assert f" would be removed from {user_store().root}" in dry.stdout
    told = json.loads(run("prune", "--json").stdout)
    assert str(path) in {one["path"] for one in told["files"]} and not told["dry_run"] and not path.exists()
    assert run("prune").stdout == f"0 files, 0 bytes, removed from {user_store().root}\n"
    assert json.loads(run("prune", "--other-environments", "--json").stdout)["files"]
    assert json.loads(run("prune", "--older-than", "0", "--json").stdout)["files"]
    assert list(user_store().decisions()) == []
