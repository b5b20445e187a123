"""What is checked: somebody's function, how it is called and what it returns; or a registered backend.

Shapes: N rows, V vocabulary.
"""

import ast
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from compiled_logprobs.backends import get_backend, require_backend, why_not
from compiled_logprobs.check.cases import IGNORE_INDEX
from compiled_logprobs.errors import InputError
from compiled_logprobs.operation.autograd import compute
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted, in_dtype, wanted_by
from compiled_logprobs.problem import RESULTS, Problem

Returns = Literal["log_prob", "loss"]
"""What the numbers that a function returns are: log-probabilities, or losses, which are minus that."""
RETURNS = {f"return_{name}": name for name in RESULTS}
"""Fields of a problem by the options that ask for them."""
OPTIONS = ("temperature", "ignore_index", *RETURNS, "masked_logits", "inplace_backward", "out_dtype")
"""What a call may name beside f, logits and labels."""

CALL = "<call>"
"""Stands for a file in the traceback of what a call raises."""


class Function:
    """A function of logits [N, V] and labels [N], called the way it wants to be.

    That is `call`, one expression of these names: f, the function, which it has to call, logits, labels and `OPTIONS`.
    By default it is "f(logits, labels)", with those of `OPTIONS` that the function's own signature names. A batch
    dimension that a given call adds, as in "f(logits[None], labels[None])", is taken from the results again.
    """

    row_invariant = False  # nobody has declared it
    given: tuple[str, ...] = ("logits", "labels")
    """What a call has to name beside f."""
    known: tuple[str, ...] = OPTIONS
    """What else it may name."""
    example = "e.g. call=\"f(labels, logits, temp=temperature, reduction='none')\" (--call)"

    def __init__(self, function: Callable[..., Any], call: str | None = None, returns: Returns = "log_prob") -> None:
        if returns not in ("log_prob", "loss"):
            raise InputError(f"got returns={returns!r}; 'log_prob' or 'loss' is valid.")
        if isinstance(function, type):
            raise InputError(f"got the class {function.__qualname__}; a function is valid, or an instance that is one.")
        if not callable(function):
            what = f"got {str(function)[:60]!r} of type {type(function).__name__}, which cannot be called"
            raise InputError(f"{what}; a function of ({', '.join(self.given)}) is valid, or the name of a backend.")
        self.name = getattr(function, "__qualname__", type(function).__name__)
        self.returns = returns
        self._function = function
        self._may_batch = call is not None
        signature = self._signature(call)
        options = [name for name in self.known if signature is not None and name in signature.parameters]
        own = f"f({', '.join([*self.given, *(f'{name}={name}' for name in options)])})"
        self.call = own if call is None else call
        tree = self._parsed(self.call)
        if signature is not None:
            self._check_fits(signature, tree)
        self._code = compile(tree, CALL, "eval")
        self._changed: list[str] = []
        self._options = frozenset(_names(tree) & set(self.known))

    def within(self, problem: Problem) -> Problem:
        """`problem` without the options that the function does not have."""
        has = self._options
        asked: dict[str, Any] = {name: getattr(problem, name) and option in has for option, name in RETURNS.items()}
        return problem._replace(
            temperature=problem.temperature if "temperature" in has else "none",
            masked_logits=problem.masked_logits and "masked_logits" in has,
            inplace_backward=problem.inplace_backward and "inplace_backward" in has,
            out_dtype=problem.out_dtype if "out_dtype" in has else torch.float32,
            labels_per_row=1,
            layout="rows" if problem.layout == "slice" else problem.layout,
            **asked,
        )

    def default_problems(self, plain: Problem) -> list[Problem]:
        """`plain` in each dtype, alone and with what the function has."""
        problems = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            bare = plain._replace(dtype=dtype)
            rich = self.within(with_all_results(bare)._replace(temperature="number", masked_logits=True))
            in_place = self.within(bare._replace(inplace_backward=True))
            problems += list(dict.fromkeys((bare, rich, in_place)))
        return problems

    @property
    def options(self) -> frozenset[str]:
        """Those of `OPTIONS` that it takes."""
        return self._options

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        problem: Problem,
        ignore_index: int = IGNORE_INDEX,
    ) -> Any:
        """What it returns for labels [N, 1], with log-probabilities [N, 1] where that can be."""
        return self.in_columns(self.returned(logits, labels, temperature, problem, ignore_index))

    def in_columns(self, result: Any) -> Any:
        """Of what it has returned, log-probabilities [N, 1], where that can be, and what else there is."""
        parts = tuple(result) if isinstance(result, tuple) else (result,)
        if not all(isinstance(part, Tensor) for part in parts) or len(parts) > 1 + len(RESULTS):
            return result
        log_probs, *others = parts
        if self.returns == "loss":
            log_probs = _Minus.apply(log_probs)  # type: ignore[no-untyped-call]  # torch's gap
        return (log_probs.unsqueeze(-1), *others) if others else log_probs.unsqueeze(-1)

    def returned(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        problem: Problem,
        ignore_index: int = IGNORE_INDEX,
    ) -> Any:
        """What it returns for labels [N, 1], as it is, but for a batch dimension that a given call has added."""
        values = {
            "logits": logits,
            "masked_logits": problem.masked_logits,
            "inplace_backward": problem.inplace_backward,
        }
        return self.evaluated(values, labels, temperature, problem, ignore_index)

    def evaluated(
        self,
        values: dict[str, Any],
        labels: Tensor,
        temperature: float | Tensor,
        problem: Problem,
        ignore_index: int,
    ) -> Any:
        """What the call gives with these values, as it is, but for the batch dimension."""
        values = {**values, "f": self._function, "labels": labels.squeeze(-1), "temperature": temperature}
        values |= {"ignore_index": ignore_index, "out_dtype": problem.out_dtype}
        values |= {option: getattr(problem, name) for option, name in RETURNS.items()}
        given = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        before = {name: _kind(x) for name, x in given.items()}
        result = eval(self._code, values)
        self._changed = [
            f"shape or requires_grad of the {name}" for name, x in given.items() if _kind(x) != before[name]
        ]
        if not self._may_batch:
            return result
        return tuple(map(_without_batch, result)) if isinstance(result, tuple) else _without_batch(result)

    def called_with(self, **expressions: str) -> "Function":
        """The same function, called with these expressions in the places of its arguments."""
        call = _Instead(expressions).visit(self._parsed(self.call))
        return self._called_so(ast.unparse(call))

    def _called_so(self, call: str) -> "Function":
        return type(self)(self._function, call, self.returns)

    @property
    def other_calls(self) -> list[tuple[str, dict[str, str]]]:
        """How functions of such arguments are called as well, in words, and what stands in the places of them then."""
        return [
            ("logits and labels the other way round", {"logits": "labels", "labels": "logits"}),
            ("a batch of sequences", {"logits": "logits[None]", "labels": "labels[None]"}),
        ]

    def overwritten(self) -> list[str]:
        """What else than the values of logits the last call and its backward changed."""
        return [f"{what} was" for what in self._changed]

    def _parsed(self, call: str) -> ast.Expression:
        """The expression. Raises InputError for any that is not a call of the function with what it is given."""
        try:
            tree = ast.parse(call.strip(), CALL, "eval")
            compile(tree, CALL, "eval")  # refuses more, such as the same keyword twice
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            what = f"which is no expression of Python: {error}"
        else:
            names, needed = _names(tree), ("f", *self.given)
            unknown = sorted(names.difference(needed, self.known))
            missing = [name for name in needed if name not in names]
            if not (unknown or missing) and _calls(tree):
                return tree
            wrong = f"with the name {unknown[0]!r} in it" if unknown else ""
            what = wrong or (f"with no {missing[0]} in it" if missing else "")
        raise InputError(
            f"got call {call!r}, {what or 'which does not call f, the function'}. It has to call f, which is the "
            f"function, with {_listed(self.given)}, and may name {', '.join(self.known)}. Valid is {self.example}."
        )

    def _check_fits(self, signature: inspect.Signature, tree: ast.Expression) -> None:
        """Raise InputError where the function does not take what its call passes."""
        for node in _calls(tree):
            names = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
            if len(names) < len(node.keywords) or any(isinstance(part, ast.Starred) for part in node.args):
                continue  # how many there are shows only when it runs
            try:
                signature.bind(*node.args, **dict.fromkeys(names))
            except TypeError as error:
                raise InputError(
                    f"got call {self.call!r} of a function of {signature}: {error}. Say how it is called, "
                    f"{self.example}, or wrap it in a function of ({', '.join(self.given)})."
                ) from error

    def _signature(self, call: str | None) -> inspect.Signature | None:
        """Of the function; None if it cannot be read and is not needed, since a call is given."""
        try:
            # A given call is one of what takes it, and not of what that wraps.
            return inspect.signature(self._function, follow_wrapped=call is None)
        except Exception as error:  # TypeError and ValueError are Python's own; who computes one may raise anything
            if call is not None:
                return None
            raise InputError(
                f"got {self._function!r}, whose signature cannot be read ({type(error).__name__}: {error}); a function "
                f"of ({', '.join(self.given)}) is valid. Wrap it in one, or say how it is called, {self.example}."
            ) from error


