"""Any number of profiles, or dates of one, where they measured the same problem; and one problem over time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from compiled_logprobs.decision import MEASURED
from compiled_logprobs.machine.environment import MATCHED, as_matched
from compiled_logprobs.problem import Problem
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import plural, significant
from compiled_logprobs_dashboard.looks import plain_line

COLUMNS = ["problem", "verdict", "change", "low", "high", "ms", "base ms", "winner", "base winner", "side"]
VERDICTS = ("slower", "faster", "noise not known", "within noise")
HISTORY = ["measured_at", "label", "torch", "backend", "chosen", "is_wrong", "seconds", "low", "high"]
_NOT_FACTS = ("source", "environment", "device", "here", "decisions", "measured_at")


@dataclass(frozen=True)
class Side:
    """A profile, as it is now or as it was at the end of a day."""

    profile: Profile
    day: str = ""
    """Such as 2026-11-24; empty for now."""


def sides(frames: Frames) -> dict[str, Side]:
    """What can be compared, by its name in links: each profile, and each as of every day on which it was measured."""
    found: dict[str, Side] = {}
    for name, profile in frames.profiles.items():
        found[name] = Side(profile)
        for day in days(frames, profile)[:-1]:
            found[f"{name}@{day}"] = Side(profile, day)
    return found


def days(frames: Frames, profile: Profile) -> list[str]:
    """On which days something of a profile was measured, the last of which is how it is now."""
    moments = pd.concat([frames.of(profile)["measured_at"], frames.past.of(profile)["measured_at"]])
    return sorted({moment[:10] for moment in moments if moment[:4].isdigit()})


def usual(frames: Frames, profile: Profile) -> list[str]:
    """What to compare first, the base before: `profile` with its last day before, else with one of its device."""
    known, device = sides(frames), frames.facts(profile)["device"]
    mine = [name for name, side in known.items() if side.profile == profile]
    others = [name for name in known if name not in mine]
    others.sort(key=lambda name: frames.facts(known[name].profile)["device"] != device)
    return [mine[-1] if len(mine) > 1 else others[0], mine[0]]


def side_in_words(frames: Frames, side: Side) -> str:
    return plain_line(frames.label(side.profile), 120) + (f", as of {side.day}" if side.day else "")


def _of(frames: Frames, side: Side) -> pd.DataFrame:
    """The decisions of a side with asked (the problem, on any device), winner, per_row (seconds of a row) and noise."""
    parts = []
    for found in (frames.past, frames) if side.day else (frames,):
        decided, timed = found.of(side.profile), found.candidates_of(side.profile)
        timed = timed[timed["outcome"].isin(MEASURED)]
        won = timed[timed["chosen"] & timed["key"].isin(decided.loc[decided["is_decided"], "key"])]
        won = won[won["measured_at"] == won["key"].map(decided.set_index("key")["measured_at"])].set_index("key")
        # The baseline has no interval of its own, and a candidate's holds the noise of both: the widest speaks for all.
        noise = _width(timed).where(timed["ratio_low"] != timed["ratio_high"]).groupby(timed["key"]).max()
        part = decided[["name", "measured_at", "rows"]].assign(
            asked=[problem._replace(device_type="") for problem in decided["problem"]],
            winner=decided["chosen"].where(decided["is_decided"], "undecided"),
            per_row=decided["key"].map(won["seconds"]) / decided["timed_rows"],
            noise=decided["key"].map(noise),
        )
        parts.append(part[part["measured_at"].str[:10] <= side.day] if side.day else part)
    return pd.concat(parts).sort_values("measured_at", kind="stable").drop_duplicates("asked", keep="last")


def _width(timed: pd.DataFrame) -> "pd.Series[float]":
    """Half of the interval of a ratio's logarithm; missing where it is not known."""
    low = timed["ratio_low"].where(timed["ratio_low"] > 0)
    return np.log(timed["ratio_high"].where(low.notna()) / low) / 2


