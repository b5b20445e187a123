"""A look into a function that failed the check: what it gives for a few ordinary inputs.

Shapes: N rows, V vocabulary.
"""

import itertools
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.check.cases import IGNORE_INDEX
from compiled_logprobs.check.function import CALL, Function
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.problem import RESULTS, Problem

ROWS = 12
TORCH = Path(torch.__file__).parent
TEMPERATURE = 1.7
"""Its square, its inverse and 1 are far from it and from one another."""


class Raised(Exception):
    """The function raised; says what."""


class Got(NamedTuple):
    """What came of one call."""

    result: Any
    logits: Tensor
    """As they are afterwards."""
    model: Tensor
    """What the logits were computed from, and a gradient can be taken in; it keeps its values."""

    def first(self) -> Tensor | None:
        """The first tensor among the results."""
        parts = self.result if isinstance(self.result, (tuple, list)) else (self.result,)
        return next((part for part in parts if isinstance(part, Tensor)), None)

    def rows(self) -> Tensor | None:
        """[N] float64, if there is a number a row."""
        first = self.first()
        return first.detach().double().reshape(-1) if first is not None and first.numel() == len(self.model) else None

    def other(self) -> Tensor | None:
        """What is returned beside the log-probabilities, if it is a number a row."""
        pair = self.result if isinstance(self.result, tuple) and len(self.result) == 2 else (None, None)
        return pair[1] if isinstance(pair[1], Tensor) and pair[1].shape == (len(self.model),) else None


@dataclass
class Probe:
    """A function, and ordinary inputs for it."""

    function: Function
    problem: Problem
    device: torch.device
    seed: int
    has_masked_logits: bool = False
    """Whether regions of -inf are among the inputs."""
    formula_is_right: bool = True
    """Whether what it returns is the log-probability, but for precision; as far as is known."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.sign = -1 if self.function.returns == "loss" else 1
        self.temperature = 1.0 if self.problem.temperature == "none" else TEMPERATURE
        self.logits = self.new_logits()
        vocab = self.problem.vocab
        # Half of them from the upper half, where an index that is too narrow and a forgotten block show.
        labels = torch.randint(vocab, (ROWS,), generator=self.generator, device=self.device)
        self.labels = torch.where(torch.arange(ROWS, device=self.device) % 2 == 0, labels, vocab - 1 - labels // 2)
        self.some_ignored = self.labels.clone()
        self.some_ignored[1::3] = IGNORE_INDEX

    def new_logits(self) -> Tensor:
        shape = ROWS, self.problem.vocab
        return (3.0 * torch.randn(shape, generator=self.generator, device=self.device)).to(self.problem.dtype)

    def run(self, logits: Tensor | None = None, labels: Tensor | None = None, *, asked: str = "") -> Got:
        """Call it, for log-probabilities and what is asked for beside them; raises Raised."""
        model = (self.logits if logits is None else logits).clone().requires_grad_()
        labels = self.labels if labels is None else labels
        given = model.clone()  # not a leaf, since a function may write into what a model gave it
        result = self.call(given, labels.clone(), asked=asked)
        return Got(result, given.detach(), model)

    def call(self, logits: Tensor, labels: Tensor, *, asked: str = "") -> Any:
        """What it returns, as it is; raises Raised."""
        results: dict[str, Any] = {name: name == asked for name in RESULTS}
        problem = self.problem._replace(**results)
        try:
            return self.function.returned(logits, labels.unsqueeze(-1), self.temperature, problem)
        except (Exception, SystemExit) as error:  # whatever a function raises is what is looked into here
            if nothing_can_serve_after(error):
                raise
            raise Raised(_in_words(error)) from error

    def gradient(self, result: Tensor, got: Got, upstream: Tensor) -> Tensor:
        """[N, V] float64, of this one of its results; raises Raised."""
        try:
            (gradient,) = torch.autograd.grad(result.reshape(-1), got.model, upstream.to(result.dtype))
        except Exception as error:  # whatever its backward raises
            if nothing_can_serve_after(error):
                raise
            raise Raised(_in_words(error)) from error
        return gradient.double()

    def raises(self, logits: Tensor, labels: Tensor) -> str | None:
        """What it raises for these, if it does."""
        try:
            self.run(logits, labels)
        except Raised as raised:
            return str(raised)
        return None

    def raises_as_it_lies(self, logits: Tensor, labels: Tensor) -> str | None:
        """The same, of logits that keep their strides."""
        try:
            self.call(logits, labels)
        except Raised as raised:
            return str(raised)
        return None


def _in_words(error: BaseException) -> str:
    """What was raised and, where that can be told from its traceback, by which line."""
    said = str(error).strip().splitlines()[:1]
    frames = itertools.dropwhile(lambda frame: frame.filename != CALL, traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if frame.filename != CALL and not Path(frame.filename).is_relative_to(TORCH)]
    where = f" (line {own[-1].lineno} of {Path(own[-1].filename).name}: {own[-1].line})" if own else ""
    return ": ".join([type(error).__name__, *said]) + where
