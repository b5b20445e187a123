"""docs/json.md describes what `--json` and `--progress jsonl` print: every key that is printed, and no other."""

import ast
import dataclasses
import json
import re
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest
import torch
from typer.main import get_command

from compiled_logprobs.check.run import check_backend
from compiled_logprobs.choose import tune, verify
from compiled_logprobs.cli import check
from compiled_logprobs.cli.main import app
from compiled_logprobs.decision import Decision, Kind
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.machine.environment import environment_of
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import user_store
from compiled_logprobs.store.transfer import Fate
from compiled_logprobs.tuning import worker
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.stored_decisions import FakeTuner, decided, publish

PAGE = (Path(__file__).parents[2] / "docs/json.md").read_text(encoding="utf-8")
PLAIN = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict}
PROBLEM = Problem("cpu", 384, 4096, torch.float32)
GRID = ("--device", "cpu", "--dtype", "float32", "--mode", "forward", "--vocab", "4096")


def tables() -> dict[str, dict[str, str]]:
    """The types of the keys under each heading of the page: '## profile' of a command, '### check' of an object, and
    'round' of an event."""
    tables: dict[str, dict[str, str]] = {}
    for heading, text in re.findall(r"^(##+ .*?)$(.*?)(?=^##|\Z)", PAGE, re.M | re.S):
        table = tables.setdefault(heading, {})
        for event, key, kind in re.findall(r"^\| (?:`(\w+)` \| |\| |)`(\w+)` \| `([^`]+)` \|", text, re.M):
            if event:
                table = tables[event] = {"event": "string"}
            table[key] = kind
    return tables


TABLES = tables()
COMMANDS = {heading[3:] for heading, table in TABLES.items() if heading.startswith("## ") and table}


def hold(value: object, kind: str, at: str) -> None:
    """That a value is what the page says: an object has the keys of its table, and no other."""
    if kind.endswith("?"):
        if value is None:
            return
        kind = kind[:-1]
    if kind.endswith("[]"):
        assert isinstance(value, list), at
        for item in value:
            hold(item, kind[:-2], at)
    elif kind.startswith("{"):
        assert isinstance(value, dict), at
        for name, item in value.items():
            hold(item, kind[1:-1], f"{at}.{name}")
    elif kind in PLAIN:
        assert isinstance(value, PLAIN[kind]) and (kind == "boolean" or not isinstance(value, bool)), at
    elif kind == "pair":
        assert isinstance(value, list) and len(value) == 2, at
    elif kind == "value":
        assert isinstance(value, float) or value in ("nan", "inf", "-inf"), at
    elif kind == "problem":
        assert isinstance(value, dict) and value.keys() == set(Problem._fields), at
    elif kind == "shown":
        hold(without_own_keys(value, kind, at), "decision", at)
    elif kind == "decision":
        value = without_own_keys(value, kind, at)
        value["candidates"] = {
            name: without_own_keys(candidate, "candidate", f"{at}.{name}")
            for name, candidate in value["candidates"].items()
        }
        assert json.loads(Decision.from_json(json.dumps(value).encode()).to_json()) == value, at
    else:
        hold_keys(value, TABLES[f"### {kind}"], f"{at}: {kind}")


def hold_keys(value: dict, kinds: dict[str, str], at: str) -> None:
    assert value.keys() == kinds.keys(), at
    for key, kind in kinds.items():
        hold(value[key], kind, f"{at}.{key}")


def without_own_keys(value: dict, kind: str, at: str) -> dict:
    """The other keys; those of the table are held against it."""
    own = TABLES[f"### {kind}"]
    hold_keys({key: value[key] for key in own}, own, at)
    return {key: item for key, item in value.items() if key not in own}


@pytest.fixture
def measuring(monkeypatch, tmp_path, mode):
    """A store with decisions of this machine and another; measuring and checking take no time, and fail at times."""
    mode("lookup")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compiled_logprobs.tuning.tuner.tempfile.gettempdir", lambda: str(tmp_path))
    for chosen, rows in (("cpp", 384), ("eager", 8192)):
        publish(decided(PROBLEM._replace(rows=rows), chosen))
    elsewhere = dataclasses.replace(environment_of(), cpu_threads=96)
    user_store().publish(elsewhere, decided(PROBLEM, environment=elsewhere.to_dict()))

    def answer(problem: Problem) -> Decision:
        if problem.rows == 16:
            raise TuningFailed("nothing could be measured")
        return decided(problem, "cpp")

    for module in (tune, verify):
        monkeypatch.setattr(module, "Tuner", FakeTuner(answer))

    def check_only_eager(subject, **_):
        if subject != "eager":
            raise BackendUnavailable(f"{subject} cannot run here")
        return check_backend("eager", PROBLEM._replace(rows=5, vocab=33, entropy=True), device="cpu")

    monkeypatch.setattr(check, "check_backend", check_only_eager)


