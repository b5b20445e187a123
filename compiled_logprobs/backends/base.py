"""What a backend is."""

import inspect
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from compiled_logprobs.backends.fingerprint import digest_of
from compiled_logprobs.machine.clock import total_memory
from compiled_logprobs.operation import chunks, contract, formula, hidden, products, shards
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted
from compiled_logprobs.operation.hidden import Gradients, HiddenInputs, LogitsBackend, Needs
from compiled_logprobs.problem import Problem

SHARE_OF_MEMORY = 4
"""The part of a device's memory, as one in so many, that all logits at once may take beside a model."""
GIB = 2**30


class AnyBackend(ABC):
    """What is known of a backend, whatever it computes from: its name, and when it can be used."""

    name: str
    """What users write in `backend="..."`."""
    summary: str
    """One line for people."""
    row_invariant: bool = False
    """Whether a row has the same bits whatever N it came with, as long as it lies in memory the same way.

    Declare it where the kernels guarantee it, as where each row is computed by itself. The check holds a backend to its
    word, and `autotune(row_invariant=True)` admits only backends that have given it.
    """

    def why_not(self, problem: Problem) -> str | None:
        """Why this backend cannot run `problem` here; None if it can."""
        return None

    def is_warm(self, problem: Problem) -> bool:
        """Whether `problem` runs without compiling anything first, as a CUDA-graph capture and small calls need."""
        return True

    def fingerprint(self) -> str:
        """Changes whenever results or speed may: a digest of the meaning of what computes here."""
        return digest_of(Path(inspect.getfile(type(self))), Path(formula.__file__), Path(contract.__file__))


class Backend(AnyBackend):
    """One way to compute log-probabilities from logits: a pair of pure functions.

    `compiled_logprobs.operation.autograd` wraps the pair, and merges the leading dimensions of the logits as far as
    their strides allow. All else is the backend's: it returns finished numbers, as
    `compiled_logprobs.operation.contract` says. That has helper functions for kernels that know nothing of it.
    """

    @abstractmethod
    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        """Log-probabilities, what else is wanted, and the statistics that `backward` needs.

        Do not write to the inputs. The same row gives the same bits whatever is wanted, and whether or not a gradient
        will be asked for.
        """

    @abstractmethod
    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """The gradient in the logits, [..., V] in their dtype: contiguous and new, or, if `inplace`, over the logits.

        `stats` may come from another backend's forward. Rows all of whose labels are ignored get exactly 0, whatever
        they hold; invalid rows NaN.
        """


class HiddenBackend(AnyBackend):
    """One way to compute log-probabilities from hidden states: a pair of functions over products with the weight.

    `compiled_logprobs.operation.hidden` wraps the pair. What there is to do with logits, once it has some, it asks of a
    backend that it is given.
    """

    keeps_logits: bool = False
    """Whether what it keeps, where it does, is the product of all rows that count, [M, V] in the dtype of the hidden
    states, over which its backward may write; any such backend can use what another one kept."""
    needs_autograd: bool = False
    """Whether its backward differentiates what it recorded, which there is no way to do inside an operator: in graphs
    it does not serve."""

    def fingerprint(self) -> str:
        """The same, with what is common to backends over hidden states."""
        own = Path(inspect.getfile(type(self)))
        return digest_of(
            own, *(Path(str(part.__file__)) for part in (hidden, chunks, products, shards, formula, contract))
        )

    def memory_of_a_step(self, problem: Problem) -> int:
        """What a chunk takes for each row or column that it is longer, in proportion: it tells how a part of the
        vocabulary is cut into chunks as the whole is."""
        return problem.vocab

    def least_memory(self, problem: Problem) -> int | None:
        """Bytes that it takes beside arguments, results and gradients, if it has to; None where nobody knows."""
        return None

    @abstractmethod
    def forward(
        self, inputs: HiddenInputs, wanted: Wanted, logits_backend: LogitsBackend, *, keep: bool
    ) -> tuple[Results, Any]:
        """Results of the rows that count, and what else the backward of this backend can use, if `keep` is set."""

    @abstractmethod
    def backward(
        self,
        inputs: HiddenInputs,
        stats: Tensor,
        kept: Any,
        upstream: Upstream,
        logits_backend: LogitsBackend,
        needs: Needs,
    ) -> Gradients:
        """The gradients that are needed. `stats` may come from another backend's forward; then `kept` is None."""


def why_not_at_once(problem: Problem) -> str | None:
    """Why all logits at once are too many for the device, whatever is free of its memory now; None if they are
    not."""
    total, logits = total_memory(problem.device_type), problem.rows * problem.vocab * problem.dtype.itemsize
    if total is None or logits * SHARE_OF_MEMORY <= total:
        return None
    return f"the logits are {logits / GIB:.1f} GiB, more than a quarter of the {total / GIB:.1f} of the device"


ATTRIBUTES = {"name": str, "summary": str, "row_invariant": bool}


def faults_of(backend: AnyBackend, kind: type[AnyBackend]) -> list[str]:
    """What of `backend` is not as `kind` has it, in words: what was got, and what is valid."""
    faults = []
    for name, right in ATTRIBUTES.items():
        if not isinstance(value := getattr(backend, name, None), right):
            faults.append(f"got {name}={value!r:.80}, where a {right.__name__} is valid")
    for name in (name for name in dir(kind) if name[0] != "_" and callable(getattr(kind, name))):
        parameters = list(inspect.signature(getattr(kind, name)).parameters.values())[1:]
        by_place = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]
        by_name = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
        method = getattr(backend, name)
        with suppress(ValueError):  # of what is not Python, such as C++, which tells no signature
            try:
                inspect.signature(method).bind(*by_place, **dict.fromkeys(by_name))
            except TypeError:
                got = f"{name}{inspect.signature(method)}" if callable(method) else f"{name}={method!r:.80}"
                valid = ", ".join([*by_place, *(["*", *by_name] if by_name else [])])
                faults.append(f"got {got}, where {name}({valid}) is valid")
    return faults
