"""Profiles that come from elsewhere: checked as `compiled-logprobs import` checks them, shown, and then stored by its code.

A file's name is never used: where a decision goes follows from its environment and problem.
"""

from collections.abc import Sequence
from io import BytesIO

import pandas as pd

from compiled_logprobs.cli.output import short
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.store.archive import Merged, export, merge, plan, read_archive
from compiled_logprobs.store.files import Entry, Store
from compiled_logprobs_dashboard.facts import device_name
from compiled_logprobs_dashboard.looks import plain_line

MOST_BYTES = 8 * 2**20
"""Of a file; larger ones are for the command line."""


def read(content: bytes) -> list[Entry]:
    """The decisions in an archive. Nothing is stored. Raises ProfileError, which says what is wrong with it."""
    if len(content) > MOST_BYTES:
        raise ProfileError(
            f"got {len(content)} bytes; at most {MOST_BYTES} are valid here. `compiled-logprobs import` takes larger archives; "
            "`export --environment` makes smaller ones."
        )
    return read_archive(BytesIO(content))


def foreseen(store: Store, entries: Sequence[Entry]) -> pd.DataFrame:
    """What storing would do, as things stand: one row a decision."""
    return in_rows(plan(store, entries))


def take(store: Store, entries: Sequence[Entry]) -> pd.DataFrame:
    """Store `entries`, all or, on an error, none, and say what became of each. Raises ProfileError if they cannot be stored."""
    return in_rows(merge(store, entries))


def in_rows(merged: Sequence[Merged]) -> pd.DataFrame:
    """Fate, device, environment, problem, chosen, measured_at and why of each decision."""
    return pd.DataFrame(
        [
            {
                "fate": one.fate,
                "device": plain_line(device_name(one.entry.facts), 80),
                "environment": one.entry.environment,
                "problem": short(one.entry.problem),
                "chosen": plain_line(one.entry.record["chosen"], 60),
                "measured_at": one.entry.record["measured_at"],
                "why": one.why,
            }
            for one in merged
        ],
        columns=["fate", "device", "environment", "problem", "chosen", "measured_at", "why"],
    )


def archive_of(store: Store, environment: str, *, evidence: bool) -> tuple[bytes, list[str]]:
    """The archive of one profile as `compiled-logprobs export` writes it, and why decisions were left out of it.

    Raises ProfileError if there is nothing to export, or too much.
    """
    target = BytesIO()
    done = export(store, target, environments=[environment], evidence=evidence)
    return target.getvalue(), done.left_out
