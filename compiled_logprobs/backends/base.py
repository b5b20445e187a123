"""What a backend is."""

import inspect
from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor

from compiled_logprobs.backends.fingerprint import digest_of
from compiled_logprobs.operation import contract, formula
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted
from compiled_logprobs.problem import Problem


class Backend(ABC):
    """One way to compute the operation: a pair of pure functions, and when they can be used.

    `compiled_logprobs.operation.autograd` wraps the pair, and merges the leading dimensions of the logits as far as
    their strides allow. All else is the backend's: it returns finished numbers, as
    `compiled_logprobs.operation.contract` says. That has helper functions for kernels that know nothing of it.
    """

    name: str
    """What users write in `backend="..."`."""
    summary: str
    """One line for people."""
    row_invariant: bool = False
    """Whether a row has the same bits whatever N it came with, as long as it lies in memory the same way.

    Declare it where the kernels guarantee it, as where each row is computed by itself. The check holds a backend to its
    word, and `autotune(row_invariant=True)` admits only backends that have given it.
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

    def why_not(self, problem: Problem) -> str | None:
        """Why this backend cannot run `problem` here; None if it can."""
        return None

    def is_warm(self, problem: Problem) -> bool:
        """Whether `problem` runs without compiling anything first, as a CUDA-graph capture and small calls need."""
        return True

    def fingerprint(self) -> str:
        """Changes whenever results or speed may: a digest of the meaning of what computes here."""
        return digest_of(Path(inspect.getfile(type(self))), Path(formula.__file__), Path(contract.__file__))
