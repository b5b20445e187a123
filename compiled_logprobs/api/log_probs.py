"""What is returned where more than log-probabilities is asked for: a named tuple of just that.

Compilers, exporters, pytrees and hooks take a named tuple apart and put it together again by its class, so each
combination of results has a class of its own. `LogProbs` is what these classes are called and what they have in common.
"""

from collections import namedtuple
from collections.abc import Sequence
from itertools import product
from typing import Any, cast

from torch import Tensor

from compiled_logprobs.arguments import find_private
from compiled_logprobs.operation.contract import Wanted

_register: Any = find_private("torch.utils._pytree._register_namedtuple", lambda made, *, serialized_type_name: None)
"""Gives a named tuple a name in the files of torch.export.save, which refuses one that has none."""


class LogProbs(Sequence[Tensor]):
    """Log-probabilities and what else was asked for, of the same pass: unpacks into that, in the order of the fields.

    What was not asked for is None.
    """

    log_probs: Tensor
    """[...] or [..., K], in nats, never positive."""
    entropy: Tensor | None
    """[...], in nats, never negative."""
    logsumexp: Tensor | None
    """[...], in nats: of logits / temperature."""
    argmax: Tensor | None
    """[...] int64: the first column that holds the maximum; -1 for a row that is ignored, or NaN."""
    sum_p_squared: Tensor | None
    """[...]: the sum of the squares of all probabilities."""


def log_probs_with(wanted: Wanted, *results: Tensor) -> LogProbs:
    """The `LogProbs` of the log-probabilities and what is `wanted`, in order."""
    return cast(LogProbs, _CLASSES[_place(wanted)](*results))


def _place(wanted: Wanted) -> int:
    return sum(bool(is_wanted) << bit for bit, is_wanted in enumerate(wanted))


def _class_of(wanted: Wanted) -> type:
    names = [name for name, is_wanted in zip(Wanted._fields, wanted, strict=True) if is_wanted]
    made: Any = namedtuple("LogProbs", ["log_probs", *names], module=__name__)  # type: ignore[misc]
    for name in set(Wanted._fields).difference(names):
        # It reads as None. A graph of a torch before 2.11 takes a plain None for something, and refuses this.
        setattr(made, name, staticmethod(None))  # type: ignore[arg-type]
    # No module holds the class under its name, so pickles and copies say what it is made of.
    made.__reduce__ = lambda self: (log_probs_with, (wanted, *self))  # type: ignore[method-assign,misc]
    made.__doc__ = LogProbs.__doc__
    LogProbs.register(made)
    _register(made, serialized_type_name=".".join(("compiled_logprobs.LogProbs", *names)))
    return cast(type, made)


_COMBINATIONS = [Wanted(*bits[::-1]) for bits in product((False, True), repeat=len(Wanted._fields))]
_CLASSES = tuple(map(_class_of, _COMBINATIONS))
"""By place: a number, since a compiler looks into no dictionary by a tuple."""
