"""What is to be computed: everything that may decide which backend is fastest, and nothing else."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Temperature = Literal["none", "number", "per_token"]
Layout = Literal["flat", "rows", "other"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def short_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


class Problem(NamedTuple):
    """One call of `log_probs_from_logits`, without its values. Hashable; a plain tuple on the hot path."""

    device_type: str
    rows: int
    """N, the product of the leading dimensions of the logits."""
    vocab: int
    """V, the last dimension of the logits."""
    dtype: torch.dtype
    """Of the logits, and so of their gradient."""
    out_dtype: torch.dtype = torch.float32
    """Of the results."""
    labels_per_row: int = 1
    """K."""
    needs_grad: bool = False
    entropy: bool = False
    temperature: Temperature = "none"
    masked_logits: bool = False
    """Whether whole regions of the vocabulary are -inf."""
    inplace_backward: bool = False
    layout: Layout = "flat"
    """'flat': the rows follow one another; 'rows': one stride from row to row; 'other': more than one stride."""
    aligned: bool = True
    """Whether every row starts at a multiple of 16 bytes."""

    def __str__(self) -> str:
        return f"{self.rows} x {self.vocab} {short_name(self.dtype)} on {self.device_type}"

    def details(self) -> str:
        """The options that differ from a plain forward, in words; empty where none does."""
        words = [
            f"{self.labels_per_row} labels a row" if self.labels_per_row != 1 else "",
            "gradient" if self.needs_grad else "",
            "entropy" if self.entropy else "",
            "" if self.temperature == "none" else f"temperature ({self.temperature.replace('_', ' ')})",
            "masked logits" if self.masked_logits else "",
            "in-place backward" if self.inplace_backward else "",
            "" if self.layout == "flat" else f"layout {self.layout}",
            "" if self.aligned else "not 16-byte aligned",
            "" if self.out_dtype == torch.float32 else f"result in {short_name(self.out_dtype)}",
        ]
        return ", ".join(word for word in words if word)


def as_it_lies(problem: Problem) -> Problem:
    """`problem`, not aligned where rows that follow one another cannot be: V elements have to be multiples of 16 bytes."""
    possible = problem.layout != "flat" or problem.vocab * problem.dtype.itemsize % 16 == 0
    return problem if possible else problem._replace(aligned=False)


def collapse(logits: Tensor) -> Tensor:
    """`logits` [..., V] with its leading dimensions merged as far as strides allow, without a copy.

    The result has at least two dimensions, no leading dimension of size 1 unless it is the only one, and a unit last
    stride: only where the last stride is another one is anything copied.
    """
    vocab = logits.shape[-1]
    logits = logits.resolve_neg()  # of a view that only says that its memory is to be negated
    if logits.is_contiguous():
        return logits.view(-1, vocab)
    if logits.stride(-1) != 1 and vocab > 1:
        return logits.contiguous().view(-1, vocab)
    sizes: list[int] = []
    innermost_stride = 0
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and innermost_stride == size * stride:
            sizes[-1] *= size
        else:
            sizes.append(size)
        innermost_stride = stride
    return logits.view(*(sizes or [1]), vocab)


def layout_of(logits: Tensor) -> tuple[Layout, bool]:
    """Layout and 16-byte alignment of collapsed `logits`."""
    row_strides = logits.stride()[:-1]
    aligned = logits.data_ptr() % 16 == 0 and all(s * logits.element_size() % 16 == 0 for s in row_strides)
    if logits.ndim > 2:
        return "other", aligned
    if logits.shape[0] == 1 or row_strides[0] == logits.shape[1]:
        return "flat", aligned
    return "rows", aligned


def overlaps(logits: Tensor) -> bool:
    """Whether two elements of `logits` share memory, so that writing one changes the other."""
    reach = 1  # how many elements of memory the dimensions so far span
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False
