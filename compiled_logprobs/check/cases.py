"""Inputs that find mistakes: fresh at random each time, in memory whose surroundings are watched.

Shapes: N rows, V vocabulary, K labels a row; R the leading dimensions, one or two, whose product is N.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compiled_logprobs.problem import Problem, bucket

BLOCK_EDGES = (16, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""Block sizes of vectorised and Triton kernels; the columns at both sides of their edges are labels in every case."""
IGNORE_INDEX = -100
PADDING = 16
"""Elements of memory before and after the logits, and between strided rows."""
QWEN = 151936
REAL_VOCABULARIES = (32000, 50257, 128256, QWEN, 262144)
"""Llama 2, GPT-2, Llama 3, Qwen and Gemma: multiples of 128, of which one a power of 2, and an odd one; the most above
2^16."""
MANY_ROWS, FEW_COLUMNS = (1024, 1037), 131
"""As many rows as a block or a small grid has, and more, with so few columns that they take no time."""


ROUNDS_PROBABILITIES = (
    "loses labels that are nearly certain: a probability is rounded to half precision before it is subtracted from "
    "1, or before its logarithm is taken, or autograd adds two gradients in half precision. Convert the logits to "
    "float32 once, and keep probabilities in it until then"
)


@dataclass(frozen=True)
class Case:
    """One kind of input."""

    name: str
    rows: int
    fill: Callable[[Tensor, torch.Generator], Any] | None = None
    """Changes [N, V] float32 logits, which come as normal deviates of scale 3, in place."""
    strided: bool = False
    """Row stride and offset that no alignment holds for, whatever the problem's layout."""
    special: bool = False
    """Holds NaN or infinities."""
    ignored: float = 0.2
    """The share of rows whose labels are all ignored."""
    through_others: bool = True
    """Whether a gradient comes through the entropy and the logsumexp, where there are any."""
    first_column_is_a_label: bool = False
    """Of every second row: the column that `fill` does something special to."""
    largest_is_the_label: bool = False
    """Of every row, as of a token that was sampled where the model is certain."""
    labels: tuple[int, ...] = ()
    """Those to draw from; all of the vocabulary where there are none."""
    ignore_index: int = IGNORE_INDEX
    temperature: float | Literal["per_token"] | None = None
    """Instead of what the problem says."""
    vocab: int | None = None
    """Instead of the problem's."""
    column_step: int = 1
    """The last stride of the logits."""
    strided_labels: bool = False
    may_refuse: bool = False
    """Whether a function may raise: what it does not take is said of it, and no failure."""
    accident: str = ""
    """What an error says that no refusal does."""
    mistake: str = ""
    """What is wrong with a function that is right for all other inputs."""

    @property
    def is_gross(self) -> bool:
        """Whether what is looked for is gross, so that errors have a wider limit: other columns and other memory than
        those that are meant. How torch adds up depends on how the logits lie."""
        return self.vocab is not None or self.strided or self.column_step != 1


def cases(
    problem: Problem, *, short: bool, foreign: bool, options: Collection[str] = (), elsewhere: bool = False
) -> list[Case]:
    """The inputs that a backend has to get right before it may serve `problem`.

    Args:
        problem: gives V, the bucket of N, and whether regions are -inf.
        short: only the inputs that find most mistakes, with few rows.
        foreign: for somebody's function. It gets logits and labels of any stride as well, which for a backend are
            another problem or copied before. It is not asked about +inf, where a label's logit minus logsumexp is -inf
            and log_softmax NaN; nor about ignored rows that hold NaN, to which plain torch gives a gradient of 0 * NaN.
        options: of `log_probs_from_logits`, those that somebody's function takes.
        elsewhere: also a few rows of the vocabularies that models have, and many rows of a small one. A backend gets
            one of the former in half precision, and the latter in float32, since `compiled` takes time for each size
            and dtype, and tuning checks a backend at the problem's own.
    """
    top = bucket(problem).rows
    few = min(7, top)
    bottom = max(1, next(n for n in range(top, 0, -1) if n == 1 or bucket(problem._replace(rows=n - 1)).rows < top))
    most = [
        Case("normal", few),
        Case("shifted up by 1e4", few, lambda x_NV, _: x_NV.add_(1e4), through_others=False),
        Case("one dominant logit", few, _dominate, ignored=0.0, first_column_is_a_label=True),
        Case("-inf and NaN", few, _special, special=True, ignored=0.0, first_column_is_a_label=True),
    ]
    if problem.argmax:
        most.append(Case("equal maxima", few, _equal_maxima, through_others=False))
    if not foreign:
        # In the last column of every second row, which is a label of row 1.
        most.append(Case("+inf", few, lambda x_NV, _: x_NV[1::2, -1].fill_(torch.inf), special=True, ignored=0.0))
        most.append(Case("ignored rows of NaN", few, _special, special=True, ignored=1.0))
    if problem.masked_logits:
        most.append(Case("regions of -inf", few, _mask_regions, special=True, ignored=0.0))
    if short:
        return most
    return [
        Case("no rows", 0),
        Case("one row", 1, ignored=0.0, through_others=False),
        *most,
        *_nearly_certain(few),
        Case("shifted down by 1e4", few, lambda x_NV, _: x_NV.sub_(1e4)),
        Case("likely labels", few, _favour, largest_is_the_label=True, temperature=1.0, mistake=ROUNDS_PROBABILITIES),
        Case("rows far apart", few, _draw_apart),
        Case("all equal", few, lambda x_NV, _: x_NV.copy_(x_NV[:, :1].clone()), through_others=False),
        Case("wide", few, lambda x_NV, _: x_NV.mul_(20.0), labels=(17,), ignored=0.0),
        *_odd_labels(min(3, top), ignore_index=not foreign or "ignore_index" in options),
        *(_foreign(few, one_a_token="temperature" in options) if foreign else []),
        *(_elsewhere(problem, foreign=foreign) if elsewhere else []),
        *(Case(f"{n} rows", n, through_others=n == top) for n in dict.fromkeys((bottom, top)) if n not in (1, few)),
    ]


