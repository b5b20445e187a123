"""What a backend is."""

import inspect
from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor

from compiled_logprobs.backends.fingerprint import digest_of
from compiled_logprobs.operation import formula
from compiled_logprobs.operation.formula import Computed, Saved, Upstream
from compiled_logprobs.problem import Problem


class Backend(ABC):
    """One way to compute the operation: a pair of pure functions, and when they can be used.

    `compiled_logprobs.operation.autograd` wraps the pair. It merges the leading dimensions of the logits as far as
    their strides allow, brings the labels into range, keeps the sign, and handles ignored and invalid rows: a backend
    sees clean input.

    Shapes: `logits` [..., V], two dimensions or more, unit last stride, any row strides, at least one row; `labels`
    [..., K] int64 in [0, V), contiguous; `temperature` a positive number, or [...] contiguous in float32 (float64 for
    float64 logits).
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
    def forward(self, logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool) -> Computed:
        """Log-probabilities, entropy where it is asked for, and the residuals that `backward` needs.

        Do not write to the arguments. The same row gives the same bits whether or not a gradient will be asked for.
        """

    @abstractmethod
    def backward(self, saved: Saved, upstream: Upstream, *, inplace: bool) -> Tensor:
        """The gradient in the logits, [..., V] in their dtype: contiguous and new, or, if `inplace`, over `logits`.

        The rows of `saved.ignored` get exactly 0, whatever they hold.
        """

    def why_not(self, problem: Problem) -> str | None:
        """Why this backend cannot run `problem` here; None if it can."""
        return None

    def is_warm(self, problem: Problem) -> bool:
        """Whether `problem` runs without compiling anything first, as a CUDA-graph capture and small calls need."""
        return True

    def fingerprint(self) -> str:
        """Changes whenever results or speed may: a digest of what this backend's source and the formula mean."""
        return digest_of(Path(inspect.getfile(type(self))), Path(formula.__file__))
