"""`backend="auto"`: a backend that chooses another one for each call, and has eager take over where that one fails.

Inside a backward pass, such as in the recomputation of a checkpoint, it takes the one that the last forward took.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.arguments import count_dispatch_modes, find_private, has_saved_tensor_hooks, peek_transform
from compiled_logprobs.backends import EAGER, built_in_for, get_backend, why_not
from compiled_logprobs.backends.base import AnyBackend
from compiled_logprobs.choose import memory, rule
from compiled_logprobs.choose.explain import refusal
from compiled_logprobs.choose.memory import Choice
from compiled_logprobs.choose.rule import Context
from compiled_logprobs.choose.tune import meanwhile, tune_in_call
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import BackendUnavailable, nothing_can_serve_after, warn
from compiled_logprobs.operation.autograd import ForwardBackward
from compiled_logprobs.operation.hidden import LogitsBackend
from compiled_logprobs.policy import Policy, policy
from compiled_logprobs.problem import Problem

backward_pass: Callable[[], int] = find_private("torch._C._current_graph_task_id", lambda: -1)
"""The number of the backward pass in which this thread is at work; -1 outside of them. Where torch has no such name, a
recomputation chooses as any call does."""


class Auto(AnyBackend):
    """One call of `backend="auto"`: forward and backward go to the same backend.

    Args:
        problem, tune: as for `choose`.
        logits: those of the call.

    Raises:
        ProfileError: a profile has to decide, and none does.
        BackendUnavailable: rows have to be invariant, and no backend's are, or the one whose are cannot run this call.
        And out of memory, as it is, where that has to be found out.
    """

    name = "auto"
    summary = "the fastest that is right, as far as it is known"

    def __init__(
        self,
        problem: Problem,
        logits: Tensor,
        tune: Callable[[Context, Decision | None], Choice | str] = tune_in_call,
    ) -> None:
        self._problem = problem
        process, under, is_again = memory.MEMORY, policy(), backward_pass() != -1
        if problem.rows == 0 or _is_observed(logits):
            pair = _stand_in(problem)
            if not is_again:
                process.keep(problem, None, pair)
        elif is_again:
            # With use_reentrant=False a checkpoint recomputes under hooks; else after a forward without the gradient.
            pair = choose_again(problem, logits.device, had_gradient=has_saved_tensor_hooks(otherwise=True))
        elif is_capturing(problem):
            pair = _warm_choice(problem, under)
            process.keep(problem, None, pair)
        else:
            served = process.hot.get(problem)
            if served is None or served.policy != under:
                pair = choose(problem, logits.device, under, tune)
            else:
                pair = served.backend
        self._chosen = pair[0]
        self._backend: Any = pair[1]

    @property
    def chosen(self) -> str:
        """The name of the backend that serves; after `forward`, of the one that served."""
        return self._chosen

    def forward(self, *given: Any, **options: Any) -> Any:
        """What the backend returns; where it fails, what eager does."""
        try:
            return self._backend.forward(*given, **options)
        except Exception as error:
            if self._chosen == EAGER or nothing_can_serve_after(error):
                raise
            failed, reason = self._chosen, str(error)
            is_first = memory.MEMORY.put_aside(failed, self._problem, error)
            self._chosen, self._backend = _stand_in(self._problem)
            if self._chosen == EAGER and self._problem.memory_limit and why_not(EAGER, self._problem) is not None:
                raise
        memory.MEMORY.keep(self._problem, None, (self._chosen, self._backend))
        results = self._backend.forward(*given, **options)
        if is_first:
            warn(
                f"backend {failed!r} failed on {self._problem} and is set aside for such problems in this "
                f"process: {reason}\n{self._chosen} serves the call. To see the whole error, name the backend."
            )
        return results

    def backward(self, *given: Any, **options: Any) -> Any:
        """What the backend returns that has served forward."""
        return self._backend.backward(*given, **options)


def choose(
    problem: Problem,
    device: torch.device,
    under: Policy,
    tune: Callable[[Context, Decision | None], Choice | str] = tune_in_call,
) -> tuple[str, Any]:
    """What serves `problem` on `device`, by the steps of `rule`; remembered for the next call. Raises as `Auto`.

    Args:
        problem, device, under: as for a `Context`.
        tune: what measures, or says why it does not.
    """
    process = memory.MEMORY
    choice = _remembered(problem, device, under)
    if not isinstance(choice, Choice):
        with process.lock:
            context = rule.context_of(problem, device, under, tune)
            *_, (step, outcome) = rule.walk(context)
            if not isinstance(outcome, Choice):
                raise refusal(context)
            choice = outcome
            if step != "remembered":  # by another thread meanwhile
                choice = meanwhile(context, choice) if tune is tune_in_call else choice
                process.remember(problem, under, choice)
    pair = _pair_of(choice, problem, under)
    process.keep(problem, under if choice.until is None else None, pair)
    return pair


def _pair_of(choice: Choice, problem: Problem, under: Policy) -> tuple[str, Any]:
    """The backend of `choice`, which is for a bucket; eager where it cannot run this very N."""
    name = choice.backend
    if name == EAGER:
        return _stand_in(problem)
    reason = why_not(name, problem)
    if reason is not None and under.row_invariant:
        raise BackendUnavailable(
            f"backend {name!r}, which serves such problems with row_invariant=True in this process, cannot run "
            f"{rule.describe(problem)}: {reason}. Set row_invariant=False, or pose all of them so that it can."
        )
    return (name, get_backend(name, problem)) if reason is None else _stand_in(problem)


def _stand_in(problem: Problem) -> tuple[str, Any]:
    """Eager, which serves where no other does; where it cannot keep to a limit of memory, the first that can."""
    name = EAGER
    if problem.memory_limit is not None and why_not(EAGER, problem) is not None:
        failed = memory.MEMORY.failures(problem)
        able = (other for other in built_in_for(problem) if other not in failed and why_not(other, problem) is None)
        name = next(able, EAGER)
    return name, get_backend(name, problem)


def choose_again(problem: Problem, device: torch.device, *, had_gradient: bool = True) -> tuple[str, Any]:
    """What the last forward of `problem` took, for what has to agree with it: a recomputation, or a backward apart.

    It asks neither for the thread nor for the policy, and nothing is measured: where there was no such forward, or what
    it took cannot run this one, the rule chooses as in the mode "lookup". Raises as `Auto`.

    Args:
        problem, device: as for a `Context`.
        had_gradient: whether that forward was with the gradient, if this is.
    """
    pair, under = memory.MEMORY.last_forward(problem, had_gradient), policy()
    if is_capturing(problem):
        return pair if pair is not None and memory.MEMORY.is_warm(*pair, problem) else _warm_choice(problem, under)
    if pair is not None and why_not(pair[0], problem) is None:
        return pair
    return choose(problem, device, under._replace(mode="lookup") if under.mode == "tune" else under)


def logits_backend_on(device: torch.device) -> LogitsBackend:
    """What a backend over hidden states is handed: for logits, what serves them, as far as it is known.

    Nothing is measured for it: who measures does so with what this gives. It stays the same for all chunks of a call
    and its backward.
    """
    under = policy()._replace(
        mode="off" if policy().mode == "off" else "lookup", require_hit=False, row_invariant=False
    )
    chosen: dict[Problem, ForwardBackward] = {}

    def logits_backend(problem: Problem, name: str | None = None) -> ForwardBackward:
        if name is not None:
            return get_backend(name)
        if problem not in chosen:
            _, chosen[problem] = choose(problem, device, under)
        return chosen[problem]

    return logits_backend


def is_capturing(problem: Problem) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be compiled, checked or measured."""
    return problem.device_type == "cuda" and torch.cuda.is_current_stream_capturing()


