"""What is to be computed: everything that may decide which backend is fastest, and nothing else."""

import re
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from compiled_logprobs.errors import ProfileError

Temperature = Literal["none", "number", "per_token"]
Layout = Literal["flat", "rows", "slice"]

SMALL = 2**20
"""Logits; below it nothing is compiled or measured for a call."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESULTS = ("entropy", "logsumexp", "argmax", "sum_p_squared")
"""What may be asked for beside the log-probabilities, in the order in which it is returned: fields of `Problem`."""

FROM_HIDDEN = ("hidden", "weight_grad", "bias", "softcap", "memory_limit")
"""Fields of `Problem` that logits have no use for."""


def short_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


class Problem(NamedTuple):
    """One call of `log_probs_from_logits` or, with a hidden size, of `log_probs_from_hidden`, without its values.

    Hashable; a plain tuple on the hot path.
    """

    device_type: str
    rows: int
    """N, the product of the leading dimensions of the logits."""
    vocab: int
    """V, the last dimension of the logits."""
    dtype: torch.dtype
    """Of the logits, and so of their gradient; or of the hidden states and the weight."""
    out_dtype: torch.dtype = torch.float32
    """Of the results."""
    labels_per_row: int = 1
    """K."""
    needs_grad: bool = False
    entropy: bool = False
    logsumexp: bool = False
    argmax: bool = False
    sum_p_squared: bool = False
    """Whether the sum over the vocabulary of the squared probabilities is asked for."""
    temperature: Temperature = "none"
    masked_logits: bool = False
    """Whether whole regions of the vocabulary are -inf."""
    inplace_backward: bool = False
    layout: Layout = "flat"
    """'flat': the rows follow one another; 'rows': one stride from row to row; 'slice': more than one, as in
    logits[:, :-1]."""
    aligned: bool = True
    """Whether every row starts at a multiple of 16 bytes."""
    hidden: int | None = None
    """H, the last dimension of the hidden states; None where the logits are given. The others apply to these alone."""
    weight_grad: bool = False
    """Whether the weight needs a gradient, too, or the output layer is frozen."""
    bias: bool = False
    softcap: bool = False
    memory_limit: int | None = None
    """Bytes that a call may take beside its arguments, results and gradients."""

    def __str__(self) -> str:
        shape = f"{self.rows} x {self.vocab}" if self.hidden is None else f"{self.rows} x {self.hidden} x {self.vocab}"
        return f"{shape} {short_name(self.dtype)} on {self.device_type}"

    @property
    def mode(self) -> str:
        """One of `MODES`."""
        return "forward" if not self.needs_grad else "inplace" if self.inplace_backward else "backward"

    def details(self) -> str:
        """The options that differ from a plain forward, in words; empty where none does."""
        words = [
            f"{self.labels_per_row} labels a row" if self.labels_per_row != 1 else "",
            "gradient" if self.needs_grad else "",
            "of the weight too" if self.weight_grad else "",
            "bias" if self.bias else "",
            "soft cap" if self.softcap else "",
            "" if self.memory_limit is None else f"within {self.memory_limit / 2**20:g} MiB",
            *(name.replace("_", " ") for name in results_of(self)),
            "" if self.temperature == "none" else f"temperature ({self.temperature.replace('_', ' ')})",
            "masked logits" if self.masked_logits else "",
            "in-place backward" if self.inplace_backward else "",
            "" if self.layout == "flat" else f"layout {self.layout}",
            "" if self.aligned else "not 16-byte aligned",
            "" if self.out_dtype == torch.float32 else f"result in {short_name(self.out_dtype)}",
        ]
        return ", ".join(word for word in words if word)


def results_of(problem: Problem) -> tuple[str, ...]:
    """Which of `RESULTS` are asked for."""
    return tuple(name for name in RESULTS if getattr(problem, name))


def bytes_of_results(problem: Problem) -> int:
    """Of one row."""
    count = problem.labels_per_row + len(results_of(problem)) - problem.argmax
    return count * problem.out_dtype.itemsize + problem.argmax * torch.int64.itemsize


def as_it_lies(problem: Problem) -> Problem:
    """`problem`, not aligned where flat rows, or slices of such, are not: V elements have to be multiples of 16
    bytes."""
    possible = (
        problem.layout == "rows" or problem.hidden is not None or problem.vocab * problem.dtype.itemsize % 16 == 0
    )
    return problem if possible else problem._replace(aligned=False)


def collapse(logits: Tensor) -> Tensor:
    """`logits` [..., V] with its leading dimensions merged as far as strides allow, without a copy.

    The result has at least two dimensions, no leading dimension of size 1 unless it is the only one, and a unit last
    stride: only where the last stride is another one is anything copied.
    """
    vocab = logits.shape[-1]
    if logits.is_neg():  # a view that only says that its memory is to be negated
        logits = logits.resolve_neg()
    if logits.is_contiguous():
        return logits if logits.ndim == 2 and logits.stride(0) == vocab else logits.view(-1, vocab)
    if logits.stride(-1) != 1 and vocab > 1:
        return logits.contiguous().view(-1, vocab)
    sizes, _ = _merged(logits)
    return logits.view(*(sizes or [1]), vocab)


def layout_of(logits: Tensor) -> tuple[Layout, bool]:
    """Layout and 16-byte alignment of what `collapse` makes of `logits`; nothing is computed to find out."""
    vocab, itemsize = logits.shape[-1], logits.element_size()
    if logits.is_contiguous():
        return "flat", logits.data_ptr() % 16 == 0 and vocab * itemsize % 16 == 0
    if logits.stride(-1) != 1 and vocab > 1:
        return "flat", True  # of a copy
    _, strides = _merged(logits)
    aligned = logits.data_ptr() % 16 == 0 and all(stride * itemsize % 16 == 0 for stride in strides)
    return "slice" if len(strides) > 1 else "rows", aligned


def _merged(logits: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of the leading dimensions, merged as far as strides allow, without those of size 1."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides


def overlaps(logits: Tensor) -> bool:
    """Whether two elements of `logits` share memory, so that writing one changes the other."""
    reach = 1  # how many elements of memory the dimensions so far span
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


MODES: dict[str, dict[str, Any]] = {
    "forward": {},
    "backward": {"needs_grad": True},
    "inplace": {"needs_grad": True, "inplace_backward": True},
}
"""What is asked for: forward alone; with the gradient; with the gradient written over the logits."""


def mode_name(problem: Problem) -> str:
    """The mode and what else is asked for, in words, such as 'backward, entropy, temperature (number)'."""
    is_usual = problem == as_it_lies(problem._replace(aligned=True))
    others = problem._replace(needs_grad=False, inplace_backward=False, aligned=problem.aligned or is_usual)
    hidden = "" if problem.hidden is None else f"hidden {problem.hidden}"
    return ", ".join(filter(None, (problem.mode, hidden, others.details())))


def bucket(problem: Problem) -> Problem:
    """`problem` with N rounded up to half an octave (1, 2, 3, 4, 6, 8, 12, ...), so that nearby N share a decision; and
    a limit of memory down."""
    rows, limit = problem.rows, problem.memory_limit
    octave = 1 << max(0, rows.bit_length() - 1)
    top = octave if octave >= rows else octave * 3 // 2 if octave * 3 // 2 >= rows else octave * 2
    if limit is None:
        return problem._replace(rows=top)
    octave = 1 << max(0, limit.bit_length() - 1)  # what keeps within less keeps within the limit, too
    return problem._replace(rows=top, memory_limit=octave * 3 // 2 if 1 < octave <= limit * 2 // 3 else octave)


def of_logits(problem: Problem, rows: int, vocab: int | None = None) -> Problem:
    """What a backend over hidden states asks one over logits, for so many rows, of which it needs no copy."""
    asked = problem._replace(
        rows=rows,
        vocab=vocab or problem.vocab,
        dtype=torch.float32 if problem.softcap else problem.dtype,
        inplace_backward=problem.needs_grad,
        **{name: Problem._field_defaults[name] for name in FROM_HIDDEN},
    )
    return as_it_lies(asked)


def why_not_posed(problem: Problem) -> str | None:
    """What of it no call has together, and what is valid; None if all of it goes together."""
    if problem.hidden is None:
        alone = [name for name in FROM_HIDDEN if getattr(problem, name)]
        return f"{alone[0].replace('_', ' ')} without a hidden size; it is valid with one" if alone else None
    given = {
        "the mode inplace": problem.inplace_backward,
        f"the layout {problem.layout}": problem.layout != "flat",
        "masked logits": problem.masked_logits,
        "the sum of squared probabilities": problem.sum_p_squared,
    }
    of_logits = [what for what, is_so in given.items() if is_so]
    if of_logits:
        return f"{of_logits[0]} with a hidden size; it is valid for logits alone"
    is_odd = problem.weight_grad and not problem.needs_grad
    return "a gradient of the weight without needs_grad; it is valid with it" if is_odd else None


def is_small(problem: Problem) -> bool:
    """Whether `problem` is served by what is ready, unless a profile says otherwise."""
    return problem.rows * problem.vocab < SMALL


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_DTYPES = {short_name(dtype): dtype for dtype in DTYPES}
_KINDS: dict[str, Any] = get_type_hints(Problem)


def problem_to_dict(problem: Problem) -> dict[str, Any]:
    """Every field of `problem`, as plain values."""
    fields = problem._asdict()
    return {name: short_name(value) if _KINDS[name] is torch.dtype else value for name, value in fields.items()}


def problem_from_dict(fields: object) -> Problem:
    """What `problem_to_dict` was given. Raises ProfileError for anything that it does not return.

    Earlier releases wrote no results but the entropy, and nothing of hidden states: what they left out was not asked
    for.
    """
    left_out = {name: Problem._field_defaults[name] for name in (*RESULTS[1:], *FROM_HIDDEN)}
    complete: dict[str, Any] = left_out | fields if isinstance(fields, dict) else {}
    if complete.keys() != _KINDS.keys():
        got = ", ".join(map(str, fields)) if isinstance(fields, dict) else f"a {type(fields).__name__}"
        raise ProfileError(f"a problem is {got:.300}; valid is an object of {', '.join(_KINDS)}")
    for name, value in complete.items():
        right, valid = _judged(_KINDS[name], value)
        if not right:
            raise ProfileError(f"the problem's {name} is {value!r:.80}; valid is {valid}")
    values: dict[str, Any] = {
        name: _DTYPES.get(value) if _KINDS[name] is torch.dtype else value for name, value in complete.items()
    }
    return Problem(**values)


def _judged(kind: object, value: object) -> tuple[bool, str]:
    """Whether `value` is a stored field of the type `kind`, and which values are."""
    if kind is bool:
        return isinstance(value, bool), "true or false"
    if kind is int:
        return type(value) is int and 0 <= value < 10**18, "an integer from 0 to 10^18 - 1"
    if kind == int | None:
        return value is None or (type(value) is int and 0 < value < 10**18), "null or an integer from 1 to 10^18 - 1"
    if kind is str:  # the type of device: a third party may add one, so that only its form can be checked
        right = isinstance(value, str) and re.fullmatch("[a-z][a-z0-9_]{0,31}", value) is not None
        return right, "a name of at most 32 lower-case letters, digits and underscores"
    choices = list(_DTYPES) if kind is torch.dtype else get_args(kind)
    return isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


def problem_name(problem: Problem) -> str:
    """A file's name that tells `problem` from every other, also where upper and lower case are the same."""
    problem_from_dict(problem_to_dict(problem))  # so that no name leads out of its folder
    parts = [
        problem.device_type,
        f"n{problem.rows}",
        f"v{problem.vocab}",
        short_name(problem.dtype),
        "" if problem.out_dtype == torch.float32 else f"out_{short_name(problem.out_dtype)}",
        "" if problem.labels_per_row == 1 else f"k{problem.labels_per_row}",
        "grad" if problem.needs_grad else "",
        *results_of(problem),
        "" if problem.temperature == "none" else f"t_{problem.temperature}",
        "masked" if problem.masked_logits else "",
        "inplace" if problem.inplace_backward else "",
        "" if problem.layout == "flat" else f"layout_{problem.layout}",
        "" if problem.aligned else "unaligned",
        "" if problem.hidden is None else f"h{problem.hidden}",
        "weight_grad" if problem.weight_grad else "",
        "bias" if problem.bias else "",
        "softcap" if problem.softcap else "",
        "" if problem.memory_limit is None else f"within_{problem.memory_limit}",
    ]
    return "-".join(part for part in parts if part)


