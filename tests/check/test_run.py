"""The check stops no right backend, and every wrong one: the wrong ones are in test_causes.py."""

import re

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.backends import BUILT_IN, get_backend
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.check.report import MEANING
from compiled_logprobs.problem import Problem
from tests.helpers.backends_for_tuning import registered
from tests.helpers.wrong_backends import (
    PROBLEM,
    RIGHT_BACKENDS,
    WRONG_BACKENDS,
    float64_throughout,
    good,
    log_softmax_and_gather,
)


def test_there_are_many_wrong_backends_and_each_kind_of_check_stops_one():
    assert len(WRONG_BACKENDS) >= 20 and len(RIGHT_BACKENDS) >= 5
    of_named_checks = {wrong.reason for wrong in WRONG_BACKENDS}
    # Each error has a twin, the mean square, which the same mistakes trip; see the next test. Row invariance is
    # for backends that declare it.
    assert set(MEANING) - of_named_checks == {"entropy_rmse", "gradient_rmse", "row_invariance"}


def test_the_mean_square_has_verdicts_of_its_own():
    report = clp.check_backend(lambda logits, labels: good(logits, labels) * 1.001, PROBLEM)
    assert {"log_prob_rmse", "gradient_rmse"} <= set(report.reasons)


def stops(function, problem=None, seed=None) -> list[str]:
    return [check.detail for check in clp.check_backend(function, problem, seed=seed).checks if not check.passed]


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 24), marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("right", RIGHT_BACKENDS, ids=lambda right: right.__name__)
def test_no_right_backend_is_stopped(right, seeds):
    """Small problems, in alternating dtypes, with and without a gradient, and with whatever options a function has."""
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for seed in seeds:
        problem = PROBLEM._replace(dtype=dtypes[seed % 3], needs_grad=seed % 2 == 0)
        assert (seed, stops(right, problem, seed)) == (seed, [])


@pytest.mark.slow
@pytest.mark.parametrize("right", [log_softmax_and_gather, float64_throughout])
def test_no_right_backend_is_stopped_by_default_inputs(right):
    report = clp.check_backend(right)
    assert report.passed, [check.detail for check in report.checks if not check.passed]
    assert report.repeatable


@pytest.mark.slow
def test_the_compiled_idiom_of_a_user_passes():
    """torch.compile over log_softmax and gather, as open-instruct and others have it."""
    compiled = torch.compile(log_softmax_and_gather, dynamic=True)
    for seed in range(3):
        assert stops(lambda logits, labels: compiled(logits, labels), PROBLEM, seed) == []


def test_inputs_are_fresh_and_a_seed_repeats_them():
    seen = []

    def spy(logits, labels):
        seen.append(logits.detach().clone())
        return good(logits, labels)

    problem = Problem("cpu", 4, 50, torch.float32)
    one, other = clp.check_backend(spy, problem), clp.check_backend(spy, problem)
    half = len(seen) // 2
    assert one.seed != other.seed and not all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    seen.clear()
    clp.check_backend(spy, problem, seed=one.seed), clp.check_backend(spy, problem, seed=one.seed)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_inputs_cover_what_the_design_lists():
    seen = []

    def spy(logits, labels):
        seen.append((logits.detach(), labels.clone()))
        return good(logits, labels)

    clp.check_backend(spy, Problem("cpu", 48, 3001, torch.float32))
    rows = {len(labels) for _, labels in seen}
    assert {0, 1, 7, 33, 48} <= rows  # the bucket of 48 is 33 to 48
    labels = torch.cat([labels for _, labels in seen])
    assert {0, 3000, -100} <= set(labels.tolist())
    assert {1023, 1024, 2047, 2048} <= set(labels.tolist())
    values = [logits for logits, _ in seen if len(logits)]
    assert any(x.isnan().any() for x in values)
    assert any((x == -torch.inf).all(-1).any() for x in values)
    assert any(x.min() > 9e3 for x in values) and any(x.max() < -9e3 for x in values)
    assert any((x == x[:, :1]).all() for x in values)
    assert any(x.stride(0) != 3001 and x.data_ptr() % 16 != 0 for x in values)