def _warm_choice(problem: Problem, under: Policy) -> tuple[str, Any]:
    """What served such a problem before the capture, and need not compile.

    Eager, which is always ready, is not taken instead: it would be in the graph for good, and nobody would know.
    """
    choice = _remembered(problem, torch.device(problem.device_type), under)
    if not isinstance(choice, Choice):
        kind = " with row_invariant=True" if under.row_invariant else ""
        got = f"no backend has served {problem}{kind} in this process yet"
    else:
        name, backend = _pair_of(choice, problem, under)
        if memory.MEMORY.is_warm(name, backend, problem):
            return name, backend
        got = f"backend {name!r}, which serves such problems, has not run {problem} yet"
    raise BackendUnavailable(
        f"{got}, and nothing can be chosen, checked or compiled while a CUDA graph is captured. Call warm(problem) "
        "before the capture, or the function once; or name backend='eager', which needs neither."
    )


def _remembered(problem: Problem, device: torch.device, under: Policy) -> Choice | str:
    """What served the bucket of `problem` before, by the first step alone: where N differs from call to call, all that
    the others go by, such as the environment, would cost more than a small call."""
    return rule.remembered(rule.Context(problem, under, device, "", {}, memory.MEMORY))


def _is_observed(logits: Tensor) -> bool:
    """Whether something else than torch itself sees each operation: a profiler of operations, a tensor subclass, or a
    transform of torch.func of something else."""
    return (
        count_dispatch_modes() > 0 or type(logits) not in (Tensor, torch.nn.Parameter) or peek_transform() is not None
    )
