"""What `compiled` gives to torch.compile: the formula in the form that suits a device, and what is dynamic in it.

* On a CPU `formula.forward` and `formula.backward`.
* On a GPU, forward, `forward_in_blocks` where a row is longer than a block: two kernels, of which the first reads the
  logits, once, and the second combines a few numbers a block and finishes. The other form makes two loops over the row,
  and a row rarely stays in a GPU's cache until the second. Inductor's online softmax would read once as well, without
  the entropy, but with two exponentials a logit: an H100 has 132 SMs with 16 a clock each, and at the 1.5e12 logits a
  second that its memory brings in bfloat16 two of them take 81 % of these units, one 40 %.
* On a GPU, backward, `gradient` for one label a row, a single kernel over tiles of a row; for several,
  `formula.backward` and a write to the label columns. On a CPU the comparison of each column with the label would cost
  more than that write.

Numbers go in as 0-d tensors on the CPU: a constant would be compiled for each value, and Inductor hands them to a GPU's
kernel as arguments, without a copy or a fill.

Shapes: N rows, M rows of memory, V vocabulary, K labels a row.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.arguments import find_private
from compiled_logprobs.operation import formula
from compiled_logprobs.operation.contract import (
    Inputs,
    Results,
    Upstream,
    Wanted,
    clean,
    clean_upstream,
    finish,
    weight_of_all,
)
from compiled_logprobs.operation.formula import BLOCK, LN_2, LOG2_E, finite, per_row
from compiled_logprobs.problem import Layout

BLOCKS_TO_COMPILE_FOR = 1024
"""How many blocks Inductor is told of on a GPU, whatever N comes first.

