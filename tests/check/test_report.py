"""What the check found case by case: verdicts, how the errors spread, and the tokens that are most off."""

import json
import math

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.check.cases import cases
from compiled_logprobs.check.report import SAMPLED_ERRORS, WORST, Errors
from compiled_logprobs.decision import QUANTILES, CaseEvidence, Token
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem
from tests.helpers.functions_to_check import good, nan_in_front, positive

PROBLEM = Problem("cpu", 12, 3001, torch.float32, needs_grad=True, entropy=True)
PLAIN = Problem("cpu", 12, 3001, torch.float32)


@pytest.fixture(scope="module")
def eager():
    return clp.check_backend("eager", PROBLEM, seed=3)


def case_of(report, name: str) -> CaseEvidence:
    return next(case for case in report.results[0].cases if case.case == name)


def worst_of(report, name: str, what: str = "log_prob") -> Token:
    return next(spread for spread in case_of(report, name).errors if spread.what == what).worst[0]


def test_every_case_is_in_it_and_the_worst_over_all_is_the_verdict(eager):
    names = [case.name for case in cases(PROBLEM, short=False, foreign=False)]
    recorded = eager.results[0].cases
    assert [case.case for case in recorded][: len(names)] == names
    for check in eager.checks:
        by_case = [other for case in recorded for other in case.checks if other.name == check.name]
        assert by_case and check.passed == all(other.passed for other in by_case)
        if check.figure is not None and check.limit:
            assert max(x.figure / x.limit for x in by_case if x.limit) == check.figure / check.limit


def test_the_spread_of_the_errors(eager):
    normal = case_of(eager, "normal")
    assert [spread.what for spread in normal.errors] == ["log_prob", "entropy", "gradient"]
    for spread in normal.errors:
        assert len(spread.quantiles) == len(QUANTILES) and list(spread.quantiles) == sorted(spread.quantiles)
        figure = next(check.figure for check in normal.checks if check.name == f"{spread.what}_error")
        # The check weighs each error by the limit of its row, so that its figure need not be the largest of all.
        assert 0.0 < figure <= spread.quantiles[-1] * (1 + 1e-3)  # which is rounded
        errors = [token.error for token in spread.worst]
        assert errors == sorted(errors, reverse=True) and errors[0] == spread.quantiles[-1]
        assert 0 < len(errors) <= WORST and spread.count > 0
    assert case_of(eager, "no rows").errors == ()


def test_the_worst_token_is_named():
    """The third row is off by a half, and all others are right."""
    calls = []

    def off(logits, labels):
        calls.append((logits.detach().clone(), labels.clone()))
        result = good(logits, labels)
        return result - 0.5 * (torch.arange(len(labels)) == 2) * (labels != -100)

    report = clp.check_backend(off, PLAIN, seed=0)
    assert "log_prob_error" in report.reasons
    logits, labels = next((x, y) for x, y in calls if len(y) == 7 and x[0].std() > 30 and x.isfinite().all())
    assert labels[2] != -100  # with this seed
    worst = worst_of(report, "wide")
    true = reference(logits, labels[:, None]).log_probs[2, 0]
    assert (worst.row, worst.token) == (2, int(labels[2]))
    assert worst.true == pytest.approx(float(true)) and worst.got == pytest.approx(float(true) - 0.5)
    assert worst.error == pytest.approx(0.5, rel=1e-3)
    failed = next(check for check in case_of(report, "wide").checks if check.name == "log_prob_error")
    assert not failed.passed and failed.figure > failed.limit and failed.detail.startswith("wide: ")


def test_a_value_that_is_nan_where_it_should_not_be_is_the_worst():
    report = clp.check_backend(nan_in_front, PLAIN, seed=1)
    assert "nan_pattern" in report.reasons
    worst = worst_of(report, "wide")
    assert (worst.row, worst.got, worst.error) == (0, "nan", None) and math.isfinite(worst.true)


def test_what_stops_a_case_leaves_the_others_out():
    def breaks(logits, labels):
        if (logits > 9e3).any():
            raise ValueError("too large")
        return good(logits, labels)

    report = clp.check_backend(breaks, PLAIN, seed=1)
    *before, last = report.results[0].cases
    assert last.case == "shifted up by 1e4" and not last.checks[0].passed and last.checks[0].name == "runs"
    assert "too large" in last.checks[0].detail
    assert all(check.passed for case in before for check in case.checks)


def test_the_report_in_words(eager):
    assert str(eager) == f"eager: passed {len(eager.checks)} of {len(eager.checks)} checks"
    report = clp.check_backend(positive, PLAIN._replace(needs_grad=False), seed=1)
    assert repr(report).startswith("positive: wrong: log_prob_sign, ")
    assert "\nlikely cause: returns the loss: " in repr(report)


def test_the_report_as_json(eager):
    report = json.loads(json.dumps(eager.to_dict(), allow_nan=False))
    keys = {"name", "meaning", "problem", "options", "passed", "figure", "limit", "detail"}
    assert report["passed"] is True and all(check.keys() == keys for check in report["checks"])
    normal = next(case for case in report["cases"] if case["case"] == "normal")
    assert normal["problem"] == str(PROBLEM) and "entropy" in normal["options"]
    assert [check["name"] for check in normal["checks"]] == [x.name for x in case_of(eager, "normal").checks]


def test_a_sample_has_errors_of_all_columns_and_only_what_counts():
    rows, columns = 7, SAMPLED_ERRORS
    error = torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
    counted = (torch.arange(rows) != 3)[:, None]
    got, true = error.index_fill(0, torch.tensor([5]), torch.nan), torch.zeros_like(error)
    true[5] = torch.nan
    errors = Errors("gradient", got, true, counted, torch.arange(rows))
    sample = errors.sample()
    assert len(sample) <= SAMPLED_ERRORS * 5 / 7 + 2
    assert set((sample // columns).int().tolist()) == {0, 1, 2, 4, 6}
    assert len(set((sample % columns).int().tolist())) > SAMPLED_ERRORS / 4  # and not the same few in every row
    assert [(token.row, token.token) for token in errors.worst()] == [
        (6, columns - 1),
        (6, columns - 2),
        (6, columns - 3),
    ]
