"""What is checked from hidden states: somebody's function, or a registered backend.

Whatever takes hidden states and a weight is a function of logits, too. Of the identity for hidden states, a row of it
for each row of logits, and the transposed logits for the weight, the product is the logits, exactly, in every dtype;
and the gradient in the weight is the gradient in the logits.

Shapes: N rows, H hidden size, V vocabulary, K labels a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.backends import BUILT_IN, EAGER, get_backend, require_backend, why_not
from compiled_logprobs.backends.base import HiddenBackend
from compiled_logprobs.check.cases import IGNORE_INDEX, same_bits
from compiled_logprobs.check.function import RETURNS, Function, NamedBackend
from compiled_logprobs.operation.autograd import ForwardBackward
from compiled_logprobs.operation.contract import Wanted, in_dtype, wanted_by
from compiled_logprobs.operation.hidden import compute_from_hidden
from compiled_logprobs.problem import RESULTS, Problem

OPTIONS_FROM_HIDDEN = (
    "bias",
    "temperature",
    "logit_scale",
    "softcap",
    "ignore_index",
    *(option for option in RETURNS if option != "return_sum_p_squared"),
    "memory_limit",
    "out_dtype",
)
"""What a call may name beside f, hidden, weight and labels."""
LEAST_HIDDEN, MULTIPLE = 64, 16
"""The hidden size that logits are embedded in is at least so large, and a multiple of it."""
FAMILIAR_HIDDEN, FAMILIAR_VOCAB = 64, 8209
"""Of the default problems; V is odd and off block sizes."""
BEYOND_A_CHUNK = 333, 1100, 4200
"""Rows of the default problems: the first that a backend does not have in one chunk."""
MANY = 2**13
"""Rows, more than any chunk has."""


class HiddenArguments(NamedTuple):
    """What a call is given."""

    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    labels: Tensor
    """[N, K]"""
    bias: Tensor | None = None
    """[V]"""
    temperature: float | Tensor = 1.0
    """Or [N]."""
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = IGNORE_INDEX
    memory_limit: int | None = None


class Embedding:
    """Logits as the product of hidden states and a weight; and a look at whether these stay as they were."""

    def __init__(self) -> None:
        self._padding: Tensor | None = None
        self._watched: list[tuple[str, Tensor, Tensor]] = []

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [N, H] and weight [V, H] whose product are `logits` [N, V]."""
        rows, vocab = logits.shape
        size = max(LEAST_HIDDEN, -(-rows // MULTIPLE) * MULTIPLE)
        hidden = torch.eye(rows, size, dtype=logits.dtype, device=logits.device)
        weight = torch.cat([logits.T, self._columns(logits, vocab, size - rows)], 1)
        self.watch(hidden, weight)
        return hidden, weight

    def watch(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Keep a copy of these, with what is said of them, to look at later."""
        named = (("hidden states were", hidden), ("weight was", weight), ("bias was", bias))
        self._watched = [(what, x.detach(), x.detach().clone()) for what, x in named if x is not None]

    def overwritten(self) -> list[str]:
        """What has other bits than it had."""
        return [what for what, tensor, copy in self._watched if not same_bits(tensor, copy)]

    def _columns(self, logits: Tensor, vocab: int, count: int) -> Tensor:
        """[V, count] of any numbers, which hidden states of 0 take away again."""
        kept = self._padding
        fits = kept is not None and kept.shape[0] == vocab and kept.shape[1] >= count
        if kept is None or not fits or (kept.dtype, kept.device) != (logits.dtype, logits.device):
            generator = torch.Generator(logits.device).manual_seed(vocab)
            kept = torch.randn(vocab, max(LEAST_HIDDEN, count), generator=generator, device=logits.device)
            self._padding = kept = kept.to(logits.dtype)
        return kept[:, :count]


class HiddenFunction(Function):
    """A function of hidden states [N, H], weight [V, H] and labels [N], called the way it wants to be.

    That is `call`, as for a `Function`, of f, hidden, weight, labels and `OPTIONS_FROM_HIDDEN`.
    """

    given = ("hidden", "weight", "labels")
    known = OPTIONS_FROM_HIDDEN
    example = 'e.g. call="f(hidden, weight, labels, bias=bias, temperature=temperature)" (--call)'
    frozen = False
    """Whether no gradient in the weight is asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._embedding = Embedding()

    def within(self, problem: Problem) -> Problem:
        self.frozen = problem.needs_grad and not problem.weight_grad
        has = self._options
        return (
            super()
            .within(problem)
            ._replace(
                masked_logits=False,
                layout="flat",
                bias=problem.bias and "bias" in has,
                softcap=problem.softcap and "softcap" in has,
                memory_limit=problem.memory_limit if "memory_limit" in has else None,
            )
        )

    def default_problems(self, plain: Problem) -> list[Problem]:
        problems = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            bare = as_problem(plain)._replace(dtype=dtype)
            problems += list(dict.fromkeys((bare, self.within(with_all_from_hidden(bare)))))
        return problems

    def returned(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        problem: Problem,
        ignore_index: int = IGNORE_INDEX,
    ) -> Any:
        hidden, weight = self._embedding(logits)
        given = HiddenArguments(hidden, weight, labels, None, temperature, ignore_index=ignore_index)
        return self._returned(given._replace(memory_limit=problem.memory_limit), problem)

    def from_hidden(self, given: HiddenArguments, problem: Problem) -> Any:
        """What it returns, log-probabilities in a column."""
        self._embedding.watch(given.hidden, given.weight, given.bias)
        return self.in_columns(self._returned(given, problem))

    def _returned(self, given: HiddenArguments, problem: Problem) -> Any:
        values = given._asdict()
        labels, temperature, ignore_index = (values.pop(name) for name in ("labels", "temperature", "ignore_index"))
        return self.evaluated(values, labels, temperature, problem, ignore_index)

    @property
    def other_calls(self) -> list[tuple[str, dict[str, str]]]:
        return [
            ("the labels before the weight", {"weight": "labels", "labels": "weight"}),
            ("the weight before the hidden states", {"weight": "hidden", "hidden": "weight"}),
            ("a weight of [H, V]", {"weight": "weight.T"}),
            ("a batch of sequences", {"hidden": "hidden[None]", "labels": "labels[None]"}),
        ]

    def overwritten(self) -> list[str]:
        return [*super().overwritten(), *self._embedding.overwritten()]


class NamedHiddenBackend(NamedBackend):
    """A registered backend over hidden states, called through `compute_from_hidden` as the public functions do."""

    options = frozenset(OPTIONS_FROM_HIDDEN)

    def __init__(self, name: str) -> None:
        self._name, self.shared = name, ""
        self.name = f"{name} (from hidden states)" if name in BUILT_IN else name
        self._from_hidden: HiddenBackend = get_backend(name, as_problem(Problem("cpu", 1, 1, torch.float32)))
        self.row_invariant = self._from_hidden.row_invariant
        self.frozen = False
        """As of a `HiddenFunction`."""
        self._memory_limit: int | None = None
        self._embedding = Embedding()

    def within(self, problem: Problem) -> Problem:
        """`problem`. Raises BackendUnavailable where the backend cannot run it, nor with more rows."""
        more = problem._replace(rows=max(problem.rows, MANY))
        if why_not(self._name, more) is not None:  # by its rows alone, a chunk may be refused that has them all
            require_backend(self._name, problem)
        self._memory_limit = problem.memory_limit
        with_gradient = problem._replace(needs_grad=True, weight_grad=True)
        self.frozen = problem.needs_grad and not problem.weight_grad and why_not(self._name, with_gradient) is not None
        return problem

    def default_problems(self, plain: Problem) -> list[Problem]:
        """In float32 and in bfloat16, each with the most that the backend has."""
        problems = []
        for dtype in (torch.float32, torch.bfloat16):
            bare = as_problem(plain)._replace(dtype=dtype)
            tempered = bare._replace(temperature="number")
            richest_first = (with_all_from_hidden(bare), tempered._replace(bias=True), tempered, bare)
            sizes = [(problem, rows) for problem in richest_first for rows in BEYOND_A_CHUNK]
            found = (problem for problem, n in sizes if why_not(self._name, problem._replace(rows=n)) is None)
            problems += [problem for problem in [next(found, None)] if problem is not None]
        if not problems:
            require_backend(self._name, as_problem(plain)._replace(rows=BEYOND_A_CHUNK[-1]))  # raises
        return problems

    def takes(self, problem: Problem) -> bool:
        """Whether the backend has all options that `problem` has."""
        return why_not(self._name, problem._replace(rows=MANY, memory_limit=None)) is None

    def least_memory(self, problem: Problem) -> int | None:
        """As the backend says it."""
        return self._from_hidden.least_memory(problem)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        problem: Problem,
        ignore_index: int = IGNORE_INDEX,
    ) -> Any:
        hidden, weight = self._embedding(logits)
        given = HiddenArguments(hidden, weight, labels, None, temperature, ignore_index=ignore_index)
        return self._computed(given._replace(memory_limit=self._memory_limit), problem)

    def from_hidden(self, given: HiddenArguments, problem: Problem) -> Any:
        """What it returns."""
        self._embedding.watch(given.hidden, given.weight, given.bias)
        return self._computed(given, problem)

    def _computed(self, given: HiddenArguments, problem: Problem) -> Any:
        t, cap = given.temperature, given.softcap
        results = compute_from_hidden(
            self._from_hidden,
            posed_by(given, problem),
            given.hidden,
            given.weight,
            given.labels,
            given.bias,
            t / given.logit_scale,
            softcap=None if cap is None else cap / given.logit_scale,
            ignore_index=given.ignore_index,
            wanted=wanted_by(problem),
            logits_backend=ready_logits_backend,
        )
        returned = tuple(in_dtype(result, problem.out_dtype) for result in results)
        return returned if len(returned) > 1 else returned[0]

    def overwritten(self) -> list[str]:
        """As for a `Function`."""
        return self._embedding.overwritten()

    def as_function(self, problem: Problem) -> Function:
        """The same as a function of hidden states, with the options that `problem` has."""

        def function(
            hidden: Tensor,
            weight: Tensor,
            labels: Tensor,
            bias: Tensor | None = None,
            temperature: float | Tensor = 1.0,
            logit_scale: float = 1.0,
            softcap: float | None = None,
            return_entropy: bool = False,
            return_logsumexp: bool = False,
            return_argmax: bool = False,
        ) -> Any:
            wanted = Wanted(return_entropy, return_logsumexp, return_argmax)
            given = HiddenArguments(hidden, weight, labels.unsqueeze(-1), bias, temperature, logit_scale, softcap)
            result = self._computed(given, problem._replace(**wanted._asdict()))
            return (result[0].squeeze(-1), *result[1:]) if isinstance(result, tuple) else result.squeeze(-1)

        return HiddenFunction(function)


def as_problem(of_logits: Problem) -> Problem:
    """The same from hidden states."""
    return of_logits._replace(hidden=FAMILIAR_HIDDEN, weight_grad=of_logits.needs_grad)


def with_all_from_hidden(problem: Problem) -> Problem:
    """`problem` with everything asked for that a call can return, and all options."""
    asked: dict[str, Any] = dict.fromkeys(RESULTS[:-1], True)
    return problem._replace(**asked, temperature="number", bias=True, softcap=True)


def posed_by(given: HiddenArguments, problem: Problem) -> Problem:
    """The problem of a call with these arguments, which asks for what `problem` does."""
    is_number = not isinstance(given.temperature, Tensor)
    differentiable = [x for x in (given.hidden, given.weight, given.bias) if x is not None and x.requires_grad]
    needs_grad = torch.is_grad_enabled() and bool(differentiable)
    return problem._replace(
        rows=len(given.hidden),
        vocab=len(given.weight),
        hidden=given.hidden.shape[-1],
        labels_per_row=given.labels.shape[-1],
        temperature="per_token" if not is_number else "none" if given.temperature == 1.0 else "number",
        needs_grad=needs_grad,
        weight_grad=needs_grad and given.weight.requires_grad,
        inplace_backward=False,
        bias=given.bias is not None,
        softcap=given.softcap is not None,
        memory_limit=given.memory_limit,
    )


def ready_logits_backend(problem: Problem, name: str | None = None) -> ForwardBackward:
    """What a backend over hidden states is handed here: the first over logits that needs not compile."""
    if name is not None:
        return get_backend(name)
    able = (other for other in BUILT_IN if why_not(other, problem) is None)
    return get_backend(next((other for other in able if get_backend(other).is_warm(problem)), EAGER))
