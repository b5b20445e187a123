"""Somebody's function: how it is called, and what it returns.

Shapes: N rows, V vocabulary.
"""

import ast
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from compiled_logprobs.check.cases import IGNORE_INDEX
from compiled_logprobs.errors import InputError
from compiled_logprobs.problem import Problem

Returns = Literal["log_prob", "loss"]
"""What the numbers that a function returns are: log-probabilities, or losses, which are minus that."""
OPTIONS = ("temperature", "ignore_index", "return_entropy", "masked_logits", "inplace_backward", "out_dtype")
"""What a call may name beside f, logits and labels."""

_EXAMPLE = "e.g. --call \"f(labels, logits, temp=temperature, reduction='none')\""


class Function:
    """A function of logits [N, V] and labels [N], called the way it wants to be.

    That is `call`, one expression of these names: f, the function, which it has to call, logits, labels and `OPTIONS`.
    By default it is "f(logits, labels)", with those of `OPTIONS` that the function's own signature names. A batch
    dimension that a given call adds, as in "f(logits[None], labels[None])", is taken from the results again.
    """

    row_invariant = False
    """Nobody has declared it."""

    def __init__(self, function: Callable[..., Any], call: str | None = None, returns: Returns = "log_prob") -> None:
        if returns not in ("log_prob", "loss"):
            raise InputError(f"got returns={returns!r}; 'log_prob' or 'loss' is valid.")
        self.name = getattr(function, "__qualname__", type(function).__name__)
        self.returns = returns
        self.call = _own_call(function) if call is None else call
        self._function = function
        self._may_batch = call is not None
        tree = _parsed(self.call)
        if call is not None:
            _check_fits(function, tree, call)
        self._code = compile(tree, "--call", "eval")
        self._options = _names(tree) & set(OPTIONS)

    def within(self, problem: Problem) -> Problem:
        """`problem` without the options that the function does not have."""
        has = self._options.__contains__
        return problem._replace(
            temperature=problem.temperature if has("temperature") else "none",
            entropy=problem.entropy and has("return_entropy"),
            masked_logits=problem.masked_logits and has("masked_logits"),
            inplace_backward=problem.inplace_backward and has("inplace_backward"),
            out_dtype=problem.out_dtype if has("out_dtype") else torch.float32,
            labels_per_row=1,
            layout="rows" if problem.layout == "other" else problem.layout,
        )

    def default_problems(self, plain: Problem) -> list[Problem]:
        """`plain` in float32 and bfloat16, alone and with what the function has."""
        problems = []
        for dtype in (torch.float32, torch.bfloat16):
            bare = plain._replace(dtype=dtype)
            rich = self.within(bare._replace(entropy=True, temperature="number", masked_logits=True))
            in_place = self.within(bare._replace(inplace_backward=True))
            problems += list(dict.fromkeys((bare, rich, in_place)))
        return problems

    def __call__(self, logits: Tensor, labels: Tensor, temperature: float | Tensor, problem: Problem) -> Any:
        """What it returns for labels [N, 1], with log-probabilities [N, 1] where that can be."""
        result = self.returned(logits, labels, temperature, problem)
        parts = tuple(result) if isinstance(result, tuple) else (result,)
        if not all(isinstance(part, Tensor) for part in parts) or len(parts) > 2:
            return result
        log_probs, *entropy = parts
        log_probs = log_probs if self.returns == "log_prob" else 0.0 - log_probs  # no -0 of an ignored label's 0
        return (log_probs.unsqueeze(-1), *entropy) if entropy else log_probs.unsqueeze(-1)

    def returned(self, logits: Tensor, labels: Tensor, temperature: float | Tensor, problem: Problem) -> Any:
        """What it returns for labels [N, 1], as it is, but for a batch dimension that a given call has added."""
        values = {name: getattr(problem, name) for name in ("masked_logits", "inplace_backward", "out_dtype")} | {
            "f": self._function,
            "logits": logits,
            "labels": labels.squeeze(-1),
            "temperature": temperature,
            "ignore_index": IGNORE_INDEX,
            "return_entropy": problem.entropy,
        }
        result = eval(self._code, values)
        if not self._may_batch:
            return result
        return tuple(map(_without_batch, result)) if isinstance(result, tuple) else _without_batch(result)

    def swapped(self) -> "Function":
        """The same function, called with logits and labels in each other's place."""
        return Function(self._function, ast.unparse(_Swap().visit(_parsed(self.call))), self.returns)


def _without_batch(part: Any) -> Any:
    return part[0] if isinstance(part, Tensor) and part.ndim == 2 and len(part) == 1 else part


class _Swap(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name({"logits": "labels", "labels": "logits"}.get(node.id, node.id), node.ctx)


def _parsed(call: str) -> ast.Expression:
    """The expression. Raises InputError for any that is not a call of the function with logits and labels."""
    valid = ("f", "logits", "labels", *OPTIONS)
    try:
        tree = ast.parse(call.strip(), "--call", "eval")
        compile(tree, "--call", "eval")  # refuses more, such as the same keyword twice
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise InputError(
            f"got call {call!r}, which is no expression of Python: {error}. Valid is {_EXAMPLE}."
        ) from error
    names = _names(tree)
    unknown, missing = sorted(names - set(valid)), [name for name in valid[:3] if name not in names]
    if unknown or missing:
        what = f"the name {unknown[0]!r}" if unknown else f"no {missing[0]}"
        raise InputError(
            f"got call {call!r} with {what} in it; it has to name f, which is the function, logits and labels, and may "
            f"name {', '.join(OPTIONS)}. Valid is {_EXAMPLE}."
        )
    if not _calls(tree):
        raise InputError(f"got call {call!r}, which does not call f, the function. Valid is {_EXAMPLE}.")
    return tree


def _calls(tree: ast.Expression) -> list[ast.Call]:
    """The calls of f."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "f"]


def _check_fits(function: Callable[..., Any], tree: ast.Expression, call: str) -> None:
    """Raise InputError where the signature of the function, if it has one, does not take what `call` passes."""
    try:
        own = inspect.signature(function, follow_wrapped=False)  # what takes the call, not what it stands for
    except Exception:  # noqa: BLE001 - as in `_own_call`; the call is then tried as it is
        return
    for node in _calls(tree):
        names = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
        if len(names) < len(node.keywords) or any(isinstance(part, ast.Starred) for part in node.args):
            continue  # how many there are shows only when it runs
        try:
            own.bind(*node.args, **dict.fromkeys(names))
        except TypeError as error:
            raise InputError(
                f"got call {call!r} of a function of {own}: {error}. Arguments that it takes are valid; correct them."
            ) from error


def _names(tree: ast.Expression) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _own_call(function: Callable[..., Any]) -> str:
    """f(logits, labels), with the options that the function itself names."""
    try:
        own = inspect.signature(function)
    except Exception as error:  # TypeError and ValueError are Python's own; who computes a signature may raise anything
        raise InputError(
            f"got {function!r}, whose signature cannot be read ({type(error).__name__}: {error}); "
            f"a function of (logits, labels) is valid. Wrap it in one, or say how it is called, {_EXAMPLE}."
        ) from error
    options = [name for name in OPTIONS if name in own.parameters]
    try:
        own.bind(None, None, **dict.fromkeys(options))
    except TypeError as error:
        raise InputError(
            f"got a function of {own}, which cannot be called with (logits, labels): {error}. "
            f"Say how it is called, {_EXAMPLE}."
        ) from error
    return f"f({', '.join(['logits', 'labels', *(f'{name}={name}' for name in options)])})"
