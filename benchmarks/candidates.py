"""Who takes part: this library, by `auto` and by each backend's name, and the idioms that it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks import idioms
from benchmarks.idioms import Idiom
from compiled_logprobs import backends, log_probs_from_logits
from compiled_logprobs.backends import why_not
from compiled_logprobs.problem import Problem

AUTO = "auto"
COMPILE = "torch_compile"
READ = "amax"
"""The bare read: not a candidate, but timed with them."""

MOST_ROWS_AS_PRODUCT = 2048


@dataclass(frozen=True)
class Contender:
    """One way to compute log-probabilities."""

    name: str
    prepare: Callable[[Problem], Idiom]
    """What computes them, made anew for each problem."""
    ours: bool = False
    why_not: Callable[[Problem], str | None] = lambda problem: None
    """Why it cannot run a problem here; None if it can."""
    overwrites: bool = False
    """Whether it writes the gradient over the logits even where that was not asked for."""

    def note(self, problem: Problem) -> str:
        """What has to be known of its figures."""
        if self.overwrites and problem.needs_grad:
            return "over the logits"
        return "ordinary backward" if problem.inplace_backward and not self.ours else ""


def candidates() -> dict[str, Contender]:
    """All of them by name, this library's first."""
    contenders = [
        Contender(AUTO, _library(AUTO), ours=True),
        *(Contender(name, _library(name), ours=True, why_not=_why_not_ours(name)) for name in backends()),
        Contender("log_softmax", lambda problem: idioms.log_softmax_gather),
        Contender("logsumexp_rows", lambda problem: idioms.logsumexp_by_row),
        Contender("logsumexp_chunks", lambda problem: idioms.logsumexp_by_chunk),
        Contender("cross_entropy", lambda problem: idioms.cross_entropy),
        Contender(COMPILE, idioms.compiled_log_softmax),
        Contender("liger", lambda problem: idioms.liger, why_not=_installed("liger_kernel"), overwrites=True),
        Contender("quack", lambda problem: idioms.quack, why_not=_installed("quack", "quack-kernels")),
        Contender("trl", lambda problem: idioms.trl, why_not=_installed("trl", has_entropy=True)),
        Contender("cut_cross_entropy", lambda problem: idioms.cut_cross_entropy, why_not=_why_not_cut_cross_entropy),
    ]
    return {one.name: one for one in contenders}


def _library(name: str) -> Callable[[Problem], Idiom]:
    def prepare(problem: Problem) -> Idiom:
        def call(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
            result = log_probs_from_logits(
                logits, labels, return_entropy=entropy, inplace_backward=problem.inplace_backward, backend=name
            )
            return (result, None) if isinstance(result, Tensor) else (result.log_probs, result.entropy)

        return call

    return prepare


def _why_not_ours(name: str) -> Callable[[Problem], str | None]:
    return lambda problem: why_not(name, problem)


def _why_not_cut_cross_entropy(problem: Problem) -> str | None:
    reason = _installed("cut_cross_entropy")(problem)
    if reason is None and problem.needs_grad and problem.dtype == torch.float32:
        return "its backward takes 16-bit tensors only"
    if reason is None and problem.rows > MOST_ROWS_AS_PRODUCT:
        return (
            f"takes logits as a product with an N x N identity here, which outgrows them above {MOST_ROWS_AS_PRODUCT}"
        )
    return reason


def _installed(module: str, package: str = "", *, has_entropy: bool = False) -> Callable[[Problem], str | None]:
    """Why the kernels of a package cannot run a problem; where it has another name than its module, that."""

    def why_not(problem: Problem) -> str | None:
        if problem.device_type == "cpu":
            return "its kernels need a CUDA or ROCm device"
        if find_spec(module) is None:
            return f"is not installed: pip install {package or module.replace('_', '-')}"
        return "has no entropy beside the log-probabilities" if problem.entropy and not has_entropy else None

    return why_not