class SumsByTheNumberOfRows(Eager):
    """As a kernel does that has another path for many rows."""

    name = "sums_by_the_number_of_rows"
    row_invariant = True

    def __init__(self, result: str, rows: int) -> None:
        self.result, self.rows = result, rows

    def forward(self, logits, labels, temperature, *, entropy):
        log_probs, entropies, residuals = super().forward(logits, labels, temperature, entropy=entropy)
        if log_probs.shape[0] >= self.rows:
            result = log_probs if self.result == "log_probs" else entropies
            result.mul_(1.0 + 2**-23)
        return log_probs, entropies, residuals


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("result", ["log_probs", "entropy"])
def test_a_backend_is_held_to_the_row_invariance_that_it_declares(result, short):
    problem = Problem("cpu", 512, 301, torch.float32, entropy=result == "entropy")
    with registered(sums_by_the_number_of_rows=SumsByTheNumberOfRows(result, rows=65)):
        report = clp.check_backend("sums_by_the_number_of_rows", problem, short=short)
        few = clp.check_backend("sums_by_the_number_of_rows", problem._replace(rows=64), short=short)
    assert report.reasons == ["row_invariance"] and report.row_invariant is False
    (failed,) = [check for check in report.checks if not check.passed]
    assert re.fullmatch(r"512 rows, all and some: the first \d+ of 512 rows have other bits alone", failed.detail)
    assert few.passed and few.row_invariant


def test_where_row_invariance_is_not_declared_it_is_recorded_and_no_failure():
    def depends_on_the_batch(logits, labels):
        return good(logits, labels) * (1.0 if len(labels) > 2 else 1.0 + 2**-23)

    report = clp.check_backend(depends_on_the_batch, Problem("cpu", 12, 3001, torch.float32))
    assert report.passed and report.row_invariant is False and report.repeatable


def test_which_backends_declare_row_invariance():
    assert [name for name in BUILT_IN if get_backend(name).row_invariant] == ["cpp", "compiled", "flash_attn"]


def test_a_backend_that_cannot_run_the_problem():
    with pytest.raises(clp.BackendUnavailable, match="needs a CUDA or ROCm device"):
        clp.check_backend("flash_attn", device="cpu")


@pytest.mark.parametrize(
    ("problem", "device", "told"),
    [
        ("p", None, "got a problem of type str; a Problem is valid. Pass e.g. Problem"),
        (PROBLEM._replace(rows=-1), None, "whose rows is -1; an integer of 0 or more is valid. Pass e.g. Problem"),
        (PROBLEM._replace(vocab=0), None, "whose vocab is 0; an integer of 1 or more is valid"),
        (PROBLEM._replace(vocab=30.0), None, "whose vocab is 30.0; an integer"),
        (PROBLEM._replace(labels_per_row=0), None, "whose labels_per_row is 0; an integer of 1 or more"),
        (PROBLEM._replace(dtype="float32"), None, "whose dtype is 'float32'; torch.float32, "),
        (PROBLEM._replace(out_dtype=torch.int64), None, "whose out_dtype is torch.int64; torch.float32, "),
        (PROBLEM._replace(temperature="warm"), None, "temperature is 'warm'; valid is one of none, number, per_token"),
        (PROBLEM._replace(device_type=0), None, "device_type is 0; valid is a name of at most"),
        (PROBLEM._replace(device_type="cuda:1"), None, "device_type is 'cuda:1'; valid is a name of at most"),
        (PROBLEM._replace(device_type="mars"), None, "got device='mars'; e.g. 'cpu' or 'cuda:0' is valid. Name one"),
        (PROBLEM._replace(device_type="xpu"), None, "got device='xpu', which this torch cannot use here: "),
        (None, "mars", "got device='mars'; e.g. 'cpu' or 'cuda:0' is valid. Name one of them."),
    ],
    ids=str,
)
def test_a_problem_or_device_that_cannot_be_is_refused(problem, device, told):
    with pytest.raises(clp.InputError, match=re.escape(told)):
        clp.check_backend("eager", problem, device=device)
