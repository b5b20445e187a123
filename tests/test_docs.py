"""What README and docs/ show is true: Python runs, commands and options exist, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from benchmarks import picture
from compiled_logprobs import check_backend
from compiled_logprobs.api import functions
from compiled_logprobs.choose.explain import explain_problem
from compiled_logprobs.cli.main import app
from compiled_logprobs.compat import FRAMEWORKS
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import Problem, bucket
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.presets import grid
from tests.helpers.stored_decisions import CPU, decided, publish

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```$", re.M | re.S)
NOT_EXECUTED = re.compile(r"<!-- not executed: .+ -->\s*$")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMANDS = ("compiled-logprobs", "make", "python", "pip", "#")


def blocks(page: Path, *languages: str) -> list[str]:
    """The code of those blocks of a page that are to be executed."""
    text = page.read_text()
    return [
        block[3]
        for block in BLOCK.finditer(text)
        if block[2] in languages and not NOT_EXECUTED.search(text[: block.start()].rstrip())
    ]


def commands() -> list[tuple[str, str]]:
    return [
        (page.name, line.strip())
        for page in PAGES
        for block in blocks(page, "bash", "")
        for line in block.splitlines()
        if line.strip().startswith(COMMANDS[:-1])
    ]


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_on_a_page_runs_from_top_to_bottom(page, tmp_path):
    program = "\n\n".join(blocks(page, "python"))
    environment = {
        **os.environ,
        "COMPILED_LOGPROBS_MODE": "lookup",
        "COMPILED_LOGPROBS_BUDGET_S": "2",
        "COMPILED_LOGPROBS_PROFILES": str(tmp_path / "profiles"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{program}\n{done.stderr[-3000:]}"


def test_the_sample_of_a_check_counts_what_it_counts_now():
    def function(logits, labels):
        return -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    report = check_backend(function, vocab=131)
    with_limit = list(dict.fromkeys(check.name for check in report.checks if check.limit is not None))
    (sample,) = (block for block in blocks(ROOT / "docs" / "check.md", "text") if "The worst of each check" in block)
    assert sample.startswith(f"function: passed {len(report.checks)} of {len(report.checks)} checks\n")
    assert [line.split()[0] for line in sample.splitlines()[4 : 4 + len(with_limit)]] == with_limit
    assert f"\nand {len({check.name for check in report.checks}) - len(with_limit)} checks without a limit" in sample


def test_every_block_says_its_language_and_the_exceptions_are_few():
    languages = {block[2] for page in PAGES for block in BLOCK.finditer(page.read_text())}
    assert languages <= {"python", "bash", "text", ""}
    skipped = sum(page.read_text().count("<!-- not executed: ") for page in PAGES)
    assert 0 < skipped <= 6
    assert sum(len(blocks(page, "python")) for page in PAGES) > skipped


@pytest.mark.parametrize(("page", "line"), [shown for shown in commands() if shown[1].startswith("compiled-logprobs")])
def test_a_command_on_a_page_exists_with_its_options(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()  # as pages name the archive that is there
    name, *arguments = words_of(line)[1:]
    if name == "--help":
        return
    command = get_command(app).commands[name]
    command.make_context(name, arguments, resilient_parsing=False)  # raises for what it does not know


def test_other_commands_on_the_pages_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    extras = re.findall(r"^([\w-]+) = \[$", (ROOT / "pyproject.toml").read_text(), re.M)
    seen = set()
    for page, line in commands():
        program, *arguments = words_of(line)
        seen.add(program)
        if program == "make":
            assert {word for word in arguments if "=" not in word} <= set(targets), (page, line)
        elif program == "python":
            assert arguments[0] == "-m" and find_spec(arguments[1]), (page, line)
        elif program == "pip":
            wanted = re.findall(r"\[([\w,-]+)\]", line)
            assert all(extra in extras for group in wanted for extra in group.split(",")), (page, line)
    assert seen == set(COMMANDS[:-1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_of_files_lead_to_what_is_there(page):
    text = re.sub(r"<!--.*?-->", "", BLOCK.sub("", page.read_text()), flags=re.S)
    for target in LINK.findall(text):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target
    for name in re.findall(r"`([\w/]+\.(?:py|md|json|toml|cpp))`", page.read_text()):
        assert "my_backend" in name or next(ROOT.glob(f"[!.]*/**/{name}"), None) or (ROOT / name).exists(), name


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        links = {
            (page.parent / target.split("#")[0]).resolve() for page in new for target in LINK.findall(page.read_text())
        }
        new = links.intersection(PAGES) - reached
    assert reached == set(PAGES)


def test_the_migration_tables_name_functions_that_exist():
    rows = re.findall(
        r"^\| .*? \| `compiled_logprobs\.compat\.(\w+)` \| (.*?) \|", (ROOT / "docs/frameworks.md").read_text(), re.M
    )
    for name, listed in rows:
        module = import_module(f"compiled_logprobs.compat.{name}")
        own = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        patched = {key for _, key in FRAMEWORKS[name].functions} if name in FRAMEWORKS else set()
        assert set(re.findall(r"`(\w+)`", listed)) == {key for key in own if key[0] != "_" or key in patched}, name
    assert {name for name, _ in rows} == set(FRAMEWORKS)


def test_the_chart_of_the_readme_is_that_of_the_table():
    assert picture.PICTURE.read_text() == picture.picture(picture.TABLE.read_text()), "run python -m benchmarks.picture"


@pytest.fixture(scope="module")
def calls_on_pages() -> list[tuple[str, Problem]]:
    """The problem of each call of the three functions in the Python of a page, and the page; `eager` serves them."""
    calls: list[tuple[str, Problem]] = []

    def note(problem: Problem, logits: torch.Tensor) -> object:
        calls.append((page.name, problem))
        return functions.named_backend("eager", problem)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(functions, "Auto", note)
        for page in PAGES:
            names: dict[str, object] = {}
            for block in blocks(page, "python"):
                if "_from_logits(" in block:
                    exec(block, names)
    return calls


def test_the_preset_for_rl_serves_every_call_of_the_pages(calls_on_pages, mode, monkeypatch, tmp_path):
    """At Qwen3's vocabulary in bfloat16, after `profile --preset rl --vocab qwen3 --dtype bf16`."""
    mode("lookup")
    monkeypatch.chdir(tmp_path)  # where no profiles are; and those that ship may be of this very machine
    monkeypatch.setattr("compiled_logprobs.store.bundled_store", lambda: Store(tmp_path / "bundled"))
    measured = {bucket(problem) for problem in grid("cpu", "rl", vocabs=[151936], dtypes=[torch.bfloat16])}
    for problem in measured:
        publish(decided(problem, "cpp"))
    assert {page for page, _ in calls_on_pages} >= {"README.md", "contract.md", "autotuner.md"}
    for page, call in calls_on_pages:
        for rows in (call.rows, 512, 4096):
            asked = call._replace(vocab=151936, dtype=torch.bfloat16, aligned=True, rows=rows)
            explanation = explain_problem(asked, CPU, policy())
            assert explanation.decision is not None and explanation.decision.problem in measured, (
                page,
                str(explanation),
            )
            assert explanation.backend == "cpp" and explanation.source in ("user store", "near", "related")
