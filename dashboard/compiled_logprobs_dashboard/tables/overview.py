"""All decisions of a profile: a row each, what is wrong, how the backends fare, and who wins where."""

import math
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pandas as pd

from compiled_logprobs.backends import EAGER
from compiled_logprobs.decision import MEASURED
from compiled_logprobs.tuning.presets import MODELS
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import days_since, plural, significant, times
from compiled_logprobs_dashboard.looks import UNDECIDED, WRONG, plain_line

SIGNS = ("log_prob_sign", "gradient_sign", "entropy_sign")
"""The checks that are told before all others."""
STATES = ("wrong", "undecided", "stale", "fine")
FAINTEST, FULL_AT = 0.35, 2.0
"""Opacity of a margin of none; the margin, as a ratio of times, from which a square is drawn in full."""
MOST_ROWS, MOST_VOCABS, MOST_MAPS = 12, 12, 8
"""Of squares a side, and of maps, that can still be told apart."""


def by_gravity(names: Iterable[str]) -> list[str]:
    """Checks, those of signs first."""
    return sorted(names, key=lambda name: (SIGNS.index(name) if name in SIGNS else len(SIGNS), name))


# What is wrong


def wrong(frames: Frames, profile: Profile) -> pd.DataFrame:
    """A row a backend that failed a check in a decision: backend, decisions (that it failed in), checks, has_sign."""
    failed = frames.candidates_of(profile)
    failed, rows = failed[failed["is_wrong"]], []
    for backend, part in failed.groupby("backend"):
        checks = by_gravity({name for names in part["failed"] for name in names})
        rows.append((backend, len(part), checks, bool(set(checks) & set(SIGNS))))
    table = pd.DataFrame(rows, columns=["backend", "decisions", "checks", "has_sign"])
    return table.sort_values(["has_sign", "decisions"], ascending=False, kind="stable", ignore_index=True)


def wrong_in_words(found: pd.DataFrame, decisions: int) -> str:
    """The banner's sentence: who is wrong, in how many decisions, and by which checks."""
    parts = []
    for row in found.head(4).itertuples():
        checks = ", ".join(row.checks[:3]) + (f" and {len(row.checks) - 3} more" if len(row.checks) > 3 else "")
        kind, told = "WRONG SIGN" if row.has_sign else "WRONG", f" ({checks})" if checks else ""
        name = plain_line(row.backend, 40)
        parts.append(f"{name}: {kind} in {row.decisions:,} of {plural(decisions, 'decision')}{told}")
    return "; ".join([*parts, *([f"{len(found) - 4} more backends"] if len(found) > 4 else [])])


# All decisions


def decisions(frames: Frames, profile: Profile) -> pd.DataFrame:
    """A row a decision, what is wrong first, then what is undecided or stale.

    Returns:
        key, is (a list of `STATES`), N, V, dtype, mode, winner, speed-up (over eager) with low and high, over plain
        (log_softmax), ms, memory (multiple of the logits), roof (per cent), check, age (days), stale (why).
    """
    table, candidates = frames.of(profile), frames.candidates_of(profile)
    of_chosen = table[["key"]].join(candidates[candidates["chosen"]].set_index("key"), on="key")
    told: dict[int, str] = {}
    for row in candidates[candidates["is_wrong"]].itertuples():
        words = f"{plain_line(row.backend, 40)}: {', '.join(by_gravity(row.failed)) or 'see its cause'}"
        told[row.key] = f"{told[row.key]}; {words}" if row.key in told else f"{WRONG} {words}"
    passed = of_chosen["passed"].map(lambda names: f"✓ {len(names)} of {len(names)}" if names else "not stored")
    is_open, over_eager = ~table["is_decided"], (table["baseline"] == EAGER) & table["is_decided"]
    flags = zip(table["key"].isin(told), is_open, table["stale"].notna(), strict=True)
    states = [[word for word, is_so in zip(STATES, so, strict=False) if is_so] or ["fine"] for so in flags]
    result = pd.DataFrame(
        {
            "key": table["key"],
            "is": pd.Series(states, table.index, dtype=object),
            "N": table["rows"],
            "V": table["vocab"],
            "dtype": table["dtype"],
            "mode": table["mode"],
            "winner": table["chosen"].map(lambda name: plain_line(name, 40)).mask(is_open, UNDECIDED),
            "check": [told.get(key, words) for key, words in zip(table["key"], passed, strict=True)],
            "speed-up": of_chosen["ratio"].where(over_eager),
            "low": of_chosen["ratio_low"].where(over_eager),
            "high": of_chosen["ratio_high"].where(over_eager),
            "over plain": of_chosen["speedup"].where((table["against"] != table["baseline"]) & ~is_open),
            "ms": significant(of_chosen["seconds"] * 1e3),
            "memory": of_chosen["extra_multiple"],
            "roof": of_chosen["percent_of_bandwidth"],
            "age": days_since(table["measured_at"], datetime.now(timezone.utc)),
            "stale": table["stale"],
        }
    )
    result["order"] = [STATES.index(words[0]) for words in states]
    columns = ["order", "mode", "dtype", "V", "N"]
    return result.sort_values(columns, kind="stable", ignore_index=True).drop(columns="order")


