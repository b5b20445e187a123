"""A few rows at the full size: what is right passes whatever the options, what is wrong in those rows does not."""

import pytest
import torch

from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.check.function import with_all_results
from compiled_logprobs.check.spot_check import what_is_wrong
from compiled_logprobs.problem import RESULTS, Problem
from compiled_logprobs.tuning.rounds import Measurement

PROBLEM = Problem("cpu", rows=96, vocab=1031, dtype=torch.float32, aligned=False)
GRADIENT = PROBLEM._replace(needs_grad=True)
WITH_ENTROPY = GRADIENT._replace(entropy=True)
WITH_ALL = with_all_results(GRADIENT)
PROBLEMS = {
    "forward": PROBLEM,
    "backward": GRADIENT,
    "entropy": WITH_ENTROPY._replace(temperature="per_token"),
    "many labels": GRADIENT._replace(inplace_backward=True, masked_logits=True, labels_per_row=3, temperature="number"),
    "three dimensions": WITH_ENTROPY._replace(layout="slice"),
    "results as the logits": WITH_ALL._replace(out_dtype=torch.bfloat16, temperature="number"),
    "all results": WITH_ALL,
}


def measured(backend, problem):
    measurement = Measurement(problem, {"eager": Eager(), "other": backend})
    list(measurement.rounds(0))
    return measurement.runs["other"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_right_passes(problem, dtype):
    run = measured(Eager(), problem._replace(dtype=dtype))
    assert run.alive, run.reason


class WrongFrom(Eager):
    """Right for few rows; with many, an offset overflows: the last rows are those of the first."""

    def __init__(self, what: str) -> None:
        self.what = what

    def forward(self, inputs, wanted):
        results = super().forward(inputs, wanted)
        self.spoil({**results._asdict(), "log-probability": results.log_probs})
        return results

    def backward(self, inputs, stats, upstream, *, inplace):
        gradient = super().backward(inputs, stats, upstream, inplace=inplace)
        self.spoil({"gradient": gradient})
        return gradient

    def spoil(self, results):
        result = results.get(self.what, torch.empty(0))
        if len(result) > 50:
            result[50:] = result[: len(result) - 50].clone()


@pytest.mark.parametrize("what", ["log-probability", *RESULTS, "gradient"])
def test_what_is_wrong_with_many_rows_only_is_found(what):
    problem = WITH_ALL._replace(dtype=torch.bfloat16)
    run = measured(WrongFrom(what), problem)
    assert run.outcome == "wrong"
    assert run.reason.startswith(f"with 96 rows, the {what} of row ")
    assert measured(WrongFrom(what), problem._replace(rows=48)).alive


def test_nan_is_wrong_where_the_truth_is_finite():
    logits, labels = torch.randn(4, 9), torch.randint(9, (4, 1))
    right = torch.log_softmax(logits, -1).gather(-1, labels)
    upstream = {"log_probs": torch.ones(4, 1)}
    problem = Problem("cpu", 4, 9, torch.float32)
    assert what_is_wrong(problem, logits, labels, 1.0, upstream, [right], None) is None
    wrong = what_is_wrong(problem, logits, labels, 1.0, upstream, [right * torch.nan], None)
    assert wrong == "with 4 rows, the log-probability of row 0 is off by inf"
