"""Do ahead of time what the first call of a problem would do, but for measuring: choose, check, compile, load."""

from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch import Tensor

from compiled_logprobs.backends import require_backend
from compiled_logprobs.choose import memory
from compiled_logprobs.choose.auto import Auto, choose, is_capturing
from compiled_logprobs.choose.rule import Context
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.operation.autograd import ForwardBackward, compute
from compiled_logprobs.operation.contract import Upstream, wanted_by
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.rounds import empty_logits


def warm(problems: Sequence[Problem], device: torch.device, backend: str) -> dict[Problem, str]:
    """What has served each problem, run on `device` by "auto" or a backend's name; see `api.functions.warm`."""
    return {problem: _warm_one(problem, device, backend) for problem in problems}


def _warm_one(problem: Problem, device: torch.device, backend: str) -> str:
    if is_capturing(problem):
        raise LogProbsError(
            f"warm({problem}) would run and compile while a CUDA graph is captured. Call it before the capture."
        )
    with torch.inference_mode(False), torch.set_grad_enabled(problem.needs_grad):
        logits = empty_logits(problem, device)
        if backend != "auto":
            _run(require_backend(backend, problem), problem, logits)
            served = backend
        else:
            choose(problem, logits.device, policy(), _without_measuring)
            serving = Auto(problem, logits)  # which finds that choice, and lets eager serve where it fails
            _run(serving, problem, logits)
            served = serving.chosen
    if problem.layout == "flat":  # of others the strides count too, which a problem does not tell
        memory.MEMORY.warmed.add((served, problem))
    return served


def _without_measuring(context: Context, standing: Decision | None) -> str:
    return "warm(...) does not measure; tune(...) does"


def _run(serving: ForwardBackward, problem: Problem, logits: Tensor) -> None:
    """Forward; and backward, as often as there are ways for a gradient to come: each may be a kernel of its own.

    So may each start of the logits: where not every row starts at a multiple of 16 bytes, the first may or may not.
    """
    rows = logits.shape[:-1]
    labels = torch.zeros((*rows, problem.labels_per_row), dtype=torch.int64, device=logits.device)
    temperature: float | Tensor = 1.0 if problem.temperature == "none" else 0.7
    if problem.temperature == "per_token":
        temperature = torch.full(rows, 0.7, device=logits.device)
    wanted = wanted_by(problem)
    differentiable = [name for name in Upstream._fields[1:] if getattr(wanted, name)]
    ways = [way for count in range(len(differentiable) + 1) for way in combinations(differentiable, count)]
    starts = sorted({0, logits.storage_offset()})
    for start, way in product(starts, ways if problem.needs_grad else ways[:1]):
        x = logits.as_strided(logits.shape, logits.stride(), start).requires_grad_(problem.needs_grad)
        log_probs, *others = compute(
            serving, x, labels, temperature, wanted=wanted, inplace_backward=problem.inplace_backward
        )
        names = [name for name, is_wanted in wanted._asdict().items() if is_wanted]
        results = [log_probs, *(result for name, result in zip(names, others, strict=True) if name in way)]
        results = [result.to(problem.out_dtype) for result in results]
        if problem.needs_grad:
            torch.autograd.grad(results, [x], [torch.zeros_like(result) for result in results])