def facets(table: pd.DataFrame) -> dict[str, tuple[str, Any]]:
    """By what `decisions` can be filtered: from words to a column and its value."""
    found: dict[str, tuple[str, Any]] = {word: ("is", word) for word in STATES}
    for column, before in (("dtype", ""), ("mode", ""), ("winner", "winner ")):
        found |= {f"{before}{value}": (column, value) for value in table[column].unique()}
    names = {vocab: f" ({name})" for name, vocab in MODELS.items()}
    return found | {f"V {vocab}{names.get(vocab, '')}": ("V", vocab) for vocab in sorted(table["V"].unique())}


def filtered(table: pd.DataFrame, asked: list[str]) -> pd.DataFrame:
    """The rows that have one of the asked values in each column that something is asked of."""
    known = facets(table)
    by_column: dict[str, list[Any]] = {}
    for column, value in (known[words] for words in asked if words in known):
        by_column.setdefault(column, []).append(value)
    for column, values in by_column.items():
        has = [bool({*words} & {*values}) for words in table["is"]] if column == "is" else table[column].isin(values)
        table = table[pd.Series(has, table.index, dtype=bool)]
    return table.reset_index(drop=True)


def figures(frames: Frames, profile: Profile, table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """The decisions in `table` in a few figures: label, value and meaning of each."""
    candidates = frames.candidates_of(profile)
    checked = candidates[candidates["key"].isin(table["key"]) & _is_checked(candidates)]
    decided = table[table["winner"] != UNDECIDED]
    passed, worst = int((~checked["is_wrong"]).sum()), decided.sort_values("memory", na_position="first").tail(1)
    share = 100 * passed / len(checked) if len(checked) else math.nan
    said = "not stored" if math.isnan(share) else "100 %" if share == 100 else f"{min(99.99, share):.2f} %"
    memory, where = "not measured", ""
    for row in worst[worst["memory"].notna()].itertuples():
        memory, where = f"{row.memory:.2f} x logits", f"Of a winner: N {row.N:,}, V {row.V:,}, {row.mode}."
    open_, stale = len(table) - len(decided), int(table["stale"].notna().sum())
    mean = "Geometric mean of the winners' speed-ups over eager."
    return [
        ("Faster than eager", times(_mean(decided["speed-up"])), mean),
        ("Check passed by", said, f"{passed:,} of {plural(len(checked), 'candidate')} passed all that was run."),
        ("Worst memory", memory, where),
        ("Decisions", f"{len(table):,}", f"{open_:,} undecided, {stale:,} stale."),
    ]


def by_backend(frames: Frames, profile: Profile, table: pd.DataFrame) -> pd.DataFrame:
    """A row a backend: won, timed, speed-up (geometric mean over eager), check (passed by how many), memory (worst)."""
    candidates = frames.candidates_of(profile)
    candidates = candidates[candidates["key"].isin(table["key"])]
    decided, rows = set(table.loc[table["winner"] != UNDECIDED, "key"]), []
    for backend, part in candidates.groupby("backend"):
        timed, checked, bad = part[part["outcome"].isin(MEASURED)], _is_checked(part).sum(), part["is_wrong"].sum()
        check = f"{WRONG} in {bad:,} of {checked:,}" if bad else f"✓ {checked:,} of {checked:,}"
        won = int((part["chosen"] & part["key"].isin(decided)).sum())
        row = (plain_line(backend, 40), won, len(timed), _mean(timed["ratio"]), check if checked else "not run")
        rows.append((*row, timed["extra_multiple"].max()))
    found = pd.DataFrame(rows, columns=["backend", "won", "timed", "speed-up", "check", "memory"])
    return found.sort_values(["won", "timed"], ascending=False, kind="stable", ignore_index=True)


def _is_checked(candidates: pd.DataFrame) -> "pd.Series[bool]":
    return candidates["is_wrong"] | (candidates["passed"].map(len) > 0)


def _mean(ratios: "pd.Series[float]") -> float | None:
    """The geometric mean of those that are known."""
    known = ratios[ratios > 0]
    return float(np.exp(np.log(known).mean())) if len(known) else None


# The winner maps


def squares(frames: Frames, profile: Profile, table: pd.DataFrame) -> pd.DataFrame:
    """A square for each decision in `table`, of `decisions`: who won, and by how much.

    Returns:
        key, mode, dtype, rows, vocab, backend (the winner; missing where undecided), state (won, tie, alone, or
        undecided), opacity (from the margin over the runner-up), wrong (who was, in words), and what `hover` tells.
    """
    decided = frames.of(profile)
    decided = decided[decided["key"].isin(table["key"])].drop_duplicates(["mode", "dtype", "rows", "vocab"])
    timed = frames.candidates_of(profile)
    timed = timed[timed["key"].isin(decided["key"]) & timed["outcome"].isin(MEASURED)]
    chosen = timed[timed["chosen"]].set_index("key")
    # By the speed-up, a ratio within rounds: seconds that an earlier decision measured are of another run.
    others = timed[~timed["chosen"]].assign(parted=timed["outcome"] != "tie")
    second = others.sort_values(["parted", "ratio"], ascending=[True, False], kind="stable").drop_duplicates("key")
    second, keys = second.set_index("key"), decided["key"]
    margin = keys.map(chosen["ratio"]) / keys.map(second["ratio"])
    tied, alone = keys.isin(others.loc[~others["parted"], "key"]), ~keys.isin(second.index)
    state = np.select([~decided["is_decided"], tied, alone], ["undecided", "tie", "alone"], default="won")
    share = np.log(margin.clip(lower=1.0, upper=FULL_AT)) / np.log(FULL_AT)
    told = keys.map(table.set_index("key")["check"])
    found = decided[["key", "mode", "dtype", "rows", "vocab", "chosen", "against"]].assign(
        backend=decided["chosen"].where(decided["is_decided"]),
        state=state,
        opacity=FAINTEST + (1 - FAINTEST) * share.fillna(0.0),
        wrong=told.where(told.str.startswith(WRONG), ""),
        beside=keys.map(second["backend"]).fillna("nothing else"),
    )
    for name in ("speedup", "speedup_low", "speedup_high"):
        found[name] = keys.map(chosen[name])
    return found.reset_index(drop=True)


def hover(square: Any) -> str:
    """What one of `squares` is, in words."""
    words = {"won": "next: ", "tie": "a tie with ", "alone": "timed beside it: ", "undecided": "open against: "}
    speed = times(square.speedup, square.speedup_low, square.speedup_high)
    beside = f"{words[square.state]}{square.beside}" + (f"; {square.wrong}" if square.wrong else "")
    return f"N {square.rows:,}, V {square.vocab:,}: {square.chosen}, {speed} {square.against}; {beside}"


def maps(found: pd.DataFrame) -> tuple[list[tuple[str, str, pd.DataFrame]], str]:
    """The part of `squares` that can be drawn, by mode and dtype, and what is left out, in words.

    What is wrong is drawn in any case, then the kinds, N and V of the most decisions.
    """
    found = found.assign(bad=found["wrong"] != "")
    drawn = []
    for mode, dtype in sorted(_most(found, ["mode", "dtype"], MOST_MAPS), key=lambda kind: (len(kind[0]), *kind)):
        part = found[(found["mode"] == mode) & (found["dtype"] == dtype)]
        for column, most in (("rows", MOST_ROWS), ("vocab", MOST_VOCABS)):
            part = part[part[column].isin(_most(part, column, most))]
        drawn.append((mode, dtype, part.assign(hover=[hover(square) for square in part.itertuples()])))
    count = sum(len(part) for _, _, part in drawn)
    return drawn, f"{count:,} of {len(found):,} are drawn; filter for the others." if count < len(found) else ""


def _most(found: pd.DataFrame, columns: str | list[str], most: int) -> list[Any]:
    counts = found.groupby(columns)["bad"].agg(["sum", "size"])
    return list(counts.sort_values(["sum", "size"], ascending=False, kind="stable").index[:most])


def in_words(found: pd.DataFrame) -> str:
    """How many squares each backend serves."""
    won = ", ".join(f"{plain_line(name, 40)} {count:,}" for name, count in found["backend"].value_counts().items())
    counts, bad = found["state"].value_counts(), int((found["wrong"] != "").sum())
    apart = "".join(f", {state} {counts[state]:,}" for state in ("tie", "undecided") if state in counts)
    return f"Winners of {plural(len(found), 'decision')}: {won or 'none'}{apart}; a backend was wrong in {bad:,}."
