"""Tables of what is stored, and of what an archive would bring."""

from collections.abc import Sequence

import pandas as pd

from compiled_logprobs.decision import short, winner_in_words
from compiled_logprobs.store.transfer import Imported
from compiled_logprobs_dashboard.frames import Frames, device_name
from compiled_logprobs_dashboard.looks import plain_line

FIRST = ["source", "device", "here", "decisions", "undecided", "stale", "measured_at", "torch", "triton", "environment"]


def stored(frames: Frames) -> pd.DataFrame:
    """A row a profile: how many decisions, how many of them undecided or stale, and the facts of its environment."""
    flags = frames.decisions.assign(stale=frames.decisions["stale"].notna(), undecided=~frames.decisions["is_decided"])
    counts = flags.groupby(["source", "environment"])[["stale", "undecided"]].sum().reset_index()
    table = frames.environments.merge(counts, on=["source", "environment"])
    return table[[*FIRST, *(name for name in table if name not in FIRST)]]


def imported(found: Sequence[Imported]) -> pd.DataFrame:
    """A row a decision of an archive, or of what else is in there: its fate and why, and what it is."""
    rows = [
        (
            entry.fate,
            "" if entry.decision is None else plain_line(device_name(entry.decision.environment), 80),
            plain_line(entry.environment or "", 40),
            plain_line(entry.name, 100) if entry.decision is None else short(entry.decision.problem),
            "" if entry.decision is None else plain_line(winner_in_words(entry.decision), 60),
            "" if entry.decision is None else entry.decision.measured_at,
            plain_line(entry.why),
        )
        for entry in found
    ]
    return pd.DataFrame(rows, columns=["fate", "device", "environment", "problem", "chosen", "measured_at", "why"])