def _draw_apart(x_NV: Tensor, _: torch.Generator) -> None:
    """Rows at different levels, further apart than exponentials reach: each needs a maximum of its own."""
    x_NV.add_(torch.linspace(-1e3, 1e3, len(x_NV), device=x_NV.device)[:, None])


def _nearly_certain(few: int) -> list[Case]:
    """Labels of 0.99 < p < 1, the bulk of what a model is trained on late: in one row, and in all."""

    def in_one(x_NV: Tensor, generator: torch.Generator) -> None:
        _almost_decide(x_NV[len(x_NV) // 2 :][:1], generator)

    return [
        Case(name, few, fill, ignored=0.0, largest_is_the_label=True, temperature=1.0, mistake=ROUNDS_PROBABILITIES)
        for name, fill in (("one nearly certain label", in_one), ("nearly certain labels", _almost_decide))
    ]


def _odd_labels(few: int, *, ignore_index: bool) -> list[Case]:
    padding = "takes a small label for padding, which only the ignore_index marks: 0 to 3 are tokens like all others"
    cases = [Case("labels of 1, 2 and 3", few, labels=(1, 2, 3), ignored=0.0, mistake=padding)]
    nothing = (
        "does not take a batch all of whose labels are ignored: it divides by the number of those that count, or "
        "reduces none"
    )
    cases.append(Case("all labels ignored", few, ignored=1.0, mistake=nothing))
    for index in (-1, 2) if ignore_index else ():
        mistake = f"takes {IGNORE_INDEX}, or all negative labels, for ignored, whatever the ignore_index"
        cases.append(
            Case(f"an ignore_index of {index}", few, ignore_index=index, ignored=0.4, may_refuse=True, mistake=mistake)
        )
    return cases


def _foreign(few: int, *, one_a_token: bool) -> list[Case]:
    contiguous = "reads the {} as if they were contiguous: go by their strides, or call contiguous() first"
    cases = [
        Case(
            "strided and misaligned rows",
            few,
            strided=True,
            may_refuse=True,
            accident="view size is not compatible",
            mistake=contiguous.format("rows of the logits"),
        ),
        Case(
            "a last stride of 2",
            few,
            column_step=2,
            may_refuse=True,
            mistake=contiguous.format("columns of the logits"),
        ),
        Case("strided labels", few, strided_labels=True, may_refuse=True, mistake=contiguous.format("labels")),
    ]
    if one_a_token:
        mistake = "takes one temperature for all rows, where each token comes with its own"
        cases.append(Case("a temperature a token", few, temperature="per_token", may_refuse=True, mistake=mistake))
    return cases


def _elsewhere(problem: Problem, *, foreign: bool) -> list[Case]:
    vocabularies = [Case(f"a vocabulary of {vocab}", 3, vocab=vocab, ignored=0.0) for vocab in REAL_VOCABULARIES]
    rows = [Case(f"{rows} rows of {FEW_COLUMNS}", rows, vocab=FEW_COLUMNS) for rows in MANY_ROWS]
    if foreign:
        return [*vocabularies, *rows]
    return rows if problem.dtype == torch.float32 else [case for case in vocabularies if case.vocab == QWEN]


def _favour(x_NV: Tensor, generator: torch.Generator) -> None:
    """One logit that has most of the probability, between 1/2 and 0.99."""
    rows = torch.arange(len(x_NV), device=x_NV.device)
    columns = torch.randint(x_NV.shape[1], rows.shape, generator=generator, device=x_NV.device)
    odds = torch.rand(rows.shape, generator=generator, device=x_NV.device).mul_(math.log(99.0))
    x_NV[rows, columns] = x_NV.logsumexp(-1) + odds


def _almost_decide(x_NV: Tensor, generator: torch.Generator) -> None:
    """One logit so far above the rest that its probability rounds to 1 in half precision, but not in float32."""
    rows, vocab = x_NV.shape
    if vocab < 2:
        return
    device = x_NV.device
    first = torch.randint(vocab, (rows,), generator=generator, device=device)
    second = (first + torch.randint(1, vocab, (rows,), generator=generator, device=device)) % vocab
    jitter = torch.rand(rows, generator=generator, device=device)
    share = 2.0 ** -(7.0 + 7.0 * jitter)  # of all the others together
    share[0::3] = 2.0**-12 * (1.0 - jitter[0::3] / 16)  # halfway to the next number of float16
    share[1::3] = 2.0**-11
    x_NV.div_(30.0).sub_(20.0 + math.log(max(1.0, vocab / 2048)))
    x_NV.scatter_(-1, second[:, None], (share / (1.0 - share)).log()[:, None])
    x_NV.scatter_(-1, first[:, None], 0.0)


def _dominate(x_NV: Tensor, generator: torch.Generator) -> None:
    """One logit far above the rest: the label's in every second row, so that its probability rounds to 1. Of the
    others, in one at the start and in one at the end, where exponentials overflow without it."""
    device, vocab = x_NV.device, x_NV.shape[1]
    rows = torch.arange(len(x_NV), device=device)
    columns = torch.randint(vocab, rows.shape, generator=generator, device=device).masked_fill(rows % 2 == 1, 0)
    ahead = 20.0 + 80.0 * torch.rand(rows.shape, generator=generator, device=device)
    for row, column in ((2, vocab - 1 - int(columns[0]) // 4), (4, int(columns[0]) // 4)):
        if row < len(x_NV):
            columns[row], ahead[row] = column, ahead[row] + 130.0
    x_NV[rows, columns] += ahead


def _equal_maxima(x_NV: Tensor, generator: torch.Generator) -> None:
    """The maximum in several columns, far apart in one row and side by side in the next."""
    rows, vocab = x_NV.shape
    columns = torch.randint(vocab, (rows, 3), generator=generator, device=x_NV.device)
    columns[1::2] = (columns[1::2, :1] + torch.arange(3, device=x_NV.device)).clamp(max=vocab - 1)
    x_NV.scatter_(-1, columns, x_NV.amax(-1, keepdim=True).expand(-1, 3))


def _special(x_NV: Tensor, generator: torch.Generator) -> None:
    """A NaN, all -inf, single -inf (the first column, a label, among them), and rows left as they are."""
    vocab = x_NV.shape[1]
    x_NV[0::6, torch.randint(vocab, (), generator=generator, device=x_NV.device)] = torch.nan
    x_NV[1::6, : vocab // 2 : 3] = -torch.inf
    x_NV[2::6] = -torch.inf
    x_NV[3::6, vocab - 1] = -torch.inf


def _mask_regions(x_NV: Tensor, generator: torch.Generator) -> None:
    """Rows of which only the top 20 tokens, one token, the end or the start of the vocabulary are left."""
    vocab = x_NV.shape[1]
    kept = x_NV.topk(min(20, vocab), dim=-1).values[:, -1:]
    x_NV[0::4] = x_NV[0::4].masked_fill(x_NV[0::4] < kept[0::4], -torch.inf)
    x_NV[1::4, : vocab - 1] = -torch.inf
    x_NV[2::4, : vocab * 3 // 4] = -torch.inf
    x_NV[3::4, vocab // 4 + 1 :] = -torch.inf


class Arena:
    """Logits in the middle of memory filled with NaN, all of which is watched."""

    _shape: tuple[int, ...]
    _strides: tuple[int, ...]

    def __init__(self, case: Case, problem: Problem, device: torch.device) -> None:
        rows, step = case.rows, case.column_step
        stride = step * problem.vocab + case.strided
        stride += PADDING if problem.layout == "rows" or case.strided else 0
        self._case, self._offset = case, PADDING + (not problem.aligned or case.strided)
        self._shape, self._strides = (rows, problem.vocab), (stride, step)
        if problem.layout == "slice" and not case.strided and rows >= 4:
            # Two sequences, the last position of each left out, as in logits[:, :-1].
            self._shape, self._strides = (2, rows // 2, problem.vocab), ((rows // 2 + 1) * stride, stride, 1)
        size = self._offset + (rows + 2) * stride + PADDING
        self._memory = torch.full((size,), torch.nan, dtype=problem.dtype, device=device)
        self._before = self._memory.clone()

    @property
    def logits(self) -> Tensor:
        """[R, V], the same memory each time."""
        return self._logits_in(self._memory)

    def _logits_in(self, memory: Tensor) -> Tensor:
        return memory.as_strided(self._shape, self._strides, self._offset)

    def refill(self, generator: torch.Generator) -> None:
        """New values in the same memory."""
        rows, vocab = math.prod(self._shape[:-1]), self._shape[-1]
        x_NV = 3.0 * torch.randn(rows, vocab, generator=generator, device=self._memory.device)
        if rows and self._case.fill:
            self._case.fill(x_NV, generator)
        self.logits.copy_(x_NV.view(self._shape))
        self._before = self._memory.clone()

    def restore(self) -> None:
        """The logits as they were after `refill`."""
        self._memory.copy_(self._before)

    def logits_changed(self) -> bool:
        """Whether a bit of the logits is another since `refill`."""
        return not _same_memory(self.logits.contiguous(), self._logits_in(self._before).contiguous())

    def surroundings_changed(self) -> bool:
        """Whether a bit of the memory around the logits is another since `refill`."""
        memory = self._memory.clone()
        self._logits_in(memory).copy_(self._logits_in(self._before))
        return not _same_memory(memory, self._before)


def _same_memory(left: Tensor, right: Tensor) -> bool:
    """Whether two contiguous tensors of one dtype have the same bits, those of a NaN included."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.view(bits), right.view(bits))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether all numbers are equal in every bit, and NaN stands where NaN stands."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    if _same_memory(left.detach().contiguous(), right.detach().contiguous()):
        return True
    return _same_memory(*(x.detach().masked_fill(x.isnan(), torch.nan).contiguous() for x in (left, right)))


def alike(left: Tensor, right: Tensor) -> bool:
    """Whether all numbers are the same but for what is rounded, in half precision at worst."""
    return left.shape == right.shape and torch.allclose(left.float(), right.float(), 0.02, 0.02, equal_nan=True)


def labels_for(case: Case, logits: Tensor, problem: Problem, generator: torch.Generator) -> Tensor:
    """[R, K] labels for [R, V]: first those at the ends and at block edges, then random ones; some repeated, some
    ignored."""
    device, vocab, count, rows = generator.device, problem.vocab, problem.labels_per_row, logits.shape[:-1]
    labels = torch.randint(vocab, (*rows, count), generator=generator, device=device)
    sides = [edge + side for edge in BLOCK_EDGES for side in (-1, 0) if edge + side < vocab]
    order = 2 + torch.randperm(len(sides), generator=generator, device=device)
    edges = torch.tensor([0, vocab - 1, *sides], device=device)
    flat = labels.view(-1)
    used = min(len(edges), (len(flat) + 1) // 2)
    flat[:used] = torch.cat([edges[:2], edges[order]])[:used]
    if case.first_column_is_a_label:
        labels.view(-1, count)[1::2] = 0
    if case.largest_is_the_label:
        labels[..., 0] = logits.argmax(-1)
    if case.labels:
        drawn = torch.tensor(case.labels, device=device)
        flat.copy_(drawn[torch.arange(len(flat), device=device) % len(drawn)].clamp(max=vocab - 1))
    if count > 1:
        repeated = torch.rand(rows, generator=generator, device=device) < 0.3
        labels[..., 1][repeated] = labels[..., 0][repeated]
    ignored = torch.rand(rows, generator=generator, device=device) < case.ignored
    if case.ignored < 1.0 and ignored.numel():  # the ends are where mistakes are likely
        ignored.view(-1)[[0, -1]] = False
    labels[ignored] = case.ignore_index
    if 0.0 < case.ignored < 1.0 and len(flat) > 1:  # one at least; anywhere, so that no position goes unchecked
        flat[torch.randint(len(flat), (), generator=generator, device=device)] = case.ignore_index
    return labels
