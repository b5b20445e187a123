"""Hidden states and an output layer's weight to time candidates on, whose logits look as a model's do.

Shapes: N rows, H hidden size, V vocabulary, K labels a row; B rows of the weight that are drawn.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends import get_backend, preferred, why_not
from compiled_logprobs.backends.base import HiddenBackend
from compiled_logprobs.check.spot_check_hidden import what_is_wrong_from_hidden
from compiled_logprobs.operation.autograd import ForwardBackward
from compiled_logprobs.operation.contract import Upstream, in_dtype, wanted_by
from compiled_logprobs.operation.hidden import compute_from_hidden
from compiled_logprobs.operation.plain import plain_from_hidden
from compiled_logprobs.problem import Problem, bytes_of_results
from compiled_logprobs.tuning.sizes import BUFFERS

DRAWN = 4096
"""Rows of the weight. The others are these, rolled: drawing every one would take longer than timing."""
LIKELY = 8
"""Tokens of a row that share most of the probability, as a language model's do; fewer where H has no room for them."""
ROOM = 64
"""Of H for each: what is likely has to stand out of what the others make of the same hidden states."""
SOFTCAP = 30.0

Results = tuple[list[Tensor], tuple[Tensor, ...]]


class InputsFromHidden:
    """Hidden states in some places and, since it is large, one weight, with everything that goes with them.

    Args:
        problem: what is timed.
        device, seed, buffers: as for the inputs of logits.
        whole: the problem that `problem` is a part of; its limit of memory is that of all of it.
        logits_backend: the name of what computes from logits, where it can.
    """

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        seed: int,
        buffers: int = BUFFERS,
        *,
        whole: Problem,
        logits_backend: str | None,
    ) -> None:
        self._problem, self._whole = problem, whole
        self._logits_backend = LogitsBackendCalled(logits_backend)
        generator = torch.Generator("cpu").manual_seed(seed)
        rows, vocab, hidden = problem.rows, problem.vocab, problem.hidden or 1
        self.logits_bytes = rows * vocab * problem.dtype.itemsize
        self._weight = _weight(problem, device, generator)
        self._bias = torch.randn(vocab, generator=generator).to(device, problem.dtype) if problem.bias else None
        self._hidden: list[Tensor] = []
        self._labels: list[Tensor] = []
        count = max(1, min(LIKELY, hidden // ROOM))
        for _ in range(buffers):
            likely = torch.randint(vocab, (rows, count), generator=generator).to(device)
            scores = (10.0 + 4.0 * torch.rand(rows, count, 1, generator=generator)).to(device) / hidden
            x = torch.randn(rows, hidden, generator=generator).mul_(2.0 / math.sqrt(hidden)).to(device)
            for token in range(count):
                x += scores[:, token] * self._weight[likely[:, token]]
            self._hidden.append(x.to(problem.dtype))
            self._labels.append(likely.repeat(1, -(-problem.labels_per_row // count))[:, : problem.labels_per_row])
        self._temperature: float | Tensor = 1.0
        if problem.temperature == "number":
            self._temperature = 0.7
        elif problem.temperature == "per_token":
            self._temperature = torch.empty(rows).uniform_(0.5, 1.5, generator=generator).to(device)
        upstream = {"log_probs": torch.randn(self._labels[0].shape, generator=generator)}
        others = [name for name in Upstream._fields if getattr(problem, name, False)]
        upstream |= {name: torch.randn(rows, generator=generator) for name in others}
        self._upstream = {name: gradient.to(device, problem.out_dtype) for name, gradient in upstream.items()}

    @property
    def bytes_returned(self) -> int:
        """Of results and gradients, which a limit of memory does not count."""
        problem, hidden = self._problem, self._problem.hidden or 1
        gradients = problem.rows * hidden + problem.weight_grad * problem.vocab * (hidden + problem.bias)
        returned = problem.rows * bytes_of_results(problem)
        return returned + problem.needs_grad * gradients * problem.dtype.itemsize

    def forward_by(self, backend: Any) -> Callable[..., tuple[Tensor, ...]]:
        """What `call` takes: `backend`, differentiably; plain torch where it is None."""
        problem, wanted, softcap = self._problem, wanted_by(self._problem), SOFTCAP if self._problem.softcap else None
        if backend is None:
            return partial(plain_from_hidden, softcap=softcap, wanted=wanted)
        posed = problem._replace(memory_limit=limit_within(backend, problem, self._whole))
        handed_on = self._logits_backend
        return partial(compute_from_hidden, backend, posed, softcap=softcap, wanted=wanted, logits_backend=handed_on)

    def call(self, forward: Callable[..., tuple[Tensor, ...]], index: int) -> Callable[[], Results]:
        """What is to be timed: returns all results and gradients."""
        problem, labels = self._problem, self._labels[index]
        hidden = self._hidden[index].detach().requires_grad_(problem.needs_grad)
        weight = self._weight.detach().requires_grad_(problem.weight_grad)
        bias = None if self._bias is None else self._bias.detach().requires_grad_(problem.weight_grad)
        leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]

        def call() -> Results:
            with torch.set_grad_enabled(problem.needs_grad):
                parts = forward(hidden, weight, labels, bias, self._temperature)
                results = [in_dtype(part, problem.out_dtype) for part in parts]
            if not problem.needs_grad:
                return results, ()
            differentiable = [result for result in results if result.requires_grad]
            return results, torch.autograd.grad(differentiable, leaves, [*self._upstream.values()])

        return call

    def what_is_wrong(self, index: int, results: list[Tensor], gradients: tuple[Tensor, ...]) -> str | None:
        """The same of what `call(..., index)` returned, looked at in a few rows; None if nothing is."""
        return what_is_wrong_from_hidden(
            self._problem,
            self._hidden[index],
            self._weight,
            self._bias,
            self._labels[index],
            self._temperature,
            SOFTCAP if self._problem.softcap else None,
            self._upstream,
            results,
            gradients,
        )


class LogitsBackendCalled:
    """What candidates are handed for logits: the backend of a name where it can run them, else the first that can."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._chosen: dict[Problem, ForwardBackward] = {}

    def __call__(self, problem: Problem, name: str | None = None) -> ForwardBackward:
        if name is not None:
            return get_backend(name)
        if problem not in self._chosen:
            is_able = self._name is not None and why_not(self._name, problem) is None
            self._chosen[problem] = get_backend(self._name) if self._name and is_able else preferred(problem)
        return self._chosen[problem]


def limit_within(backend: HiddenBackend, part: Problem, whole: Problem) -> int | None:
    """The limit of memory that has `backend` cut `part` into chunks as the limit of `whole` does that.

    What is beyond the least that it can do with goes into longer chunks, or more of them.
    """
    if whole.memory_limit is None or part == whole:
        return whole.memory_limit
    least, of_part = backend.least_memory(whole), backend.least_memory(part)
    steps = (whole.memory_limit - (least or 0)) / backend.memory_of_a_step(whole)
    more = int(steps * backend.memory_of_a_step(part))
    return max(1, (of_part or 0) + more)


def _weight(problem: Problem, device: torch.device, generator: torch.Generator) -> Tensor:
    """[V, H] in the problem's dtype."""
    vocab, hidden = problem.vocab, problem.hidden or 1
    drawn_BH = torch.randn(min(vocab, DRAWN), hidden, generator=generator).to(device, problem.dtype)
    weight = drawn_BH.new_empty(vocab, hidden)
    for turn, start in enumerate(range(0, vocab, DRAWN)):
        part = weight[start : start + DRAWN]
        part.copy_(drawn_BH[: len(part)].roll(turn, -1))
    return weight
