"""Whether rows have the same bits whatever N they came with: recorded of all, demanded of a backend that declares it.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from compiled_logprobs.check.calls import Subject, call_once
from compiled_logprobs.check.cases import Case, fill_nothing
from compiled_logprobs.check.report import Notes
from compiled_logprobs.check.verdicts import CaseInputs, Results, Yardstick, judge, make_inputs, same_bits
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.machine.clock import free_memory
from compiled_logprobs.problem import Problem, bucket, collapse, layout_of

INVARIANCE_ELEMENTS = 2**24
"""Logits of the input with many rows, unless a quarter of the free memory holds less."""
BYTES_OF_MANY = 65
"""What it takes for each of these logits, the comparison with float64 included (measured with eager on a CPU)."""


def check_many_rows(
    subject: Subject, problem: Problem, yardstick: Yardstick, notes: Notes, generator: torch.Generator
) -> None:
    """Compare few rows with as many as the bucket has, or as time and memory allow: kernels change with N."""
    free = free_memory(generator.device)
    most = INVARIANCE_ELEMENTS if free is None else min(INVARIANCE_ELEMENTS, free // (4 * BYTES_OF_MANY))
    rows = min(bucket(problem).rows, max(1, most // problem.vocab))
    case = Case(f"{rows} rows, all and some", rows, fill_nothing, ignored=0.0)
    inputs = make_inputs(case, problem._replace(needs_grad=False, inplace_backward=False), yardstick, generator)
    notes.begin(case)
    whole = call_once(subject, inputs, notes, with_gradient=False)
    judge(inputs, whole, notes)
    count = len(inputs.arena.logits)
    check_rows_alone(subject, inputs, whole, (1, 2, 7, 64, count // 2, count - 1), notes)


def check_rows_alone(subject: Subject, inputs: CaseInputs, whole: Results, counts: Iterable[int], notes: Notes) -> None:
    """Whether the first rows alone have the bits that they have among all, in `whole`."""
    logits, labels, t = inputs.arena.logits, inputs.labels, inputs.temperature
    whole = whole.copied()
    for count in sorted({count for count in counts if 0 < count < len(logits)}):
        try:
            part = subject(logits[:count], labels[:count], t[:count] if isinstance(t, Tensor) else t, inputs.problem)
        except (Exception, SystemExit) as error:  # whatever a backend raises is its verdict
            if nothing_can_serve_after(error):
                raise
            notes.require("runs", False, f"{count} of the rows alone: {type(error).__name__}: {error}")
        parts: tuple[Tensor, ...] = (part,) if isinstance(part, Tensor) else tuple(part)
        same = same_bits(parts[0], whole.log_probs[:count])
        if whole.entropy is not None and len(parts) > 1:
            same = same and same_bits(parts[1], whole.entropy[:count])
        notes.rows_alone.append(same)
        # A single row of strided ones lies as if it were contiguous: another problem, and perhaps another kernel.
        if subject.row_invariant and layout_of(collapse(logits[:count])) == layout_of(collapse(logits)):
            notes.add("row_invariance", same, f"the first {count} of {len(logits)} rows have other bits alone")
