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


def files(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.root)): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and a user's store with two decisions for this machine and one for another."""
    monkeypatch.chdir(tmp_path)
    for problem in (LARGE, LARGE._replace(rows=2048)):
        publish(decided(problem))
    user_store().publish(ELSEWHERE, decided(environment=ELSEWHERE.to_dict()))
    return tmp_path


@pytest.fixture
def target(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("target") / "profiles")


def test_export_and_import(run, here, target):
    first = run("export")
    assert first.exit_code == 0, first.output
    file = here / f"compiled-logprobs-{fingerprint_of(CPU)}.tar.gz"
    assert first.stdout == f"{file.name}: 2 decisions, {file.stat().st_size} bytes\n"
    result = run("import", file.name, "--out", str(target.root))
    assert result.exit_code == 0 and result.stdout.count("nothing was stored for it") == 2, result.output
    assert result.stdout.endswith(f"2 decisions: 2 added; in {target.root}\n")
    told = json.loads(run("import", file.name, "--out", str(target.root), "--json").stdout)
    assert [one["fate"] for one in told["decisions"]] == ["same"] * 2
    assert told["decisions"][0]["decision"]["problem"]["vocab"] == LARGE.vocab
    told = json.loads(run("export", "other", "--environment", ELSEWHERE.fingerprint(), "--json").stdout)
    assert told == {"file": "other", "decisions": 1, "bytes": (here / "other").stat().st_size}
    assert "None is for this machine" in run("import", "other", "--out", str(target.root)).stdout


def test_what_is_broken_in_an_archive_is_told_and_exit_1(run, here, target):
    run("export", "archive")
    with tarfile.open("archive") as archive:
        members = {one.name: archive.extractfile(one).read() for one in archive}
    with tarfile.open("archive", "w:gz") as archive:
        for name, data in {**members, "\x1b[2J.json": b"{}"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    result = run("import", "archive", "--out", str(target.root))
    assert result.exit_code == 1 and "2 added" in result.stdout
    assert "broken: ?[2J.json: it is no file of a store" in result.stdout


def test_where_to_export_from(run, here):
    publish(decided(), Store(here / "profiles"))
    assert run("export", "archive", "--from", "profiles", "--all").stdout.startswith("archive: 1 decisions, ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "/dev/null"), "got /dev/null, which cannot be written (File exists). Valid is a new file"),
        (("export", "/dev/null/archive"), "got /dev/null/archive, which cannot be written (Not a directory)"),
        (("export", "--all", "--environment", "0" * 16), "got --environment and --all; one of them is valid"),
        (("export", "--environment", "0" * 16), f"holds no decision for {'0' * 16}"),
        (("export", "--from", "nowhere"), "nowhere holds no decision for "),
        (("import", "no such file"), "got 'no such file', which cannot be opened (No such file or directory)"),
        (("import", "."), "got '.', which cannot be opened (Is a directory)"),
        (("import", __file__), "the archive cannot be used: "),
    ],
)
def test_what_cannot_be_done_is_said(run, here, arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr
    assert list(here.iterdir()) == []


def test_prune_says_what_goes(run, here, monkeypatch):
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
