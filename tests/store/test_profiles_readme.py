"""profiles/README.md describes the files as the code writes them."""

import re
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import get_args

import pytest

from compiled_logprobs import decision
from compiled_logprobs.decision import Candidate, Decision, Evidence, Spread
from compiled_logprobs.problem import MODES, Problem, problem_name
from compiled_logprobs.store.files import EVIDENCE, EVIDENCE_LIMIT, FACTS, LIMIT, VERSION
from compiled_logprobs.tuning.presets import grid

TEXT = (Path(__file__).parents[2] / "profiles" / "README.md").read_text(encoding="utf-8")
TABLES = [
    [re.findall(r"`(\w+)`", line.split("|")[1]) for line in lines]
    for is_table, lines in groupby(TEXT.splitlines(), key=lambda line: line.startswith("|"))
    if is_table
]
"""The names in the first column of each table."""


@pytest.mark.parametrize(("number", "described"), list(enumerate((Problem, Decision, Candidate, Evidence, Spread))))
def test_a_table_names_the_fields_that_are_written_and_no_others(number, described):
    names = [name for row in TABLES[number] for name in row]
    written = Problem._fields if described is Problem else [field.name for field in fields(described)]
    assert sorted(names) == sorted(written)
    assert len(TABLES) == 5


@pytest.mark.parametrize("described", [decision.Speedup, decision.Check, decision.CaseEvidence, decision.Token])
def test_what_lies_deeper_is_named_too(described):
    assert {field.name for field in fields(described)} <= set(re.findall(r"`(\w+)`", TEXT))


def test_outcomes_quantiles_and_limits_are_those_of_the_code():
    assert all(f"`{outcome}`" in TEXT for outcome in get_args(decision.Outcome))
    assert f"{', '.join(f'{100 * share:g}' for share in decision.QUANTILES[:-1])} and 100 % quantiles" in TEXT
    assert f"at most {LIMIT >> 20} MiB (evidence: {EVIDENCE_LIMIT >> 20} MiB)" in TEXT


def test_the_files_have_the_names_that_are_shown():
    (problem,) = grid("cpu", vocabs=[151936], rows=[512], modes=["backward"])[1:]
    assert problem.needs_grad == MODES["backward"]["needs_grad"]
    name = problem_name(problem)
    for shown in (f"{VERSION}/\n", f"{FACTS} ", f"{name}.json ", f"{name}{EVIDENCE} "):
        assert shown in TEXT, shown
