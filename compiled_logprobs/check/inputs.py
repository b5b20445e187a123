"""The inputs of one case, with the truth about them; and what a call returned.

Shapes: N rows, n of them compared, V vocabulary, K labels a row; R one or two leading dimensions, whose product is N.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.check.cases import Arena, Case, labels_for
from compiled_logprobs.operation.contract import Upstream, in_dtype
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem, accumulation_dtype, results_of

COMPARED_LOGITS, FEWEST_COMPARED = 2**22, 16
"""Larger inputs are compared with the reference on as many rows as hold so many, or a few, the first and the last among
them. What needs no reference is looked at in all rows: signs, ignored labels, memory, bits."""
FEWEST_ROWS_FOR_SILENCE = 4
"""With so many, all that comes from above one of them is 0, as of a token that a mask leaves out of the loss."""
TEMPERATURES = 0.2, 2.0
"""The lowest and the highest, but for those of a case."""
DIFFERENTIABLE = Upstream._fields
PLAIN_CEILING = 64.0
"""How many times eps(float32) times the row's largest |x| plain torch may be off: what its sums cost at V = 2^18."""


class Returned(NamedTuple):
    """What a call returned, and the gradient that came of it."""

    log_probs: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    argmax: Tensor | None = None
    sum_p_squared: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def results(self) -> list[Tensor]:
        """All but the gradient, in the order in which they are returned."""
        return [tensor for tensor in self[:-1] if tensor is not None]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Returned":
        """All of them changed so."""
        return Returned(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]


class CaseInputs:
    """One case, ready to run: fresh inputs of one kind, with the truth about them."""

    ceiling = PLAIN_CEILING

    def __init__(
        self,
        case: Case,
        problem: Problem,
        yardstick: dict[str, float],
        generator: torch.Generator,
        *,
        solved: bool = True,
    ) -> None:
        device = generator.device
        if case.vocab is not None:
            problem = problem._replace(vocab=case.vocab)
        if case.temperature == "per_token":
            problem = problem._replace(temperature="per_token")
        self.case, self.problem, self.yardstick = case, problem, yardstick
        self.arena = Arena(case, problem, device)
        self.arena.refill(generator)
        rows = tuple(self.arena.logits.shape[:-1])
        self.labels = labels_for(case, self.arena.logits, problem, generator)
        self.ignored = self.labels == case.ignore_index
        """[R, K]"""
        least, most = (case.temperature,) * 2 if isinstance(case.temperature, float) else TEMPERATURES
        self.temperature: float | Tensor = 1.0
        if problem.temperature == "number":
            self.temperature = float(torch.empty((), device=device).uniform_(least, most, generator=generator))
        elif problem.temperature == "per_token":
            self.temperature = torch.empty(rows, device=device).uniform_(least, most, generator=generator)
        self.upstream = {"log_probs": torch.randn(self.labels.shape, generator=generator, device=device)}
        """The gradients that come from above, by the name of the result."""
        for name in DIFFERENTIABLE[1:]:
            if getattr(problem, name) and case.through_others:
                self.upstream[name] = torch.randn(rows, generator=generator, device=device)
        count = math.prod(rows)
        if count >= FEWEST_ROWS_FOR_SILENCE and not case.special:
            row = torch.randint(count, (), generator=generator, device=device)
            for grad in self.upstream.values():
                grad.view(count, -1)[row] = 0.0
        self.sample = torch.arange(count, device=device)
        """Which rows, of N, are compared with the reference."""
        compared = rows_compared(problem.vocab)
        if count > compared:
            inner = 1 + torch.randperm(count - 2, generator=generator, device=device)[: compared - 2]
            self.sample = torch.cat([self.sample[:1], inner.sort().values, self.sample[-1:]])
        t = self.temperature
        self.row_temperature = self.sampled(t, 1) if isinstance(t, Tensor) else t
        if solved:  # else nothing is held against the truth
            self.solve()

    def sampled(self, tensor: Tensor, columns: int) -> Tensor:
        """[n, columns]: the compared rows of a tensor [R, columns] or, with one column, [R]."""
        return tensor.reshape(-1, columns)[self.sample]

    def fresh_labels(self) -> Tensor:
        """[R, K]: a copy of the labels, in memory of the strides that the case says."""
        if not self.case.strided_labels:
            return self.labels.clone()
        between = self.problem.vocab - 1 - self.labels.clamp(min=0)  # wrong ones, and none out of range
        return torch.cat([self.labels, between], -1)[..., : self.labels.shape[-1]]

    def solve(self) -> None:
        """Compute the truth, and what plain torch makes of the same rows."""
        problem = self.problem
        logits = self.sampled(self.arena.logits, problem.vocab)
        labels = self.sampled(self.labels, problem.labels_per_row)
        t = self.row_temperature.squeeze(-1) if isinstance(self.row_temperature, Tensor) else self.row_temperature
        self.scale = row_scale(logits, self.row_temperature)
        upstream: dict[str, Any] = {}
        if problem.needs_grad:
            upstream = {
                f"grad_{name}": grad.flatten(0, -2 if name == "log_probs" else -1)
                for name, grad in self.upstream.items()
            }
            upstream = {name: grad[self.sample] for name, grad in upstream.items()}
        self.true = reference(logits, labels, t, ignore_index=self.case.ignore_index, **upstream)
        # What comes from above a result has its dtype.
        rounded = {name: grad.to(problem.out_dtype) for name, grad in upstream.items()}
        dtype = accumulation_dtype(problem.dtype)
        # Where what is looked for is gross, plain torch's own error is not worth its time.
        plain = self.true
        if self.case.vocab is None:
            plain = reference(logits, labels, t, ignore_index=self.case.ignore_index, dtype=dtype, **rounded)
        asked = {name: in_dtype(getattr(plain, name), problem.out_dtype) for name in names_of(problem)}
        gradient = None if plain.gradient is None else plain.gradient.to(problem.dtype)
        self.plain = Returned(**asked, gradient=gradient)


def rows_compared(vocab: int) -> int:
    """How many rows are compared with the reference at most."""
    return max(FEWEST_COMPARED, COMPARED_LOGITS // vocab)


def names_of(problem: Problem) -> tuple[str, ...]:
    """Of the results that a call returns, in order."""
    return ("log_probs", *results_of(problem))


def row_scale(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """[n, 1]: the largest finite |x| of each row [n, V], x = logits / temperature; at least 1."""
    logits = logits.float()
    largest = logits.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True) if len(logits) else logits[:, :1]
    return (largest / temperature).clamp(min=1.0)
