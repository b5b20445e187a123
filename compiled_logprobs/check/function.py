"""Somebody's function: in which order it takes what, and what it returns.

Shapes: N rows, V vocabulary.
"""

import ast
import copy
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
"""What a signature may name beside logits and labels."""

_SWAPPED = {"logits": "labels", "labels": "logits"}
_EXAMPLE = "e.g. --signature \"labels, logits, temp=temperature, reduction='none'\" is valid"


class Function:
    """A function of logits [N, V] and labels [N], called the way it wants to be.

    Without a `signature` that is function(logits, labels), with those of `OPTIONS` that its own signature names. A
    `signature` lists the arguments of a call as Python does: logits, labels and options stand for their values, by position
    or behind a keyword; `[None]` behind logits, labels or temperature adds a leading dimension of 1, which the results lose
    again; everything else is a literal.
    """

    def __init__(
        self, function: Callable[..., Any], signature: str | None = None, returns: Returns = "log_prob"
    ) -> None:
        if returns not in ("log_prob", "loss"):
            raise InputError(f"got returns={returns!r}; 'log_prob' or 'loss' is valid.")
        self.name = getattr(function, "__qualname__", type(function).__name__)
        self.returns = returns
        self._function = function
        self._arguments = _own_arguments(function) if signature is None else _arguments(signature)
        self._options = {word for one in self._arguments for word in (one.names & set(OPTIONS))}
        self._batched = any(one.batched for one in self._arguments)
        self.row_invariant = False  # which nobody has declared of it

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
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            one = plain._replace(dtype=dtype)
            rich = self.within(one._replace(entropy=True, temperature="number", masked_logits=True))
            in_place = self.within(one._replace(inplace_backward=True))
            found += list(dict.fromkeys((one, rich, in_place)))
        return found

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
        """What it returns for labels [N, 1], as it is, but for the dimension that `[None]` has added."""
        values: dict[str, Any] = {
            "logits": logits,
            "labels": labels.squeeze(-1),
            "temperature": temperature,
            "ignore_index": IGNORE_INDEX,
            "return_entropy": problem.entropy,
            "masked_logits": problem.masked_logits,
            "inplace_backward": problem.inplace_backward,
            "out_dtype": problem.out_dtype,
        }
        positional = [one.value(values) for one in self._arguments if one.keyword is None]
        result = self._function(
            *positional, **{one.keyword: one.value(values) for one in self._arguments if one.keyword is not None}
        )
        if not self._batched:
            return result
        return tuple(map(_first, result)) if isinstance(result, tuple) else _first(result)

    def swapped(self) -> "Function":
        """The same function, called with logits and labels in each other's place."""
        other = copy.copy(self)
        other._arguments = [one.swapped() for one in self._arguments]
        return other

    @property
    def signature(self) -> str:
        """The arguments of a call, as they are given to `--signature`."""
        return ", ".join(map(str, self._arguments))


def _first(part: Any) -> Any:
    return part[0] if isinstance(part, Tensor) and part.ndim and len(part) == 1 else part


class _Argument:
    """One argument of a call: a name, with or without [None], or a literal."""

    def __init__(self, keyword: str | None, node: ast.expr) -> None:
        self.keyword = keyword
        self._node = node
        self.batched = _is_batched(node)
        inner = node.value if isinstance(node, ast.Subscript) and self.batched else node
        self.names = {inner.id} if isinstance(inner, ast.Name) else set()
        self._literal = None if self.names else ast.literal_eval(inner)

    def value(self, values: dict[str, Any]) -> Any:
        if not self.names:
            return self._literal
        (name,) = self.names
        value = values[name]
        return value[None] if self.batched and isinstance(value, Tensor) else value

    def swapped(self) -> "_Argument":
        """The same with labels for logits and logits for labels."""
        name = next((other for one, other in _SWAPPED.items() if one in self.names), None)
        if name is None:
            return self
        return _Argument(self.keyword, ast.parse(f"{name}[None]" if self.batched else name, mode="eval").body)

    def __str__(self) -> str:
        value = ast.unparse(self._node)
        return value if self.keyword is None else f"{self.keyword}={value}"


def _is_batched(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and isinstance(node.slice, ast.Constant)
        and node.slice.value is None
    )


def _arguments(signature: str) -> list[_Argument]:
    """The arguments that `signature` lists."""
    valid = ("logits", "labels", *OPTIONS)
    try:
        call = ast.parse(f"function({signature})", mode="eval").body
        if not isinstance(call, ast.Call) or any(one.arg is None for one in call.keywords):
            raise ValueError(signature)
        nodes = [(None, node) for node in call.args] + [(one.arg, one.value) for one in call.keywords]
        found = [_Argument(keyword, node) for keyword, node in nodes]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(
            f"got signature {signature!r}, which are not the arguments of a call; names ({', '.join(valid)}), "
            f"keywords and literals are valid, {_EXAMPLE}."
        ) from error
    named = [name for one in found for name in one.names]
    unknown = [name for name in named if name not in valid]
    missing = [name for name in ("logits", "labels") if name not in named]
    if unknown or missing or len(named) > len(set(named)):
        what = f"no {missing[0]}" if missing else f"{(unknown or named)[0]!r} in it, or a name twice"
        raise InputError(
            f"got signature {signature!r} with {what}; of {', '.join(valid)} each may stand once; {_EXAMPLE}."
        )
    return found


def _own_arguments(function: Callable[..., Any]) -> list[_Argument]:
    """(logits, labels), and the options that the function itself names."""
    try:
        own = inspect.signature(function)
    except Exception as error:  # TypeError and ValueError are Python's own; who computes a signature may raise anything
        raise InputError(
            f"got {function!r}, whose signature cannot be read ({type(error).__name__}: {error}); "
            f"a function of (logits, labels) is valid. Wrap it in one, or say what it takes: {_EXAMPLE}."
        ) from error
    options = [name for name in OPTIONS if name in own.parameters]
    try:
        own.bind(None, None, **dict.fromkeys(options))
    except TypeError as error:
        raise InputError(
            f"got a function of {own}, which cannot be called with (logits, labels): {error}. "
            f"Say what it takes: {_EXAMPLE}."
        ) from error
    return _arguments(", ".join(["logits", "labels", *(f"{name}={name}" for name in options)]))