class _Minus(torch.autograd.Function):
    """Minus a loss; its gradient keeps the strides of 0 that an expanded one has."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return 0.0 - loss  # no -0 of an ignored label's 0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        is_one_number = gradient.numel() > 1 and not any(gradient.stride())
        return (-gradient.flatten()[0]).expand(gradient.shape) if is_one_number else -gradient


def with_all_results(problem: Problem) -> Problem:
    """`problem` with everything asked for that a call can return."""
    return problem._replace(**dict.fromkeys(RESULTS, True))  # type: ignore[arg-type]  # all of them are switches


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What a function may change of a tensor beside its values."""
    return x.shape, x.stride(), x.dtype, x.requires_grad


def _without_batch(part: Any) -> Any:
    return part[0] if isinstance(part, Tensor) and part.ndim == 2 and len(part) == 1 else part


class _Instead(ast.NodeTransformer):
    def __init__(self, expressions: dict[str, str]) -> None:
        self.expressions = expressions

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(self.expressions.get(node.id, node.id), mode="eval").body


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _calls(tree: ast.Expression) -> list[ast.Call]:
    """The calls of f."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "f"]


def _names(tree: ast.Expression) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


class NamedBackend:
    """A registered backend, called through `compute` as the public functions do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._backend = get_backend(name)
        self.row_invariant = self._backend.row_invariant
        self.shared = ""
        """Which results shared memory with the stats in the last forward."""

    def within(self, problem: Problem) -> Problem:
        """`problem`. Raises BackendUnavailable where the backend cannot run it."""
        require_backend(self.name, problem)
        return problem

    def default_problems(self, plain: Problem) -> list[Problem]:
        """`plain` in float32, and misaligned in bfloat16, each with the most that the backend has."""
        problems = []
        for bare in (plain, plain._replace(dtype=torch.bfloat16, layout="rows", aligned=False)):
            tempered = bare._replace(temperature="number")
            richest_first = (with_all_results(tempered), tempered._replace(entropy=True), tempered, bare)
            problems += [problem for problem in richest_first if why_not(self.name, problem) is None][:1]
        if not problems:
            require_backend(self.name, plain)  # raises
        return problems

    def overwritten(self) -> list[str]:
        """As for a `Function`."""
        return []

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        """The backend's own, whose results are looked at."""
        results = self._backend.forward(inputs, wanted)
        kept = results.stats.untyped_storage().data_ptr()
        others: dict[str, Tensor | None] = {**results._asdict(), "stats": None}
        sharing = [name for name, x in others.items() if x is not None and x.untyped_storage().data_ptr() == kept]
        self.shared = " and ".join(sharing).replace("_", " ")
        return results

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """The backend's own."""
        return self._backend.backward(inputs, stats, upstream, inplace=inplace)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        problem: Problem,
        ignore_index: int = IGNORE_INDEX,
    ) -> Any:
        results = compute(
            self,
            logits,
            labels,
            temperature,
            ignore_index=ignore_index,
            wanted=wanted_by(problem),
            inplace_backward=problem.inplace_backward,
        )
        returned = tuple(in_dtype(result, problem.out_dtype) for result in results)
        return returned if len(returned) > 1 else returned[0]

    def as_function(self, problem: Problem) -> Function:
        """The same as a function of logits [N, V] and labels [N], with the options that `problem` has."""

        def function(
            logits: Tensor,
            labels: Tensor,
            temperature: float = 1.0,
            return_entropy: bool = False,
            return_logsumexp: bool = False,
            return_argmax: bool = False,
            return_sum_p_squared: bool = False,
        ) -> Any:
            wanted = Wanted(return_entropy, return_logsumexp, return_argmax, return_sum_p_squared)
            asked = problem._replace(**wanted._asdict())
            result = self(logits, labels.unsqueeze(-1), temperature, asked)
            return (result[0].squeeze(-1), *result[1:]) if isinstance(result, tuple) else result.squeeze(-1)

        return Function(function)


Subject = NamedBackend | Function
"""What is checked."""
