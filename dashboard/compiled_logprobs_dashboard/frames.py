"""Profiles as DataFrames: what the stores hold, a row a decision and a row a candidate, for all pages.

They are made anew when a store changes; of its files, only those are opened that were not there before.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from compiled_logprobs.backends import backends_for, code_of, is_built_in, is_loaded
from compiled_logprobs.decision import PLAIN, Candidate, Decision, Evidence, Speedup
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import MATCHED, VERSIONS_MATCHED, Environment, as_matched, environments
from compiled_logprobs.problem import Problem, mode_name, short_name
from compiled_logprobs.store import stores
from compiled_logprobs.store.files import (
    FACTS,
    HISTORY,
    Store,
    decision_files,
    listing,
    past_files,
    read_decision,
    read_facts,
    read_past,
)
from compiled_logprobs_dashboard.humanize import in_one_line
from compiled_logprobs_dashboard.looks import plain_line

SOURCES = {"user store": "yours", "project profiles": "project", "bundled profiles": "bundled"}
"""What the dashboard calls a store, by the label of `stores`."""
MOST_FILES, MOST_MADE = 100_000, 30
"""Whose rows are remembered; and how many things that were made of them."""
Made = TypeVar("Made")
DECISIONS = {
    **dict.fromkeys(("key",), "int64"),
    **dict.fromkeys(("source", "environment", "file"), "str"),
    "problem": object,
    **dict.fromkeys(("name", "mode", "dtype"), "str"),
    **dict.fromkeys(("rows", "vocab"), "int64"),
    "timed_rows": "float64",  # in proportion, where fewer columns were timed, too
    "is_decided": "bool",
    **dict.fromkeys(("chosen", "baseline", "against", "measured_at", "fingerprint"), "str"),
    **dict.fromkeys(("tuning_seconds", "bandwidth_read", "bandwidth_copy", "bandwidth_in_place"), "float64"),
}
"""Columns. `against` is whose time the speed-ups that are shown are over, `fingerprint` the chosen backend's then. What
was not measured is missing, never 0. `device` and `stale` (a reason, or missing) follow from the environment."""
CANDIDATES = {
    "key": "int64",  # of its decision
    **dict.fromkeys(("backend", "outcome", "reason"), "str"),
    "chosen": "bool",
    **dict.fromkeys(("ratio", "ratio_low", "ratio_high"), "float64"),  # the baseline's time over its own
    **dict.fromkeys(("speedup", "speedup_low", "speedup_high"), "float64"),  # the time of `against` over its own
    **dict.fromkeys(("seconds", "extra_multiple", "percent_of_bandwidth"), "float64"),
    **dict.fromkeys(("passed", "failed"), object),  # names of checks
    "is_wrong": "bool",
    "measured_at": "str",
}


class Profile(NamedTuple):
    """What is looked at: one environment of one source."""

    source: str
    environment: str


@dataclass(frozen=True)
class Frames:
    """All that the stores hold."""

    decisions: pd.DataFrame
    """One row a decision, see `DECISIONS`; its place is its key."""
    candidates: pd.DataFrame
    """One row a candidate, see `CANDIDATES`."""
    environments: pd.DataFrame
    """One row a profile: source, environment, device, here (this machine's), decisions, measured_at, and facts."""
    broken: pd.DataFrame
    """One row a file that could not be read: source, environment, path (below the store's root), reason."""
    stores: dict[str, Store]
    """By source, in the order in which the library asks them."""
    _made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, what: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, which is made once for all tabs: until a store changes, or another day's ages hold."""
        made: Made | None = self._made.get((what, date.today()))
        if made is None:
            if len(self._made) >= MOST_MADE:
                self._made.clear()
            made = self._made[what, date.today()] = make()
        return made

    @cached_property
    def backends(self) -> tuple[str, ...]:
        """The names of all candidates, sorted: they decide how each is drawn, so that all pages agree."""
        return tuple(sorted(self.candidates["backend"].unique()))

    @cached_property
    def keys(self) -> dict[tuple[str, str, Problem], int]:
        """The key of each decision, by source, environment and problem."""
        columns = (self.decisions[name] for name in ("source", "environment", "problem", "key"))
        return {(source, environment, problem): key for source, environment, problem, key in zip(*columns, strict=True)}

    def of(self, profile: Profile) -> pd.DataFrame:
        """The decisions of one profile."""
        return self._parts[0].get(profile, self.decisions.iloc[:0])

    def candidates_of(self, profile: Profile) -> pd.DataFrame:
        """The candidates of these decisions."""
        return self._parts[1].get(profile, self.candidates.iloc[:0])

    @cached_property
    def _parts(self) -> tuple[dict[Profile, pd.DataFrame], dict[Profile, pd.DataFrame]]:
        decisions = {Profile(*name): part for name, part in self.decisions.groupby(["source", "environment"])}
        owners = self.candidates["key"].map(self.decisions["source"] + " " + self.decisions["environment"])
        candidates = {Profile(*name.split(" ")): part for name, part in self.candidates.groupby(owners)}
        return decisions, candidates

    @cached_property
    def past(self) -> "Frames":
        """What newer decisions replaced, in the same form: only who compares needs it."""
        found = _Rows()
        for source, store in self.stores.items():
            for folder in store.folders():
                for problem in listing(folder / HISTORY):
                    found.add(source, store, folder, past_files(problem), read_past)
        tables = _table(found.decisions, DECISIONS), _table(found.candidates, CANDIDATES)
        return Frames(*tables, self.environments, self.broken, self.stores)

    def facts(self, profile: Profile) -> dict[str, Any]:
        """The row of a profile in `environments`; None for a fact that is missing."""
        table = self.environments
        table = table[(table["source"] == profile.source) & (table["environment"] == profile.environment)]
        return {} if table.empty else {name: None if pd.isna(value) else value for name, value in table.iloc[0].items()}

    def decision(self, key: int) -> Decision:
        """Read the decision behind a row. Raises ProfileError if its file is gone or broken since."""
        row = self.decisions.iloc[key]
        path = self.stores[row["source"]].path(row["environment"], row["problem"])
        decision = read_decision(path)
        if decision is None:
            raise ProfileError(f"{path.name} is no longer there. Load the page again.")
        return decision

    def evidence(self, key: int, decision: Decision) -> Evidence | None:
        """What the decision behind a row rests on; None where that is not stored, or cannot be read."""
        row = self.decisions.iloc[key]
        return self.stores[row["source"]].evidence(row["environment"], decision)

    @cached_property
    def profiles(self) -> dict[str, Profile]:
        """Each profile by its name in links: this machine's first, then that of the most decisions.

        The name is the environment's fingerprint; behind it the source, where the same lies in two.
        """
        order = {source: place for place, source in enumerate(self.stores)}
        table = self.environments.assign(order=self.environments["source"].map(order))
        table = table.sort_values(["here", "order", "decisions"], ascending=[False, True, False], kind="stable")
        named: dict[str, Profile] = {}
        for source, environment in table[["source", "environment"]].itertuples(index=False):
            named[f"{environment}-{source}" if environment in named else environment] = Profile(source, environment)
        return named

    def label(self, profile: Profile) -> str:
        """What people call a profile: its device, torch and source, and as much more as tells it from the others."""
        return self._labels[profile]

    @cached_property
    def _labels(self) -> dict[Profile, str]:
        table = self.environments
        torch_there = table["torch"].fillna("not known").map(lambda text: plain_line(text, 20))
        devices = table["device"].map(lambda text: plain_line(text, 60))
        labels = devices + " · torch " + torch_there + " · " + table["source"]
        labels = labels.mask(labels.duplicated(keep=False), labels + " · " + table["environment"].str[:6])
        return {Profile(*name): text for *name, text in zip(table["source"], table["environment"], labels, strict=True)}


def sources() -> dict[str, Store]:
    """The stores that the library looks into, those that are there, in its order."""
    return {SOURCES[label]: store for label, store in stores().items() if store.root.is_dir()}


class _Rows:
    """Rows of decisions and of their candidates, and files that cannot be read."""

    def __init__(self) -> None:
        self.decisions: list[tuple[Any, ...]] = []
        self.candidates: list[tuple[Any, ...]] = []
        self.broken: list[tuple[str, str, str, str]] = []

    def add(self, source: str, store: Store, folder: Path, paths: list[Path], read: Callable[[Path], Any]) -> None:
        for path in paths:
            if not path.name.isascii():  # a name that no store gives, and that may be no text
                continue
            try:
                row, candidates = _rows(path, path.stat().st_mtime_ns, read)
            except (ProfileError, OSError) as error:
                self.broken.append((source, folder.name, path.relative_to(store.root).as_posix(), str(error)))
                continue
            key = len(self.decisions)
            self.decisions.append((key, source, folder.name, path.name, *row))
            self.candidates += [(key, *candidate) for candidate in candidates]


def load(by_source: Mapping[str, Store]) -> Frames:
    """What `by_source` holds, by source."""
    here, found = environments(), _Rows()
    facts: list[tuple[str, str, dict[str, Any]]] = []
    for source, store in by_source.items():
        for folder in store.folders():
            before, stated = len(found.decisions), None
            found.add(source, store, folder, decision_files(folder), read_decision)
            try:
                stated = read_facts(folder / FACTS)
            except ProfileError as error:
                where = (folder / FACTS).relative_to(store.root).as_posix()
                found.broken.append((source, folder.name, where, str(error)))
            if len(found.decisions) > before:  # each decision tells the facts, too
                first = folder / "decisions" / found.decisions[before][3]
                facts.append((source, folder.name, _plain(stated or getattr(read_decision(first), "environment", {}))))
    table = _table(found.decisions, DECISIONS)
    profiles = _environments(facts, table, here)
    device = profiles.set_index(["source", "environment"])["device"]
    table["device"] = device.reindex(pd.MultiIndex.from_frame(table[["source", "environment"]])).to_numpy()
    table["stale"] = _staleness(table, {environment: stated for _, environment, stated in facts}, here)
    lost = pd.DataFrame(found.broken, columns=["source", "environment", "path", "reason"])
    return Frames(table, _table(found.candidates, CANDIDATES), profiles, lost, dict(by_source))


def _table(rows: list[tuple[Any, ...]], columns: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


@lru_cache(maxsize=MOST_FILES)
def _rows(
    path: Path, written: int, read: Callable[[Path], Decision | None]
) -> tuple[tuple[Any, ...], list[tuple[Any, ...]]]:
    """The row of the decision in a file, and those of its candidates. Raises ProfileError if it cannot be read."""
    decision = read(path)
    if decision is None:
        raise ProfileError("it is no longer there")
    problem = decision.problem
    row = (
        *(problem, in_one_line(problem), mode_name(problem), short_name(problem.dtype)),
        *(problem.rows, problem.vocab, decision.timed.rows * decision.timed.vocab / problem.vocab),
        *(decision.is_decided, decision.chosen, decision.baseline),
        *(against(decision), decision.measured_at, decision.winner.fingerprint),
        *(decision.tuning_seconds, *(decision.bandwidth.get(kind) for kind in ("read", "copy", "in_place"))),
    )
    candidates = [
        (
            *(name, candidate.outcome, candidate.reason, name == decision.chosen),
            *ends(candidate.speedup),
            *ends(published(decision, candidate)),
            *(candidate.seconds, candidate.extra_multiple, candidate.percent_of_bandwidth),
            *(tuple(one.name for one in candidate.checks if one.passed == passed) for passed in (True, False)),
            candidate.outcome == "wrong" or candidate.checks_passed < len(candidate.checks),
            candidate.measured_at or decision.measured_at,
        )
        for name, candidate in decision.candidates.items()
    ]
    return row, candidates


def ends(speedup: Speedup | None) -> tuple[float | None, ...]:
    return (None, None, None) if speedup is None else (speedup.median, speedup.low, speedup.high)


def against(decision: Decision) -> str:
    """Whose time the speed-ups that are shown are over: what people use, or the baseline where that was not timed."""
    return f"plain {PLAIN}" if decision.winner.speedup_over_plain is not None else decision.baseline


def published(decision: Decision, candidate: Candidate) -> Speedup | None:
    """The speed-up of a candidate over `against(decision)`; none of an undecided one's baseline over itself."""
    if against(decision) != decision.baseline:
        return candidate.speedup_over_plain
    is_itself = candidate is decision.winner and not decision.is_decided
    return None if is_itself else candidate.speedup


# Facts of environments


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of `Environment` in `facts`; None for what is missing or no such value: a file may be foreign."""
    plain = {}
    for fact in fields(Environment):
        value = facts.get(fact.name)
        value = value[:200] if isinstance(value, str) else value
        plain[fact.name] = value if isinstance(value, fact.type) else None  # type: ignore[arg-type]
    return plain


def device_name(facts: Mapping[str, Any]) -> str:
    """The device in words, with what tells it from its like: SMs or threads."""
    if facts.get("device_type") == "cpu":
        threads = facts.get("cpu_threads")
        more = "" if threads is None else f", {threads} thread{'' if threads == 1 else 's'}"
        return (facts.get("cpu_model") or "CPU") + more
    units = facts.get("multiprocessors")
    return (facts.get("gpu_name") or facts.get("device_type") or "unknown device") + (f", {units} SMs" if units else "")


def _environments(
    facts: list[tuple[str, str, dict[str, Any]]], decisions: pd.DataFrame, here: list[Environment]
) -> pd.DataFrame:
    ours = {environment.fingerprint() for environment in here}
    by = decisions.groupby(["source", "environment"])["measured_at"].agg(["size", "max"])
    rows = [
        (source, name, device_name(told), name in ours, *by.loc[(source, name)], *told.values())
        for source, name, told in facts
    ]
    columns = ["source", "environment", "device", "here", "decisions", "measured_at"]
    table = pd.DataFrame(rows, columns=[*columns, *(fact.name for fact in fields(Environment))])
    numbers = {fact.name: float for fact in fields(Environment) if isinstance(0, fact.type)}  # type: ignore[arg-type]
    return table.astype({"here": bool, "decisions": int, **numbers})


def _staleness(
    decisions: pd.DataFrame, facts: Mapping[str, Mapping[str, Any]], here: list[Environment]
) -> list[str | None]:
    """Why each decision may no longer hold: other versions or other code than here; None where nothing says so."""
    versions = {environment: _other_versions(told, here) for environment, told in facts.items()}
    same_device = {name: any(_is_like(one, told) for one in here) for name, told in facts.items()}

    @cache
    def why(environment: str, chosen: str, there: str | None, problem: Problem) -> str | None:
        if versions.get(environment) is not None:
            return versions[environment]
        if chosen not in backends_for(problem):
            return f"backend {chosen}, which it chose, is not registered here"
        code = code_of(chosen, problem) if is_built_in(chosen) or is_loaded(chosen) else None
        if code is not None and there is not None and not same_device.get(environment):
            # There, other packages are to be expected, which some backends add to the digest of their source.
            code, there = code.split(",")[0], there.split(",")[0]
        return None if code is None or code == there else f"backend {chosen} has changed since this was measured"

    # Of all problems from hidden states, and of all from logits, one will do.
    kinds = [Problem("cpu", 1, 1, each.dtype, hidden=each.hidden and 1) for each in decisions["problem"]]
    columns = zip(*(decisions[name] for name in ("environment", "chosen", "fingerprint")), kinds, strict=True)
    return [
        why(where, chosen, there if isinstance(there, str) else None, kind) for where, chosen, there, kind in columns
    ]


def _other_versions(facts: Mapping[str, Any], here: list[Environment]) -> str | None:
    """What of the versions that a measurement depends on is another on this machine; None if nothing is."""
    ours = [one for one in here if _is_like(one, facts)]
    near = ours or [one for one in here if one.device_type == facts.get("device_type")] or here
    return min((_versions(facts, one, exact=bool(ours)) for one in near), key=lambda why: why is not None, default=None)


def _versions(facts: Mapping[str, Any], one: Environment, *, exact: bool) -> str | None:
    # Another device needs another build, and may need no triton: there, only torch's own version can be compared.
    matched = MATCHED.get(one.device_type, MATCHED["cpu"])
    for name in [name for name in VERSIONS_MATCHED if name in matched] if exact else ["torch"]:
        there, ours = facts.get(name), getattr(one, name)
        if there is not None and not exact:
            there, ours = str(there).split("+")[0], str(ours).split("+")[0]
        if there is not None and there != ours:
            return f"measured with {name} {there}; this machine has {ours or 'none'}"
    return None


def _is_like(one: Environment, facts: Mapping[str, Any]) -> bool:
    """Whether `facts` are of the same silicon."""
    names = [name for name in MATCHED.get(one.device_type, MATCHED["cpu"]) if name not in VERSIONS_MATCHED]
    return all(
        as_matched(name, facts.get(name)) == as_matched(name, getattr(one, name)) for name in ("device_type", *names)
    )
