"""What the dashboard's tables hold: a decision as one row, each of its candidates as one more.

Names and figures are those of `records.Decision` and `records.Candidate`. A figure that was not measured is null, never 0.
"""

from typing import Any

import pyarrow as pa

from compiled_logprobs.cli.output import short
from compiled_logprobs.decision import Decision
from compiled_logprobs.problem import mode_name, short_name

_TEXT, _FLAG, _COUNT, _FIGURE = pa.string(), pa.bool_(), pa.int64(), pa.float64()

DECISIONS = pa.schema(
    {
        "environment": _TEXT,
        "file": _TEXT,
        "problem": _TEXT,
        "device_type": _TEXT,
        "mode": _TEXT,
        "rows": _COUNT,
        "vocab": _COUNT,
        "dtype": _TEXT,
        "out_dtype": _TEXT,
        "needs_grad": _FLAG,
        "entropy": _FLAG,
        "labels_per_row": _COUNT,
        "temperature": _TEXT,
        "masked_logits": _FLAG,
        "inplace_backward": _FLAG,
        "layout": _TEXT,
        "aligned": _FLAG,
        "chosen": _TEXT,
        "baseline": _TEXT,
        "code": _TEXT,
        "reason": _TEXT,
        "measured_at": _TEXT,
        "measured_rows": _COUNT,
        "proven_rows": _COUNT,
        "checked_rows": _COUNT,
        "rounds": _COUNT,
        "settled": _FLAG,
        "short_check": _FLAG,
        "tuning_seconds": _FIGURE,
        "bandwidth_read": _FIGURE,
        "bandwidth_copy": _FIGURE,
        "bandwidth_in_place": _FIGURE,
    }
)

CANDIDATES = pa.schema(
    {
        "number": _COUNT,  # of the row of its decision
        "backend": _TEXT,
        "outcome": _TEXT,
        "reason": _TEXT,
        "chosen": _FLAG,
        "speedup_low": _FIGURE,
        "speedup": _FIGURE,
        "speedup_high": _FIGURE,
        "seconds": _FIGURE,
        "first_call_seconds": _FIGURE,
        "extra_bytes": _FIGURE,
        "extra_multiple": _FIGURE,
        "percent_of_bandwidth": _FIGURE,
        "checks_passed": _COUNT,
        "checks_total": _COUNT,
        "worst_error": _FIGURE,
        "repeatable": _FLAG,
        "row_invariant": _FLAG,
        "measured_at": _TEXT,
        "fingerprint": _TEXT,
    }
)


def decision_row(environment: str, file: str, decision: Decision) -> dict[str, Any]:
    """The row of `decision`, by the columns of `DECISIONS`."""
    problem = decision.problem
    return {
        "environment": environment,
        "file": file,
        "problem": short(problem),
        "mode": mode_name(problem),
        **problem._asdict(),
        "dtype": short_name(problem.dtype),
        "out_dtype": short_name(problem.out_dtype),
        **{name: getattr(decision, name) for name in _OF_DECISION},
        **{f"bandwidth_{kind}": decision.bandwidth.get(kind) for kind in ("read", "copy", "in_place")},
    }


def candidate_rows(number: int, decision: Decision) -> list[dict[str, Any]]:
    """A row for each candidate, by the columns of `CANDIDATES`; `number` is that of the decision's row."""
    return [
        {
            "number": number,
            "backend": name,
            "chosen": name == decision.chosen,
            "speedup": None if one.speedup is None else one.speedup.median,
            "speedup_low": None if one.speedup is None else one.speedup.low,
            "speedup_high": None if one.speedup is None else one.speedup.high,
            "checks_passed": one.checks_passed,
            "checks_total": len(one.checks),
            "measured_at": one.measured_at or decision.measured_at,
            **{field: getattr(one, field) for field in _OF_CANDIDATE},
            "extra_bytes": None if one.extra_bytes is None else float(one.extra_bytes),  # a foreign one may have 2^62
        }
        for name, one in decision.candidates.items()
    ]


_OF_DECISION = (
    *("chosen", "baseline", "code", "reason", "measured_at", "measured_rows", "proven_rows", "checked_rows"),
    *("rounds", "settled", "short_check", "tuning_seconds"),
)
_OF_CANDIDATE = (
    *("outcome", "reason", "seconds", "first_call_seconds", "extra_multiple", "percent_of_bandwidth"),
    *("worst_error", "repeatable", "row_invariant", "fingerprint"),
)


def table_of(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """`rows` as a table of `schema`."""
    return pa.Table.from_pylist(rows, schema)
