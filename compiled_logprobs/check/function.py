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

CALL = "--call"
"""Stands for a file in the traceback of what a call raises."""
_GIVEN = ("f", "logits", "labels")
_EXAMPLE = "e.g. --call \"f(labels, logits, temp=temperature, reduction='none')\""


class Function:
    """A function of logits [N, V] and labels [N], called the way it wants to be.

    That is `call`, one expression of these names: f, the function, which it has to call, logits, labels and `OPTIONS`.
    By default it is "f(logits, labels)", with those of `OPTIONS` that the function's own signature names. A batch
    dimension that a given call adds, as in "f(logits[None], labels[None])", is taken from the results again.
    """

    row_invariant = False  # nobody has declared it

    def __init__(self, function: Callable[..., Any], call: str | None = None, returns: Returns = "log_prob") -> None:
        if returns not in ("log_prob", "loss"):
            raise InputError(f"got returns={returns!r}; 'log_prob' or 'loss' is valid.")
        if isinstance(function, type):
            raise InputError(f"got the class {function.__qualname__}; a function is valid, or an instance that is one.")
        self.name = getattr(function, "__qualname__", type(function).__name__)
        self.returns = returns
        self._function = function
        self._may_batch = call is not None
        signature = _signature(function, call)
        options = [name for name in OPTIONS if signature is not None and name in signature.parameters]
        own = f"f({', '.join(['logits', 'labels', *(f'{name}={name}' for name in options)])})"
        self.call = own if call is None else call
        tree = _parsed(self.call)
        if signature is not None:
            _check_fits(signature, tree, self.call)
        self._code = compile(tree, CALL, "eval")
        self._options = frozenset(_names(tree) & set(OPTIONS))

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
        result = self.returned(logits, labels, temperature, problem, ignore_index)
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
        values = {"f": self._function, "logits": logits, "labels": labels.squeeze(-1), "temperature": temperature}
        values |= {"ignore_index": ignore_index}
        values |= {option: getattr(problem, name) for option, name in RETURNS.items()}
        values |= {name: getattr(problem, name) for name in ("masked_logits", "inplace_backward", "out_dtype")}
        result = eval(self._code, values)
        if not self._may_batch:
            return result
        return tuple(map(_without_batch, result)) if isinstance(result, tuple) else _without_batch(result)

    def called_with(self, logits: str, labels: str) -> "Function":
        """The same function, called with these expressions in the places of logits and labels."""
        call = _Instead({"logits": logits, "labels": labels}).visit(_parsed(self.call))
        return Function(self._function, ast.unparse(call), self.returns)


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


def _without_batch(part: Any) -> Any:
    return part[0] if isinstance(part, Tensor) and part.ndim == 2 and len(part) == 1 else part


class _Instead(ast.NodeTransformer):
    def __init__(self, expressions: dict[str, str]) -> None:
        self.expressions = expressions

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(self.expressions.get(node.id, node.id), mode="eval").body


def _parsed(call: str) -> ast.Expression:
    """The expression. Raises InputError for any that is not a call of the function with logits and labels."""
    try:
        tree = ast.parse(call.strip(), CALL, "eval")
        compile(tree, CALL, "eval")  # refuses more, such as the same keyword twice
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        what = f"which is no expression of Python: {error}"
    else:
        names = _names(tree)
        unknown = sorted(names.difference(_GIVEN, OPTIONS))
        missing = [name for name in _GIVEN if name not in names]
        if not (unknown or missing) and _calls(tree):
            return tree
        what = f"with the name {unknown[0]!r} in it" if unknown else f"with no {missing[0]} in it" if missing else ""
    raise InputError(
        f"got call {call!r}, {what or 'which does not call f, the function'}. It has to call f, which is the function, "
        f"with logits and labels, and may name {', '.join(OPTIONS)}. Valid is {_EXAMPLE}."
    )


def _calls(tree: ast.Expression) -> list[ast.Call]:
    """The calls of f."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "f"]


def _check_fits(signature: inspect.Signature, tree: ast.Expression, call: str) -> None:
    """Raise InputError where the function does not take what `call` passes."""
    for node in _calls(tree):
        names = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
        if len(names) < len(node.keywords) or any(isinstance(part, ast.Starred) for part in node.args):
            continue  # how many there are shows only when it runs
        try:
            signature.bind(*node.args, **dict.fromkeys(names))
        except TypeError as error:
            raise InputError(
                f"got call {call!r} of a function of {signature}: {error}. Say how it is called, {_EXAMPLE}, or wrap "
                "it in a function of (logits, labels)."
            ) from error


def _names(tree: ast.Expression) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _signature(function: Callable[..., Any], call: str | None) -> inspect.Signature | None:
    """Of the function; None if it cannot be read and is not needed, since a call is given."""
    try:
        # A given call is one of what takes it, and not of what that wraps.
        return inspect.signature(function, follow_wrapped=call is None)
    except Exception as error:  # TypeError and ValueError are Python's own; who computes a signature may raise anything
        if call is not None:
            return None
        raise InputError(
            f"got {function!r}, whose signature cannot be read ({type(error).__name__}: {error}); "
            f"a function of (logits, labels) is valid. Wrap it in one, or say how it is called, {_EXAMPLE}."
        ) from error


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

    def as_function(self, problem: Problem) -> Callable[..., Any]:
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

        return function


Subject = NamedBackend | Function
"""What is checked."""