It chooses between kernels by this number. From 64 a multiprocessor on, of which an A100 has 108, it no longer looks at
strides, takes the blocks for scattered, and loads each twice. From 1024 on it finds one warp enough for a block, and
offers just that to its autotuner. In between, every N has the same kernel, and one that reads once.
"""
TILE = 1024
"""Elements of a pointwise kernel's tile on a GPU. Inductor is told of as many rows as it has, but of two at least, so
that tiles are long, and no higher than they have to be."""


@cache
def options() -> dict[str, Any]:
    """Of Inductor on a GPU.

    To choose between configurations it would run each at the first call, and copy the logits before each run of a
    kernel that writes over them; and two processes could choose configurations that sum in another order. Tiles of rows
    by columns load what belongs to a row once a tile, where a flat kernel divides by V and loads it for every logit.
    """
    asked = {"triton.autotune_pointwise": False, "triton.prefer_nd_tiling": True}
    has_deterministic = find_private("torch._inductor.config.deterministic", None) is not None
    return {**asked, "deterministic": True} if has_deterministic else asked


class Key(NamedTuple):
    """What a compiled function is specialised on."""

    device_type: str
    vocab: int
    dtype: torch.dtype
    labels_per_row: int
    per_token_temperature: bool
    layout: Layout
    aligned: bool
    """On an accelerator: whether the row strides are multiples of 16, as Triton has to know to load 16 bytes at a time,
    and memory starts at a multiple of 16 bytes."""
    starts_aligned: bool
    """Inductor copies a misaligned input on an accelerator, unless it saw a misaligned one when it compiled."""

    @property
    def reads_blocks(self) -> bool:
        """Whether forward reads the logits in blocks; a row no longer than one needs no second level."""
        return self.device_type != "cpu" and self.vocab > BLOCK

    @property
    def in_one_pass(self) -> bool:
        """Whether backward writes the label columns with all others."""
        return self.device_type != "cpu" and self.labels_per_row == 1


class RowMap(NamedTuple):
    """Where the rows of a slice lie: row n is row n * step + (n // length) * skip of memory. 0-d tensors on the CPU."""

    step: Tensor
    skip: Tensor
    inverse_length: Tensor
    """float32, and a product in place of a division: by a 64-bit number that would take longer than all the rest."""


ROWS_TO_MAP = 2**21
"""Up to which the product is rounded down to what the division would give."""


def map_rows(logits: Tensor) -> tuple[Tensor, RowMap] | None:
    """A slice [A, S, V] as the rows [M, V] that its memory holds, and where its own are among them; None where its
    strides are no multiples of one row, or it has several outer dimensions."""
    if logits.ndim != 3 or logits.shape[:-1].numel() > ROWS_TO_MAP:
        return None
    outer, inner = logits.stride()[:-1]
    pitch = min(outer, inner)
    if pitch < logits.shape[-1] or max(outer, inner) % pitch:
        return None
    sequences, length = logits.shape[:-1]
    outer, inner = outer // pitch, inner // pitch
    memory_rows = (sequences - 1) * outer + (length - 1) * inner + 1
    memory = logits.as_strided((memory_rows, logits.shape[-1]), (pitch, 1))
    numbers = number(inner, torch.int32), number(outer - length * inner, torch.int32), number(1 / length)
    return memory, RowMap(*numbers)


@lru_cache(maxsize=1024)
def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """`value` as compiled code takes it. Nobody writes to it, and a CPU has no streams: it can be had again."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype)


_CHECK = getattr(torch, "_check", None)
_INDEX = getattr(torch.ops.aten, "_unsafe_index", torch.ops.aten.index)


def forward_function(key: Key, wanted: Wanted) -> Callable[..., tuple[Tensor | None, ...]]:
    """What is compiled for the forward pass; it returns what `Results` holds."""

    def forward(
        logits: Tensor,
        labels: Tensor,
        temperature: Tensor,
        ignore_index: Tensor,
        step: Tensor | None = None,
        skip: Tensor | None = None,
        inverse_length: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        inputs = Inputs(_with_its_strides(logits, key), labels, temperature, ignore_index)  # type: ignore[arg-type]
        if key.reads_blocks:
            return tuple(forward_in_blocks(inputs, wanted, _rows(labels, step, skip, inverse_length)))
        return tuple(formula.forward(inputs, wanted))

    return forward


def backward_function(key: Key, inplace: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    """What is compiled for backward: it returns the gradient, unless that goes into `out` or over the logits; and,
    where label columns are written afterwards, what belongs there and at which elements of the gradient."""

    def backward(
        logits: Tensor,
        labels: Tensor,
        temperature: Tensor,
        ignore_index: Tensor,
        stats: Tensor,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None = None,
        grad_logsumexp: Tensor | None = None,
        logits_at_labels: Tensor | None = None,
        out: Tensor | None = None,
        step: Tensor | None = None,
        skip: Tensor | None = None,
        inverse_length: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        inputs = Inputs(_with_its_strides(logits, key), labels, temperature, ignore_index)  # type: ignore[arg-type]
        upstream = Upstream(grad_log_probs, grad_entropy, grad_logsumexp)
        values = positions = None
        whole: Tensor | None
        if key.in_one_pass:
            whole = gradient(inputs, stats, upstream, _rows(labels, step, skip, inverse_length))
        else:
            whole, values, columns = formula.backward(inputs, stats, upstream, logits_at_labels)
            rows = torch.arange(labels.shape[:-1].numel(), device=labels.device).view(*labels.shape[:-1], 1)
            positions = rows * key.vocab + columns
        target = logits if inplace else out
        if target is not None:
            target.copy_(whole)
            whole = None
        return whole, values, positions

    return backward


def _with_its_strides(logits: Tensor, key: Key) -> Tensor:
    """`logits`, and the compiler told what it cannot see of their strides."""
    if _CHECK is not None and key.aligned and not logits.is_contiguous() and key.device_type != "cpu":
        for stride in logits.stride()[:-1]:
            _CHECK(stride % 16 == 0)
    return logits


def _rows(labels: Tensor, step: Tensor | None, skip: Tensor | None, inverse_length: Tensor | None) -> Tensor | None:
    """The row of memory of each row, int32; None where they are the same."""
    if step is None or skip is None or inverse_length is None:
        return None
    n = torch.arange(labels.shape[0], dtype=torch.int32, device=labels.device)
    return n * step + ((n + 0.5) * inverse_length).to(torch.int32) * skip


def forward_in_blocks(inputs: Inputs, wanted: Wanted, rows: Tensor | None = None) -> Results:
    """As `formula.forward`, in two levels: each block of `BLOCK` columns by itself, then the blocks of a row together.

    With B a block, m_B its maximum and d_B = (x - m_B) / T:

        s_B = sum_B exp(d_B)                       w_B = exp((m_B - m) / T) <= 1
        q_B = sum_B exp(d_B) d_B <= 0              s   = sum_B w_B s_B
        sum_v exp(d_v) d_v = sum_B w_B (q_B + s_B (m_B - m) / T)

    All terms of a sum have one sign, so that nothing cancels here either. The logits are read once, whatever is wanted,
    and each costs one exponential: a sum that follows a running maximum through the row costs two. What the first level
    leaves for the second is two to five numbers a block. Exponents are in bits, for exp2 is a GPU's own instruction.

    Args:
        inputs: as `formula.forward` takes them.
        wanted: what to return beside the log-probabilities.
        rows: [N] int32: which row of the logits, [M, V], is that of each label; None where they are the same.
    """
    logits, checked = inputs.logits, clean(inputs)
    x = logits if rows is None else _INDEX(logits, [rows])
    x = x.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    t = per_row(checked.temperature)
    bits = LOG2_E / t
    vocab = x.shape[-1]
    blocks = -(-vocab // BLOCK)
    if vocab % BLOCK:
        # No copy: it is fused, as a load with a mask.
        x = torch.nn.functional.pad(x, (0, blocks * BLOCK - vocab), value=-torch.inf)
    x = x.view(*x.shape[:-1], blocks, BLOCK)
    block_m = x.amax(-1, keepdim=True)
    # A block that is all -inf has the sum 0; subtracting its maximum would make that NaN. Its weight is 0, too, unless
    # the row is all -inf: there the subtraction of m, below, gives the NaN that is due.
    d = (x - block_m.masked_fill(block_m == -torch.inf, 0.0)) * per_row(bits)
    e = d.exp2()
    block_s = e.sum(-1)
    first = None
    if wanted.argmax:
        places = torch.arange(BLOCK, dtype=torch.int32, device=x.device)
        first = torch.where(x == block_m, places, BLOCK).amin(-1)
    block_m = block_m.squeeze(-1)
    m = block_m.amax(-1, keepdim=True)
    shift = (block_m - m) * bits
    weight = shift.exp2()
    # A choice after the product keeps the compiler from fusing it with the sum, with another rounding, in one kernel
    # and not in another: bits are to be the same whatever is wanted.
    weighted_s = torch.where(weight == 0.0, 0.0, weight * block_s)
    s = weighted_s.sum(-1)
    log_s = s.log()
    log_probs = (_at(logits, checked.labels, rows).to(m.dtype) - m) / t - log_s.unsqueeze(-1)
    entropy = sum_p_squared = None
    if wanted.entropy:
        block_q = (e * finite(d)).sum(-1)
        entropy = log_s - (weight * block_q + weighted_s * finite(shift)).sum(-1) * LN_2 / s
    if first is not None:
        starts = torch.arange(0, blocks * BLOCK, BLOCK, dtype=torch.int32, device=x.device)
        first = torch.where(block_m == m, first + starts, vocab).amin(-1).to(torch.int64)
    if wanted.sum_p_squared:
        sum_p_squared = (weight * weight * (e * e).sum(-1)).sum(-1) / s / s
    return finish(checked, wanted, log_probs, m.squeeze(-1), log_s, entropy, first, sum_p_squared)


def gradient(inputs: Inputs, stats: Tensor, upstream: Upstream, rows: Tensor | None = None) -> Tensor:
    """The gradient in the logits, [..., V] in their dtype, in one pointwise pass for one label a row.

    A GPU waits for memory here, and compares each column with the label meanwhile. `rows` as in `forward_in_blocks`.
    """
    logits, checked = inputs.logits, clean(inputs)
    upstream = clean_upstream(checked, upstream)
    m, log_s, *entropy = stats.unsqueeze(-1).unbind(0)
    inverse_t = 1.0 / per_row(checked.temperature)
    x = logits if rows is None else _INDEX(logits, [rows])
    log2_p = (x.to(m.dtype) - m) * (inverse_t * LOG2_E) - log_s * LOG2_E
    weight = weight_of_all(upstream)
    if upstream.entropy is not None:
        weight = weight + upstream.entropy.unsqueeze(-1) * (finite(log2_p) * LN_2 + entropy[0])
    columns = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    at_label = torch.where(columns == checked.labels.to(torch.int32), upstream.log_probs, 0.0)
    whole = (at_label - log2_p.exp2() * weight) * inverse_t
    return whole.masked_fill(checked.dropped.unsqueeze(-1), 0.0).to(logits.dtype)


def _at(logits: Tensor, labels: Tensor, rows: Tensor | None) -> Tensor:
    """`logits` [..., V] at `labels` [..., K], which are in range: unlike gather, compiled without an assertion on the
    device."""
    leading = [torch.arange(n, device=labels.device) for n in labels.shape[:-1]] if rows is None else [rows]
    places = torch.meshgrid(*leading, indexing="ij")
    picked: Tensor = _INDEX(logits, [*(each.unsqueeze(-1) for each in places), labels])
    return picked


def mark(arguments: Mapping[str, Tensor], hints: list[int] | None) -> None:
    """Tell the compiler that all dimensions of rows are dynamic, and of which sizes it is told in place of theirs.

    A call that is not marked and recompiles, for whatever reason, would compile N as a constant.
    """
    leading = arguments["logits"].ndim - 1
    for name, argument in arguments.items():
        first = int(name == "stats")  # whose own dimension comes first
        for dimension in range(leading if argument.ndim else 0):
            if hints is not None and takes_hints():
                torch._dynamo.mark_dynamic(argument, first + dimension, hint_override=hints[dimension])
            else:
                torch._dynamo.mark_dynamic(argument, first + dimension)


def hints_for(key: Key, logits: Tensor, direction: str) -> list[int] | None:
    """Sizes of the leading dimensions for Inductor to compile for, in place of the first ones that come."""
    leading = logits.ndim - 1
    if key.device_type == "cpu" or (direction == "forward" and not key.reads_blocks):
        return None
    if direction == "backward":
        return [2] * (leading - 1) + [max(2, TILE // key.vocab)]
    blocks = -(-key.vocab // BLOCK)
    outer = [2] * (leading - 1)
    return [*outer, max(2, -(-BLOCKS_TO_COMPILE_FOR // (blocks * 2 ** len(outer))))]


def takes_hints() -> bool:
    """Whether torch can be told of sizes that it is not called with; torch 2.8 and older cannot."""
    return "hint_override" in parameters(torch._dynamo.mark_dynamic)


@cache
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names of what `function` takes, which differ between releases of torch."""
    return frozenset(inspect.signature(function).parameters)
