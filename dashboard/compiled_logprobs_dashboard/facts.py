"""What is known of the environments in profiles, and which decisions are of other versions or other code than this machine's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

import pandas as pd

from compiled_logprobs.backends import BUILT_IN, backends, code_of, is_loaded
from compiled_logprobs.machine.environment import MATCHED, VERSIONS_MATCHED, Environment

_KINDS = get_type_hints(Environment)
LONGEST = 200
"""Characters of a fact: it is shown in one line."""


def is_fingerprint(text: str) -> bool:
    """Whether `text` may be an environment's."""
    return re.fullmatch("[0-9a-f]{16}", text) is not None


def plain_facts(facts: object) -> dict[str, Any]:
    """The facts of `Environment` in `facts`, which may come from anywhere; None for what is missing or no such value."""
    known = facts if isinstance(facts, dict) else {}
    plain: dict[str, Any] = {}
    for one in fields(Environment):
        value, kind = known.get(one.name), _KINDS[one.name]
        right = (
            isinstance(value, int) and not isinstance(value, bool) if int in _parts(kind) else isinstance(value, str)
        )
        if isinstance(value, str):  # half of a surrogate pair is valid in JSON, and in no table
            value = value[:LONGEST].encode("utf-8", "replace").decode()
        plain[one.name] = value if right else None
    return plain


def _parts(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "__args__", (kind,))


def device_name(facts: Mapping[str, Any]) -> str:
    """The device in words, with what tells it from its like: SMs or threads."""
    if facts.get("device_type") == "cpu":
        threads = facts.get("cpu_threads")
        return (facts.get("cpu_model") or "CPU") + (
            f", {threads} thread{'' if threads == 1 else 's'}" if threads is not None else ""
        )
    units = facts.get("multiprocessors")
    return (facts.get("gpu_name") or facts.get("device_type") or "unknown device") + (f", {units} SMs" if units else "")


def environment_rows(
    source: str, facts: Mapping[str, Mapping[str, Any]], decisions: pd.DataFrame, here: Sequence[Environment]
) -> pd.DataFrame:
    """One row an environment: source, environment, device, here, decisions (how many), measured_at (of the latest), the facts."""
    ours = {one.fingerprint() for one in here}
    by = decisions.groupby("environment")["measured_at"].agg(["size", "max"])
    rows = [
        {
            "source": source,
            "environment": environment,
            "device": device_name(known),
            "here": environment in ours,
            "decisions": int(by.loc[environment, "size"]),
            "measured_at": by.loc[environment, "max"],
            **known,
        }
        for environment, known in facts.items()
        if environment in by.index
    ]
    columns = ["source", "environment", "device", "here", "decisions", "measured_at", *_KINDS]
    numbers = {name: float for name, kind in _KINDS.items() if int in _parts(kind)}
    return pd.DataFrame(rows, columns=columns).astype({"here": bool, **numbers})


def staleness(
    decisions: pd.DataFrame,
    fingerprints: "pd.Series[str]",
    facts: Mapping[str, Mapping[str, Any]],
    here: Sequence[Environment],
) -> "pd.Series[str]":
    """Why each decision may no longer hold; missing where nothing speaks against it.

    Args:
        decisions: with environment and chosen.
        fingerprints: of the chosen backend when each was measured.
        facts: of the environments.
        here: the environments that this machine makes up.
    """
    versions = {environment: why_other_versions(known, here) for environment, known in facts.items()}
    same_device = {name: any(_is_like(one, known) for one in here) for name, known in facts.items()}
    ours = {name: code_of(name) if name in BUILT_IN or is_loaded(name) else None for name in backends()}

    @cache
    def why(environment: str, chosen: str, there: str | None) -> str | None:
        if versions.get(environment) is not None:
            return versions[environment]
        if chosen not in ours:
            return f"backend {chosen}, which it chose, is not registered here"
        code = ours[chosen]
        if code is not None and there is not None and not same_device.get(environment):
            # There, other packages are to be expected, which some backends add to the digest of their source.
            code, there = code.split(",")[0], there.split(",")[0]
        return None if code is None or code == there else f"backend {chosen} has changed since this was measured"

    known_there = (text if isinstance(text, str) else None for text in fingerprints)
    reasons = map(why, decisions["environment"], decisions["chosen"], known_there)
    return pd.Series(list(reasons), index=decisions.index, dtype=object)


def why_other_versions(facts: Mapping[str, Any], here: Sequence[Environment]) -> str | None:
    """What of the versions that a measurement depends on is another on this machine; None if nothing is."""
    if not here:
        return None
    ours = [one for one in here if _is_like(one, facts)]
    near = ours or [one for one in here if one.device_type == facts.get("device_type")] or list(here)
    return min((_versions(facts, one, exact=bool(ours)) for one in near), key=lambda why: why is not None, default=None)


def _versions(facts: Mapping[str, Any], one: Environment, *, exact: bool) -> str | None:
    # Another device needs another build, and may need no triton: there, only torch's own version can be compared.
    for name in VERSIONS_MATCHED if exact else ("torch",):
        there, ours = facts.get(name), getattr(one, name)
        if there is not None and not exact:
            there, ours = str(there).split("+")[0], str(ours).split("+")[0]
        if there is not None and there != ours:
            return f"measured with {name} {there}; this machine has {ours or 'none'}"
    return None


def _is_like(one: Environment, facts: Mapping[str, Any]) -> bool:
    """Whether `facts` are of the same silicon."""
    names = [name for name in MATCHED.get(one.device_type, MATCHED["cpu"]) if name not in VERSIONS_MATCHED]
    return all(facts.get(name) == getattr(one, name) for name in ("device_type", *names))
