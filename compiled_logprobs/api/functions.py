"""The public functions: check the arguments, choose a backend, call it."""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from compiled_logprobs.api.call import named_backend, problem_of
from compiled_logprobs.api.graph import log_probs_in_graph
from compiled_logprobs.api.log_probs import LogProbs, log_probs_with
from compiled_logprobs.arguments import (
    check_labels,
    check_logits,
    check_not_leaf,
    check_problem,
    check_values,
    checked_device,
    checked_out_dtype,
    checked_temperature,
    is_nan,
    is_traced,
)
from compiled_logprobs.backends import EAGER, backends, get_backend
from compiled_logprobs.choose.auto import Auto
from compiled_logprobs.choose.explain import Explanation, explain_problem
from compiled_logprobs.choose.tune import tune as tune_alone
from compiled_logprobs.choose.warm import warm as warm_here
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import InputError
from compiled_logprobs.operation.autograd import ForwardBackward, PlainFormula, compute
from compiled_logprobs.operation.contract import Wanted, in_dtype
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import Problem, as_it_lies

_PLAIN = PlainFormula()


def log_probs_from_logits(
    logits: Tensor,
    labels: Tensor,
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
    backend: str = "auto",
) -> Tensor | LogProbs:
    """Log-probability of each label under softmax(logits / temperature).

    With x = logits / temperature:  out[...] = x[..., label] - logsumexp(x[..., :]), accumulated in float32.

    Args:
        logits: [..., V] unnormalised scores; float32, bfloat16 or float16 (float64 through eager). Not modified, and
            not copied as long as the last stride is 1: slices such as `logits[:, :-1]` are taken as they are.
        labels: [...] or [..., K], int64 or int32, in [0, V) or `ignore_index`, on the device of `logits`.
        temperature: dimensionless, > 0; a number, or a tensor broadcastable to [...] (one a token) that needs no
            gradient.
        ignore_index: a label that counts 0: result 0, gradient 0. Where all K labels of a row are ignored, its other
            results are 0 too, and its argmax is -1.
        return_entropy: also return the entropy of each row, from the same pass, as with the next three.
        return_logsumexp: also return the logsumexp of logits / temperature, as a z-loss takes it.
        return_argmax: also return the first column that holds the maximum: its equality with the label is the accuracy.
        return_sum_p_squared: also return the sum of all squared probabilities.
        masked_logits: whole regions of the vocabulary are -inf, as top-k and top-p filtering leave them.
        inplace_backward: write the gradient over `logits`, which saves its memory. Nothing else may need their values
            by then: whoever saved them for its own backward gets autograd's error (a second slice of the same tensor
            too), but a plain read afterwards finds the gradient and cannot be detected. Not for leaf tensors. Where
            memory overlaps (an expanded tensor), where the last stride is not 1, and in the graphs of torch.compile and
            torch.export, whose backward may not write over what it was given, the gradient gets memory of its own.
        out_dtype: dtype of the results; None is the dtype of `logits`.
        backend: "auto", or the name of one of `backends()`, which then runs or raises. In the graphs of torch.compile
            and torch.export too, where it is chosen or raises when the graph runs, and "auto" never measures; but
            "eager" there is the plain formula, for the compiler to fuse. Under dispatch modes (such as a counter of
            operations) "auto" is eager.

    Returns:
        [...] (or [..., K]) log-probabilities in nats, never positive, differentiable in `logits` once. With any
        `return_...=True` a `LogProbs`, which unpacks into what was asked for: the entropy, never negative, and the
        logsumexp are differentiable too; argmax, in int64, and the sum are not. Rows that are all -inf, or hold NaN or
        +inf, are NaN, their argmax -1. On an accelerator, and while tracing, no value is looked at: a label outside
        [0, V) or a temperature that is not > 0 makes its row so.

    Raises:
        InputError: shapes, dtypes, devices, labels or temperature do not fit together.
        BackendUnavailable: the named backend is unknown or cannot run this problem.
    """
    check_logits(logits)
    check_labels(logits, labels, ignore_index)
    per_token = isinstance(temperature, Tensor)
    temperature = checked_temperature(logits, temperature)
    out_dtype = checked_out_dtype(logits, out_dtype)
    if backend != "auto" and backend not in backends():
        get_backend(backend)  # raises
    wanted = Wanted(return_entropy, return_logsumexp, return_argmax, return_sum_p_squared)
    if is_traced(logits) and backend != EAGER:
        log_probs, *others = log_probs_in_graph(
            logits,
            labels,
            temperature,
            ignore_index=ignore_index,
            wanted=wanted,
            per_token=per_token,
            masked_logits=masked_logits,
            out_dtype=out_dtype,
            backend=backend,
        )
    else:
        log_probs, *others = _computed(
            logits, labels, temperature, int(ignore_index), wanted, masked_logits, inplace_backward, out_dtype, backend
        )
    if log_probs.dtype != out_dtype:
        log_probs = log_probs.to(out_dtype)
    if not others:
        return log_probs
    return log_probs_with(wanted, log_probs, *(in_dtype(result, out_dtype) for result in others))