_NAME = re.compile(
    "(?P<device_type>[a-z0-9_]+)-n(?P<rows>[0-9]+)-v(?P<vocab>[0-9]+)-(?P<dtype>[a-z0-9]+)"
    "(?:-out_(?P<out_dtype>[a-z0-9]+))?(?:-k(?P<labels_per_row>[0-9]+))?(?P<needs_grad>-grad)?"
    "(?P<entropy>-entropy)?(?P<logsumexp>-logsumexp)?(?P<argmax>-argmax)?(?P<sum_p_squared>-sum_p_squared)?"
    "(?:-t_(?P<temperature>[a-z_]+))?(?P<masked_logits>-masked)?(?P<inplace_backward>-inplace)?"
    "(?:-layout_(?P<layout>[a-z]+))?(?P<aligned>-unaligned)?"
    "(?:-h(?P<hidden>[0-9]+))?(?P<weight_grad>-weight_grad)?(?P<bias>-bias)?(?P<softcap>-softcap)?"
    "(?:-within_(?P<memory_limit>[0-9]+))?"
)


def problem_from_name(name: str) -> Problem | None:
    """The problem that `problem_name` gave this name; None if it gave it to none."""
    parts = _NAME.fullmatch(name)
    if parts is None:
        return None
    fields: dict[str, Any] = {}
    for field, found in parts.groupdict().items():
        kind = _KINDS[field]
        if kind is bool:
            fields[field] = (found is None) == (field == "aligned")
        elif found is not None:
            fields[field] = int(found[:19]) if kind in (int, int | None) else found
        elif field == "out_dtype":
            fields[field] = short_name(torch.float32)
        else:
            fields[field] = Problem._field_defaults[field]
    try:
        problem = problem_from_dict(fields)
    except ProfileError:
        return None
    return problem if problem_name(problem) == name else None