@pytest.mark.parametrize(
    ("command", "filled"),
    [
        (("profile", *GRID, "--rows", "8,16", "--progress", "none"), ("decisions", "failed")),
        (("check",), ("reports", "unavailable")),
        (("explain", *GRID, "--rows", "384,9999"), ("explanations",)),
        (("show", "--all"), ("decisions",)),
        (("doctor",), ("environments", "backends")),
        (("verify", *GRID, "--progress", "none"), ("decisions",)),
        (("export", "file"), ("decisions",)),
        (("import", "archive", "--out", "target"), ("decisions",)),
        (("prune", "--older-than", "0"), ("files",)),
    ],
    ids=lambda value: value[0],
)
def test_a_command_prints_the_keys_of_its_table(run, measuring, command, filled):
    if command[0] == "import":
        run("export", "archive", "--all")
    printed = json.loads(run(*command, "--json").stdout, parse_constant=pytest.fail)
    assert all(printed[key] for key in filled)  # else there is little to hold against the page
    hold_keys(printed, TABLES[f"## {command[0]}"], command[0])


def test_explain_prints_the_explanation_of_one_call_itself(run, measuring):
    printed = json.loads(run("explain", "--rows", "9999", "--vocab", "4096", "--dtype", "fp32", "--json").stdout)
    assert printed["nearest"]
    hold(printed, "explanation", "explain")


def test_every_command_with_json_and_every_object_has_a_table_and_no_other():
    commands = get_command(app).commands.items()
    assert {name for name, each in commands if any("--json" in option.opts for option in each.params)} == COMMANDS
    kinds = {kind.strip("?[]{}") for table in TABLES.values() for kind in table.values()}
    objects = {heading.removeprefix("### ") for heading in TABLES if heading.startswith("### ")}
    assert kinds - {*PLAIN, "pair", "value"} == objects - {"candidate"}


def hold_events(text: str) -> set[str]:
    """That each line is what the page says of its event; the events."""
    events = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    for event in events:
        hold_keys(event, TABLES[event["event"]], event["event"])
    return {event["event"] for event in events}


def test_the_events_of_a_run_have_the_keys_of_their_tables(run, measuring):
    printed = run("profile", *GRID, "--rows", "8,16", "--progress", "jsonl").stdout
    printed += run("verify", *GRID, "--progress", "jsonl").stdout
    assert hold_events(printed) == {"start", "problem", "decision", "failed", "verified", "end"}


@pytest.mark.slow
def test_the_events_of_the_worker_program_have_the_keys_of_their_tables(run, tmp_path):
    small = ("--device", "cpu", "--dtype", "float32", "--mode", "backward", "--vocab", "33", "--rows", "16")
    wrong = "tests.helpers.backends_for_tuning:WrongSign"
    result = run("profile", *small, "--backend", wrong, "--progress", "jsonl", "--out", str(tmp_path), "--budget", "1")
    seen = hold_events(result.stdout)
    assert seen > {"step", "loaded", "first_call", "checked", "lost", "measuring", "memory", "round", "circumstances"}


def test_every_event_of_the_worker_program_is_on_the_page():
    calls = [node for node in ast.walk(ast.parse(Path(worker.__file__).read_text())) if isinstance(node, ast.Call)]
    emitted = {
        call.args[0].value: {"event", *(keyword.arg for keyword in call.keywords)}
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "_emit"
    }
    assert emitted.keys() - TABLES.keys() == {"started", "evidence"}, "these are not printed"
    assert all(keys == TABLES[event].keys() for event, keys in emitted.items() if event in TABLES)


def test_the_page_names_every_outcome():
    words = chain(get_args(verify.Standing), get_args(Fate), get_args(Kind))
    assert not [word for word in words if f"`{word}`" not in PAGE]
