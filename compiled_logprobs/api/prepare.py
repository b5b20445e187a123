"""What is asked before a call: to measure, to make ready, and to say what would serve it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.api.call import problem_of
from compiled_logprobs.arguments import (
    check_labels,
    check_logits,
    check_problem,
    check_values,
    checked_device,
    checked_out_dtype,
    checked_temperature,
    is_traced,
)
from compiled_logprobs.choose.explain import Explanation, explain_problem
from compiled_logprobs.choose.tune import tune as tune_alone
from compiled_logprobs.choose.warm import warm as warm_here
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import InputError
from compiled_logprobs.operation.contract import Wanted
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import Problem, as_it_lies


def tune(
    problems_or_logits: Problem | Iterable[Problem] | Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    return_logsumexp: bool = False,
    return_argmax: bool = False,
    return_sum_p_squared: bool = False,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
    budget_s: float | None = None,
    again: bool = False,
    group: Any = None,
) -> list[Decision]:
    """Measure which backend is fastest, now, and store it in the user's profiles; later calls and processes use it.

    Where it cannot be stored, a warning says so, and this process uses it.

    Args:
        problems_or_logits: problems; or logits, whose shape, layout and options count, not their values. A problem with
            flat rows of an odd V is taken as not aligned, whatever it says.
        labels: with logits: as for `log_probs_from_logits`, whose options the next eight are.
        device: with problems: where to measure; by default the current device of their type.
        budget_s: seconds for the rounds of each problem, by default 20, after it was compiled and checked; N shrinks
            where they would take longer.
        again: measure also what the user's profiles hold already.
        group: a process group of torch.distributed, whose ranks all call this with the same problems: the first
            measures and stores, and all hold its decisions afterwards. Where it fails, or another rank fails or waits
            in vain before it is done, all hold `eager`, and a warning says why: for that there is no decision.

    Returns:
        The decision for each bucket of N among the problems, in their order.

    Raises:
        InputError: the arguments do not fit together, or are not those of the first rank of `group`.
        LogProbsError: nothing could be decided for some of them; what was decided before is stored.
    """

    def asked() -> tuple[list[Problem], torch.device]:
        if not isinstance(problems_or_logits, Tensor):
            return _problems_on_one_device(problems_or_logits, labels, device)
        if labels is None or device is not None:
            got = "without labels" if labels is None else f"and device={device!r}"
            raise InputError(
                f"got logits {got}; logits and labels on the device to measure, or problems, are valid. "
                "Pass tune(logits, labels)."
            )
        wanted = Wanted(return_entropy, return_logsumexp, return_argmax, return_sum_p_squared)
        problem = _problem_posed(
            problems_or_logits, labels, temperature, wanted, masked_logits, inplace_backward, out_dtype
        )
        return [problem], problems_or_logits.device

    if group is not None:
        from compiled_logprobs.choose.group import tune_together

        return tune_together(asked, group, budget_s=budget_s, again=again)
    problems, where = asked()
    return tune_alone(problems, where, budget_s=budget_s, again=again)


def explain(
    problem_or_logits: Problem | Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_logsumexp: bool = False,
    return_argmax: bool = False,
    return_sum_p_squared: bool = False,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
) -> Explanation:
    """Which backend a call takes with `backend="auto"`, and why.

    Nothing is computed, checked or measured.

    Args:
        problem_or_logits: a problem, such as one from hidden states; or logits, as for `log_probs_from_logits`, whose
            arguments and errors all others are. Whether they require a gradient counts.
        labels: with logits.

    Returns:
        An `Explanation`: `str()` for people, `.to_dict()` for programs.
    """
    if not isinstance(problem_or_logits, Tensor):
        (problem,), device = _problems_on_one_device([problem_or_logits], labels, None)
        return explain_problem(problem, device, policy())
    if labels is None:
        raise InputError("got logits without labels; logits and labels, or a problem, are valid. Pass one of these.")
    wanted = Wanted(return_entropy, return_logsumexp, return_argmax, return_sum_p_squared)
    problem = _problem_posed(
        problem_or_logits, labels, temperature, wanted, masked_logits, inplace_backward, out_dtype, ignore_index
    )
    return explain_problem(problem, problem_or_logits.device, policy())


def warm(
    problems: Problem | Iterable[Problem], *, device: torch.device | str | None = None, backend: str = "auto"
) -> dict[Problem, str]:
    """Choose, check, compile and load now what calls of these problems need, so that the first of them finds it ready.

    For a first step that may not wait, or before the capture of a CUDA graph, in which nothing can be compiled. Each
    problem is run on zeros of its size, with backward where it needs the gradient. Nothing is measured: what no profile
    decides is served by the nearest decision or the default rule, and not measured by this process any more; `tune`
    first where it shall be. No collective is called: each rank warms itself.

    Args:
        problems: as for `tune`. Labels are taken to be int64.
        device: where; by default the current device of their type.
        backend: "auto", or the name that will be called.

    Returns:
        By problem, the backend that serves it.

    Raises:
        InputError: the arguments do not fit together.
        BackendUnavailable: the named backend is unknown or cannot run a problem.
        LogProbsError: a CUDA graph is being captured.
    """
    return warm_here(*_problems_on_one_device(problems, None, device), backend)


def _problem_posed(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    wanted: Wanted,
    masked_logits: bool,
    inplace_backward: bool,
    out_dtype: torch.dtype | None,
    ignore_index: int = -100,
) -> Problem:
    check_logits(logits)
    check_labels(logits, labels, ignore_index)
    temperature = checked_temperature(logits, temperature)
    if logits.is_cpu and not is_traced(logits):
        check_values(logits, labels, temperature, ignore_index)
    return problem_of(
        logits,
        labels,
        temperature,
        wanted,
        masked_logits,
        inplace_backward,
        checked_out_dtype(logits, out_dtype),
    )


def _problems_on_one_device(
    given: object, labels: object, device: torch.device | str | None
) -> tuple[list[Problem], torch.device]:
    listed: list[Any] = [given] if isinstance(given, Problem) or not isinstance(given, Iterable) else list(given)
    wrong = next((f"a {type(entry).__name__}" for entry in listed if not isinstance(entry, Problem)), None)
    if labels is not None or wrong is not None:
        got = "labels beside problems" if wrong is None else f"{wrong} among the problems"
        raise InputError(f"got {got}; problems, or logits and labels, are valid. Pass one or the other.")
    for problem in listed:
        check_problem(problem)
    where = None if device is None else checked_device(device)
    types = {problem.device_type for problem in listed} | (set() if where is None else {where.type})
    if len(types) > 1:
        raise InputError(
            f"got problems and devices of types {', '.join(sorted(types))}; one is valid. Tune them apart."
        )
    return [as_it_lies(problem) for problem in listed], where or checked_device(next(iter(types), "cpu"))