def matched(frames: Frames, base: Side, others: Sequence[Side]) -> tuple[pd.DataFrame, list[str]]:
    """Each problem that the base and another side decided, regressions first; and what is in no figure, in words.

    Returns:
        problem, side, winner, base winner, ms and base ms (a call of all rows), change (in per cent of the base's time:
        above 0 is slower) with low and high (the noise of both), verdict.
    """
    parts, left, first = [], [], _of(frames, base)
    for side in others:
        mine = _of(frames, side)
        both = mine.merge(first, on="asked", suffixes=("", "_base"))
        timed = both[both["per_row"].gt(0) & both["per_row_base"].gt(0)]
        ratio, width = timed["per_row"] / timed["per_row_base"], np.hypot(timed["noise"], timed["noise_base"])
        low, high = ratio * np.exp(-width), ratio * np.exp(width)
        verdict = np.select([width.isna(), low > 1, high < 1], ["noise not known", "slower", "faster"], "within noise")
        part = timed[["winner"]].assign(problem=timed["name"], verdict=verdict, side=side_in_words(frames, side))
        part["base winner"], rows = timed["winner_base"], timed["rows"] * 1e3
        part["ms"], part["base ms"] = significant(timed["per_row"] * rows), significant(timed["per_row_base"] * rows)
        for name, value in (("change", ratio), ("low", low), ("high", high)):
            part[name] = 100 * (value - 1)
        parts.append(part)
        alone = len(mine) + len(first) - 2 * len(both)
        left += [f"{plural(alone, 'decision')} that one of both sides lacks"] if alone else []
        open_ = len(both) - len(timed)
        left += [f"{plural(open_, 'problem')} undecided or not timed on one side"] if open_ else []
    table = pd.concat(parts) if parts else pd.DataFrame(columns=COLUMNS)
    table = table.assign(order=table["verdict"].map(VERDICTS.index), far=-table["change"].abs())
    return table.sort_values(["order", "far"], kind="stable", ignore_index=True)[COLUMNS], list(dict.fromkeys(left))


def in_words(table: pd.DataFrame, base: str) -> str:
    """The comparison in a sentence."""
    if table.empty:
        return "No problem was decided on both sides."
    counts = table["verdict"].value_counts()
    parts = ", ".join(f"{name} {counts[name]:,}" for name in VERDICTS if name in counts)
    middle = 100 * (float(np.exp(np.log(1 + table["change"] / 100).median())) - 1)
    changed = int((table["winner"] != table["base winner"]).sum())
    problems = f"Against {base}, {plural(len(table), 'problem')}: {parts}"
    return f"{problems}; median {middle:+.1f} % of its time; another winner in {changed:,}."


def differences(frames: Frames, base: Side, others: Sequence[Side]) -> pd.DataFrame:
    """What differs between the profiles: fact, a column a profile, and decides (does it make another environment)."""
    profiles = list(dict.fromkeys(side.profile for side in (base, *others)))
    facts = {profile: frames.facts(profile) for profile in profiles}
    kinds = {str(one.get("device_type")) for one in facts.values()}
    deciding = {"device_type", *(name for kind in kinds for name in MATCHED.get(kind, MATCHED["cpu"]))}
    rows = []
    for name in facts[base.profile]:
        values = [facts[profile].get(name) for profile in profiles]
        if name not in _NOT_FACTS and any(value != values[0] for value in values):
            decides = name in deciding and len({as_matched(name, value) for value in values}) > 1
            rows.append((name.replace("_", " "), decides, *map(_text, values)))
    found = pd.DataFrame(rows, columns=["fact", "decides", *(plain_line(frames.label(one), 80) for one in profiles)])
    return found.sort_values("decides", ascending=False, kind="stable", ignore_index=True)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}"
    return "not known" if value is None else plain_line(value, 60)


def history(frames: Frames, problem: Problem, device: str) -> pd.DataFrame:
    """What each backend took for `problem` on `device`, whatever the date, the versions and the source.

    Returns:
        One row a decision and candidate that was timed or wrong, oldest first: measured_at, label (a place on an axis),
        torch, backend, chosen, is_wrong, seconds (a call of N rows; missing where wrong), low and high (its noise).
    """
    parts, devices = [], frames.environments.set_index(["source", "environment"])[["device", "torch"]]
    for found in (frames.past, frames):
        decided = found.decisions[found.decisions["problem"].map(lambda other: other == problem).astype(bool)]
        decided = decided.drop(columns=["device"], errors="ignore").join(devices, on=["source", "environment"])
        decided = decided[decided["device"] == device]
        timed = found.candidates[found.candidates["outcome"].isin(MEASURED) | found.candidates["is_wrong"]]
        columns = ["key", "environment", "timed_rows", "is_decided", "torch", "measured_at"]
        table = timed.merge(decided[columns], on="key", suffixes=("_then", ""))
        table = table[table["measured_at_then"] == table["measured_at"]]
        width = _width(table).where(table["ratio_low"] < table["ratio_high"]).groupby(table["key"]).transform("max")
        seconds = (table["seconds"] * problem.rows / table["timed_rows"]).where(~table["is_wrong"])
        more = {"chosen": table["chosen"] & table["is_decided"], "low": seconds * np.exp(-width)}
        parts.append(table.assign(seconds=seconds, high=seconds * np.exp(width), **more))
    both = pd.concat(parts).drop_duplicates(["environment", "backend", "measured_at"])  # once, also from two sources
    there = both["torch"].fillna("not known").map(lambda text: plain_line(text, 20))
    both["label"] = both["measured_at"].str[:16].str.replace("T", " ") + ", torch " + there
    return both.sort_values(["measured_at", "backend"], kind="stable", ignore_index=True)[HISTORY]
