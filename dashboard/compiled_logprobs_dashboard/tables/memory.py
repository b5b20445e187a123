"""Tables of memory: what each backend takes beside the logits, what is the least, and the largest N that fits."""

import math
from typing import NamedTuple

import pandas as pd
import torch

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import environments
from compiled_logprobs.problem import Problem, bytes_of_results
from compiled_logprobs_dashboard.frames import Frames, Profile, Shape
from compiled_logprobs_dashboard.looks import plain_line
from compiled_logprobs_dashboard.tables.throughput import keys_along

COLUMNS = {
    "backend": str,
    **dict.fromkeys(("key", "rows", "vocab", "timed_rows"), "int64"),
    "chosen": bool,
    **dict.fromkeys(("extra_bytes", "extra_multiple", "least_bytes", "least_multiple", "logits_bytes"), float),
}
RULE = (
    "A call needs the logits and its extra memory at once. Both grow with N, so that the multiple that was measured "
    "at the largest N stands for a larger one: the largest N is what is free, divided by V times the bytes of a "
    "logit times (1 + that multiple), rounded down. What a model, its optimizer or other tensors hold has to be "
    "taken off before."
)
"""How `largest` reckons."""


class Capacity(NamedTuple):
    """The memory of a device."""

    bytes: float | None
    """None where it is not known."""
    source: str
    """Where the figure comes from, in words, or why there is none."""


def least_bytes(problem: Problem) -> int:
    """What every backend needs beside the logits: the results, and the gradient unless it goes over the logits."""
    results = problem.rows * bytes_of_results(problem)
    return results + (logits_bytes(problem) if problem.needs_grad and not problem.inplace_backward else 0)


def logits_bytes(problem: Problem) -> int:
    """Of the logits alone."""
    return problem.rows * problem.vocab * problem.dtype.itemsize


def memory(frames: Frames, profile: Profile, shape: Shape) -> tuple[pd.DataFrame, list[str]]:
    """Extra memory by N for the V, mode and dtype of `shape`: a row a decision and candidate, the columns of `COLUMNS`.

    Bytes are of the rows that were timed, `timed_rows`. A candidate whose memory was not measured has no row; the words
    that come second say which.
    """
    keys, dropped = keys_along(frames, profile, shape, "rows")
    left_out = [f"of {dropped + len(keys)} decisions, the {len(keys)} nearest are shown"] if dropped else []
    rows = []
    for key in keys:
        try:
            decision = frames.decision(key)
        except ProfileError as error:
            left_out.append(plain_line(error))
            continue
        timed = decision.timed
        logits, least = logits_bytes(timed), least_bytes(timed)
        for name, candidate in decision.candidates.items():
            if candidate.measured_at is not None and timed != decision.problem:
                left_out.append(
                    f"{plain_line(name, 40)} at N {decision.problem.rows}: measured earlier, with unknown rows"
                )
                continue
            if candidate.extra_bytes is None or candidate.extra_multiple is None:
                if candidate.measured:
                    left_out.append(f"{plain_line(name, 40)} at N {decision.problem.rows}: its memory was not measured")
                continue
            rows.append(
                {
                    "backend": name,
                    "key": key,
                    "rows": decision.problem.rows,
                    "vocab": decision.problem.vocab,
                    "timed_rows": timed.rows,
                    "chosen": name == decision.chosen,
                    "extra_bytes": float(candidate.extra_bytes),
                    "extra_multiple": candidate.extra_multiple,
                    "least_bytes": float(least),
                    "least_multiple": least / logits,
                    "logits_bytes": float(logits),
                }
            )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS), left_out


def capacity(frames: Frames, profile: Profile) -> Capacity:
    """The device's memory: what the profile says, else this machine's if it is the same environment."""
    facts = frames.facts(profile)
    known = facts.get("memory_bytes")
    if known is not None and known > 0:
        return Capacity(float(known), "as the profile says of its device")
    here = next((one for one in environments() if one.fingerprint() == profile.environment), None)
    if here is not None and here.memory_bytes:
        return Capacity(float(here.memory_bytes), "of this machine, which is the profile's environment")
    return Capacity(None, "not known: the profile does not say, and this machine is another environment")


def largest(points: pd.DataFrame, vocab: int, itemsize: int, free: float | None) -> pd.DataFrame:
    """The largest N that fits into `free` bytes, a row a backend; see `RULE`.

    Returns:
        backend, multiple (of the logits, extra), at_rows (where that was measured), largest_rows (NaN where `free` is
        not known), extrapolated (is it above what was measured).
    """
    rows = []
    for name, part in points.groupby("backend", sort=False):
        last = part.loc[part["timed_rows"].idxmax()]
        row_bytes = vocab * itemsize * (1.0 + max(0.0, last["extra_multiple"]))
        fits = math.nan if free is None else float(max(0, math.floor(free / row_bytes)))
        rows.append(
            {
                "backend": name,
                "multiple": last["extra_multiple"],
                "at_rows": int(last["timed_rows"]),
                "largest_rows": fits,
                "extrapolated": bool(fits > last["timed_rows"]),
            }
        )
    columns = {"backend": str, "multiple": float, "at_rows": "int64", "largest_rows": float, "extrapolated": bool}
    found = pd.DataFrame(rows, columns=list(columns)).astype(columns)
    return found.sort_values("multiple", kind="stable", ignore_index=True)


def in_words(points: pd.DataFrame) -> str:
    """What the bars of one decision show."""
    if points.empty:
        return "No extra memory was measured here."
    parts = [
        f"{plain_line(row.backend, 40)} {row.extra_bytes / 2**20:,.0f} MiB ({row.extra_multiple:.2f} x logits)"
        for row in points.sort_values("extra_bytes").itertuples()
    ]
    least = points["least_bytes"].iloc[0] / 2**20
    return f"Extra memory: {', '.join(parts)}. The least possible: {least:,.0f} MiB."


def itemsize_of(dtype: str) -> int:
    """Bytes of a logit."""
    return int(getattr(torch, dtype).itemsize)
