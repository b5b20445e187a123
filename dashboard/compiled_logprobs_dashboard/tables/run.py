"""Tables of what a run has found so far."""

import statistics
from collections.abc import Sequence

import pandas as pd

from compiled_logprobs.cli.output import short
from compiled_logprobs.decision import Decision
from compiled_logprobs.problem import mode_name, short_name
from compiled_logprobs_dashboard.following import Loss
from compiled_logprobs_dashboard.looks import plain_line


def standings(found: Sequence[Decision]) -> pd.DataFrame:
    """A row for each backend, the one that won most often first.

    The speed-up is the median of the problems in which it was timed, whose number stands beside it: these differ by backend.
    """
    rows = []
    for name in dict.fromkeys(name for one in found for name in one.candidates):
        candidates = [(one, one.candidates[name]) for one in found if name in one.candidates]
        speedups = [candidate.speedup.median for _, candidate in candidates if candidate.speedup is not None]
        rows.append(
            {
                "backend": plain_line(name),
                "won": sum(one.chosen == name for one, _ in candidates),
                "timed": sum(candidate.measured for _, candidate in candidates),
                "did not get through": sum(
                    not candidate.measured and candidate.outcome not in ("unavailable", "unsupported")
                    for _, candidate in candidates
                ),
                "cannot run it": sum(
                    candidate.outcome in ("unavailable", "unsupported") for _, candidate in candidates
                ),
                "median speed-up over the baseline": statistics.median(speedups) if speedups else None,
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values(["won", "timed"], ascending=False, kind="stable", ignore_index=True) if rows else table


def decided(found: Sequence[Decision]) -> pd.DataFrame:
    """A row for each problem, the latest first, as `compiled-logprobs profile` prints it."""
    return pd.DataFrame(
        {
            "rows": one.problem.rows,
            "vocabulary": one.problem.vocab,
            "timed rows": one.measured_rows,
            "dtype": short_name(one.problem.dtype),
            "mode": mode_name(one.problem),
            "winner": plain_line(one.chosen),
            "speed-up over the baseline": "" if one.winner.speedup is None else str(one.winner.speedup),
            "a call, ms": None if one.winner.seconds is None else 1e3 * one.winner.seconds,
            "extra memory, MiB": None if one.winner.extra_bytes is None else one.winner.extra_bytes / 2**20,
            "sign check": f"{one.winner.checks_passed} of {len(one.winner.checks)}"
            if one.winner.checks
            else "not stored",
        }
        for one in reversed(found)
    )


def losses(found: Sequence[Loss]) -> pd.DataFrame:
    """A row for each problem without a decision, and for each backend that failed."""
    return pd.DataFrame(
        {
            "problem": "" if one.problem is None else short(one.problem),
            "backend": "all" if one.backend is None else plain_line(one.backend),
            "outcome": plain_line(one.outcome),
            "reason": plain_line(one.reason),
        }
        for one in found
    )
