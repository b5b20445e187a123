"""What the page Measure lists: a run's decisions and failures, what is stored or brought in, and the GPUs."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from compiled_logprobs.decision import Decision, winner_in_words
from compiled_logprobs.problem import mode_name, short_name
from compiled_logprobs.store.transfer import Imported
from compiled_logprobs_dashboard.frames import Frames, against, device_name, published
from compiled_logprobs_dashboard.humanize import in_one_line, significant, size, times
from compiled_logprobs_dashboard.looks import UNDECIDED, WRONG, plain_line
from compiled_logprobs_dashboard.machine import NOT_TOLD, GpuLook, Host, process
from compiled_logprobs_dashboard.progress import Loss

FIRST = ["device", "torch", "source", "here", "decisions", "wrong", "undecided", "stale", "measured"]
DECIDED = ["N", "V", "dtype", "mode", "winner", "check", "speed-up", "over", "ms", "memory"]
DEVICES = ["device", "memory %", "memory", "busy %", "power %", "power", "clock", "°C", "held down by"]


def decided(decisions: Sequence[Decision]) -> pd.DataFrame:
    """A row for each problem, the latest first; what the rounds did not tell is undecided, and has no figures."""
    rows = []
    for decision in reversed(decisions):
        problem, winner, speedup = decision.problem, decision.winner, published(decision, decision.winner)
        bad = [name for name, one in decision.candidates.items() if one.outcome == "wrong"]
        check = f"✓ {winner.checks_passed} of {len(winner.checks)}" if winner.checks else "not stored"
        check = f"{WRONG} {', '.join(plain_line(name, 40) for name in bad)}" if bad else check
        what = (problem.rows, problem.vocab, short_name(problem.dtype), mode_name(problem))
        if not decision.is_decided:
            rows.append((*what, f"{UNDECIDED} after {decision.rounds} rounds", check, "", "", math.nan, ""))
            continue
        faster = "" if speedup is None else times(speedup.median, speedup.low, speedup.high)
        ms = math.nan if winner.seconds is None else winner.seconds * 1e3
        told = (faster, plain_line(against(decision), 40), ms, size(winner.extra_bytes))
        rows.append((*what, plain_line(decision.chosen), check, *told))
    table = pd.DataFrame(rows, columns=DECIDED)
    return table.assign(ms=significant(table["ms"]))


def losses(found: Sequence[Loss]) -> pd.DataFrame:
    """A row for each problem without a decision, and for each backend that failed."""
    rows = []
    for loss in found:
        problem = "" if loss.problem is None else in_one_line(loss.problem)
        rows.append((problem, plain_line(loss.backend or "all"), plain_line(loss.outcome), plain_line(loss.reason)))
    return pd.DataFrame(rows, columns=["problem", "backend", "outcome", "reason"])


def stored(frames: Frames) -> pd.DataFrame:
    """A row a profile: how many decisions, how many of them wrong, undecided or stale, and its environment's facts."""
    bad = set(frames.candidates.loc[frames.candidates["is_wrong"], "key"])
    table = frames.decisions
    flags = table.assign(stale=table["stale"].notna(), undecided=~table["is_decided"], wrong=table["key"].isin(bad))
    counts = flags.groupby(["source", "environment"])[["wrong", "undecided", "stale"]].sum().reset_index()
    found = frames.environments.merge(counts, on=["source", "environment"])
    found["measured"] = found.pop("measured_at").str[:16].str.replace("T", " ")
    found = found.rename(columns=lambda name: name.replace("_", " ").replace("cpu", "CPU").replace("gpu", "GPU"))
    return found[[*FIRST, *(name for name in found if name not in FIRST)]]


def imported(found: Sequence[Imported]) -> pd.DataFrame:
    """A row a decision of an archive, or of what else is in there: its fate and why, and what it is."""
    rows = []
    for entry in found:
        told, one = ("", plain_line(entry.name, 100), "", ""), entry.decision
        if one is not None:
            what = (plain_line(device_name(one.environment), 80), in_one_line(one.problem))
            told = (*what, plain_line(winner_in_words(one), 60), one.measured_at[:16].replace("T", " "))
        rows.append((entry.fate, *told, plain_line(entry.why)))
    return pd.DataFrame(rows, columns=["fate", "device", "problem", "chosen", "measured", "why"])


# The machine


def devices(looks: Sequence[GpuLook], host: Host) -> pd.DataFrame:
    """A row a GPU, and one for the CPU: `DEVICES`. Shares are in per cent, for bars."""
    rows: list[tuple[Any, ...]] = []
    for look in looks:
        seen, trouble = look.snapshot, look.trouble and f"no answer: {plain_line(look.trouble, 100)}"
        used, total = seen.memory_used_bytes, seen.memory_total_bytes
        memory = (_share(used, total), f"{size_or(used)} of {size_or(total)}", seen.busy_percent)
        power = (_share(seen.power_w, seen.power_limit_w), _of(seen.power_w, seen.power_limit_w, "W"))
        clock = (_of(seen.sm_clock_mhz, seen.sm_clock_max_mhz, "MHz"), seen.temperature_c)
        rows.append((plain_line(look.label, 60), *memory, *power, *clock, trouble or throttling(seen.throttle_reasons)))
    used, total, load = host.memory_used_bytes, host.memory_total_bytes, f"load {host.load:.2f}"
    cpu = (f"CPU, {host.processors} processors", _share(used, total), f"{size(used)} of {size(total)}")
    rows.append((*cpu, host.busy_percent, None, None, None, None, load))
    table = pd.DataFrame(rows, columns=DEVICES).fillna(dict.fromkeys(("memory", "power", "clock"), NOT_TOLD))
    return table.astype(dict.fromkeys(("memory %", "busy %", "power %", "°C"), float))


def processes(looks: Sequence[GpuLook]) -> tuple[pd.DataFrame, list[str]]:
    """A row a process that computes on a GPU, and the GPUs that do not tell theirs."""
    rows = []
    for look in looks:
        for running in look.snapshot.processes or ():
            user, command = map(plain_line, process(running.pid))
            gpu = plain_line(look.label.partition(":")[0])
            rows.append((gpu, running.pid, user, size_or(running.memory_bytes), command))
    silent = [plain_line(look.label, 60) for look in looks if look.snapshot.processes is None]
    return pd.DataFrame(rows, columns=["GPU", "process", "user", "memory", "command"]), silent


def throttling(reasons: tuple[str, ...] | None) -> str:
    """What holds the clocks down."""
    if reasons is None:
        return NOT_TOLD
    held = [reason for reason in reasons if reason != "idle"]
    return f"▼ {', '.join(held)}" if held else "idle" if reasons else "nothing"


def size_or(number: int | None) -> str:
    return NOT_TOLD if number is None else size(number)


def _share(value: float | None, limit: float | None) -> float:
    return math.nan if value is None or not limit else 100 * value / limit


def _of(value: float | None, limit: float | None, unit: str) -> str:
    if value is None:
        return NOT_TOLD
    return f"{value:,.0f} of {limit:,.0f} {unit}" if limit else f"{value:,.0f} {unit}"
