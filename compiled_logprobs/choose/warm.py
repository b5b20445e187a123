"""Do ahead of time what the first call of a problem would do, but for measuring: choose, check, compile, load."""

from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch import Tensor

from compiled_logprobs.backends import require_backend
from compiled_logprobs.choose import memory
from compiled_logprobs.choose.auto import Auto, choose, is_capturing, logits_backend_on
from compiled_logprobs.choose.rule import Context
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.operation.autograd import ForwardBackward, compute
from compiled_logprobs.operation.contract import Upstream, wanted_by
from compiled_logprobs.operation.hidden import FromHidden, compute_from_hidden
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
        given = _hidden(problem, device) if problem.hidden is not None else empty_logits(problem, device)
        run = _run_from_hidden if problem.hidden is not None else _run
        if backend != "auto":
            run(require_backend(backend, problem), problem, given)
            served = backend
        else:
            choose(problem, given.device, policy(), _without_measuring)
            serving = Auto(problem, given)  # which finds that choice, and lets eager serve where it fails
            run(serving, problem, given)
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
    labels, temperature = _beside(problem, logits)
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


def _run_from_hidden(serving: FromHidden, problem: Problem, hidden: Tensor) -> None:
    """Forward and backward, with the gradient of every result."""
    labels, temperature = _beside(problem, hidden)
    weight = hidden.new_zeros(problem.vocab, hidden.shape[-1]).requires_grad_(problem.weight_grad)
    bias = hidden.new_zeros(problem.vocab).requires_grad_(problem.weight_grad) if problem.bias else None
    results = compute_from_hidden(
        serving,
        problem,
        hidden,
        weight,
        labels,
        bias,
        temperature,
        softcap=1.0 if problem.softcap else None,
        wanted=wanted_by(problem),
        logits_backend=logits_backend_on(hidden.device),
    )
    if problem.needs_grad:
        differentiable = [result.to(problem.out_dtype) for result in results if result.requires_grad]
        leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
        torch.autograd.grad(differentiable, leaves, [torch.zeros_like(result) for result in differentiable])


def _hidden(problem: Problem, device: torch.device) -> Tensor:
    zeros = torch.zeros(problem.rows, problem.hidden or 1, dtype=problem.dtype, device=device)
    return zeros.requires_grad_(problem.needs_grad)


def _beside(problem: Problem, given: Tensor) -> tuple[Tensor, float | Tensor]:
    """Labels and temperature."""
    rows = given.shape[:-1]
    labels = torch.zeros((*rows, problem.labels_per_row), dtype=torch.int64, device=given.device)
    if problem.temperature == "per_token":
        return labels, torch.full(rows, 0.7, device=given.device)
    return labels, 1.0 if problem.temperature == "none" else 0.7
