"""Which backend `auto` takes."""

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.api.functions import problem_of
from compiled_logprobs.backends import get_backend
from compiled_logprobs.backends.compiled import Compiled
from compiled_logprobs.backends.cpp import Cpp
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose import serving
from compiled_logprobs.operation.formula import Saved, Upstream
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import Problem, bucket


def serve(asked: Problem) -> str:
    return serving.serve(asked, torch.device("cpu"), policy())


def problem(rows: int, vocab: int, **options) -> Problem:
    return Problem("cpu", rows, vocab, torch.float32, **options)


@pytest.mark.parametrize(
    ("rows", "top"),
    [
        (0, 1),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 6),
        (6, 6),
        (7, 8),
        (9, 12),
        (12, 12),
        (13, 16),
        (1025, 1536),
        (1537, 2048),
    ],
)
def test_buckets_are_half_octaves(rows, top):
    assert bucket(problem(rows, 7)).rows == top


def test_small_problems_are_for_eager():
    assert serve(problem(1, 2**20 - 1)) == "eager"
    assert serve(problem(0, 2**21)) == "eager"


def test_large_problems_are_for_the_first_backend_that_passes():
    assert serve(problem(1024, 1031, needs_grad=True)) == "cpp"
    assert decisions.served(problem(900, 1031 + 500, needs_grad=True), policy()) is None
    same_bucket = decisions.served(problem(1020, 1031, needs_grad=True), policy())
    assert same_bucket is not None and same_bucket.name == "cpp"


def test_a_backend_that_fails_the_gate_serves_nothing(monkeypatch):
    def wrong_sign(self, *arguments, **options):
        log_probs, entropies, residuals = forward(self, *arguments, **options)
        return -log_probs, entropies, residuals

    forward = Cpp.forward
    monkeypatch.setattr(Cpp, "forward", wrong_sign)
    assert serve(problem(1024, 1031)) == "compiled"


def test_a_winner_that_raises_is_set_aside_and_the_call_is_served(monkeypatch):
    logits, labels = torch.randn(1024, 1031), torch.randint(1031, (1024,))
    clp.log_probs_from_logits(logits, labels)
    calls = []

    def broken(self, *arguments, **options):
        calls.append(1)
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(Cpp, "forward", broken)
    with pytest.warns(RuntimeWarning, match="backend 'cpp' failed on 1024 x 1031 float32 on cpu .*the driver is gone"):
        out = clp.log_probs_from_logits(logits, labels)
    assert torch.equal(out, clp.log_probs_from_logits(logits, labels, backend="eager"))
    clp.log_probs_from_logits(logits, labels)
    assert len(calls) == 1  # told once, and not tried again
    with pytest.raises(RuntimeError, match="the driver is gone"):
        clp.log_probs_from_logits(logits, labels, backend="cpp")


def test_out_of_memory_is_raised_as_it_is(monkeypatch):
    logits, labels = torch.randn(1024, 1031), torch.randint(1031, (1024,))
    clp.log_probs_from_logits(logits, labels)

    def full(self, *arguments, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Cpp, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        clp.log_probs_from_logits(logits, labels)


def test_no_room_for_the_gate_is_no_decision(monkeypatch):
    def full(self, *arguments, **options):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as context:
        context.setattr(Cpp, "forward", full)
        assert serve(problem(1024, 1031)) == "eager"
    assert serve(problem(1024, 1031)) == "cpp"


def test_the_gate_runs_once_for_all_numbers_of_rows(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return check(*arguments, **options)

    check = serving.check_backend
    monkeypatch.setattr(serving, "check_backend", counted)
    assert {serve(problem(rows, 1031)) for rows in (1024, 2000, 3000)} == {"cpp"} and len(calls) == 1


@pytest.mark.parametrize("shape", [(8, 1031), (2, 4, 1031), (8, 1024)])
def test_warmth_is_told_of_the_problem_that_a_call_poses(shape):
    backend = get_backend("compiled")
    logits, labels = torch.randn(shape), torch.randint(1024, shape[:-1])
    for view, y in ((logits, labels), (logits[..., 1:, :], labels[..., 1:])):
        clp.log_probs_from_logits(view, y, backend="compiled")
        assert backend.is_warm(problem_of(view, y.unsqueeze(-1), 1.0))


def test_warmth_is_known():
    backend = Compiled()
    p = problem(8, 1031, needs_grad=True)
    assert not backend.is_warm(p) and get_backend("eager").is_warm(p)
    logits, labels = torch.randn(8, 1031), torch.randint(1031, (8, 1))
    log_probs, _, residuals = backend.forward(logits, labels, 1.0, entropy=False)
    assert backend.is_warm(p._replace(needs_grad=False)) and not backend.is_warm(p)
    saved = Saved(logits, labels, 1.0, residuals, torch.zeros(8, dtype=torch.bool))
    backend.backward(saved, Upstream(log_probs), inplace=False)
    assert backend.is_warm(p) and not backend.is_warm(p._replace(vocab=1000))