def _computed(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    wanted: Wanted,
    masked_logits: bool,
    inplace_backward: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    """What `compute` returns: by the backend of the call; in a graph by the formula, for the compiler to fuse."""
    serving: ForwardBackward
    has_values = not is_traced(logits)
    if not has_values:
        serving, inplace_backward = _PLAIN, False
    else:
        if inplace_backward:
            check_not_leaf(logits)
        problem = problem_of(logits, labels, temperature, wanted, masked_logits, inplace_backward, out_dtype)
        serving = Auto(problem, logits) if backend == "auto" else named_backend(backend, problem)
    results = compute(
        serving,
        logits,
        labels,
        temperature,
        ignore_index=ignore_index,
        wanted=wanted,
        inplace_backward=inplace_backward,
    )
    if has_values and logits.is_cpu and is_nan(results[0]):
        check_values(logits, labels, temperature, ignore_index)
    return results


def cross_entropy_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of each label: minus `log_probs_from_logits`, whose arguments and errors it shares.

    Args:
        reduction: "none" returns [...] (or [..., K]); "sum" and "mean" a scalar. The mean is over the labels that are
            not ignored, and NaN where all are, as in torch.nn.functional.cross_entropy.

    Returns:
        Nats, never negative.
    """
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"got reduction={reduction!r}; 'mean', 'sum' or 'none' is valid.")
    log_probs = log_probs_from_logits(
        logits,
        labels,
        temperature=temperature,
        ignore_index=ignore_index,
        masked_logits=masked_logits,
        inplace_backward=inplace_backward,
        out_dtype=out_dtype if reduction == "none" else None if logits.dtype == torch.float64 else torch.float32,
        backend=backend,
    )
    losses = 0.0 - cast(Tensor, log_probs)  # not a negation, which would turn the 0 of an ignored label into -0
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "mean":
        total = total / (labels != ignore_index).sum()
    return total.to(logits.dtype if out_dtype is None else out_dtype)


def entropy_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Entropy of softmax(logits / temperature): [...] nats, never negative, differentiable in `logits`.

    Arguments and errors are those of `log_probs_from_logits`. A token of probability 0 counts 0.
    """
    check_logits(logits)
    _, entropy = log_probs_from_logits(
        logits,
        torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device),
        temperature=temperature,
        return_entropy=True,
        masked_logits=masked_logits,
        inplace_backward=inplace_backward,
        out_dtype=out_dtype,
        backend=backend,
    )
    return entropy


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
    logits: Tensor,
    labels: Tensor,
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
    """Which backend `log_probs_from_logits` takes for these arguments with `backend="auto"`, and why.

    Nothing is computed, checked or measured. The arguments and their errors are those of `log_probs_from_logits`;
    whether `logits` requires a gradient counts.

    Returns:
        An `Explanation`: `str()` for people, `.to_dict()` for programs.
    """
    wanted = Wanted(return_entropy, return_logsumexp, return_argmax, return_sum_p_squared)
    problem = _problem_posed(
        logits, labels, temperature, wanted, masked_logits, inplace_backward, out_dtype, ignore_index
    )
    return explain_problem(problem, logits.device, policy())


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
