"""The last minutes of the machine as a table, and its figures in words; what is not told is never 0."""

import pandas as pd

from compiled_logprobs_dashboard.machine import INTERVAL_S, NOT_TOLD, MachineLook

GAP = 3.0
"""Intervals between two looks that make a gap in a line."""
HISTORY = [
    "memory_used_bytes",
    "memory_total_bytes",
    "busy_percent",
    "memory_busy_percent",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "power_w",
    "temperature_c",
]
"""The figures of a look that a line can be drawn of."""


def history(looks: list[MachineLook], interval: float = INTERVAL_S) -> pd.DataFrame:
    """A row for each device of each look, by rising time: `at`, `device`, and HISTORY.

    Where nobody looked for a while, a row without figures stands in between, so that no line bridges that.
    """
    rows: list[dict[str, object]] = []
    devices: list[str] = []
    before = None
    for look in looks:
        if before is not None and look.at - before > GAP * interval:
            rows += [{"at": (before + look.at) / 2, "device": device} for device in devices]
        before = look.at
        if look.gpus:
            found = {one.label: {name: getattr(one.snapshot, name) for name in HISTORY} for one in look.gpus}
        else:
            host = look.host
            figures = {
                "memory_used_bytes": host.memory_used_bytes,
                "memory_total_bytes": host.memory_total_bytes,
                "busy_percent": host.busy_percent,
                "sm_clock_mhz": host.clock_mhz,
            }
            found = {"this machine": figures}
        devices = list(found)
        rows += [{"at": look.at, "device": device, **figures} for device, figures in found.items()]
    table = pd.DataFrame(rows, columns=["at", "device", *HISTORY])
    table[HISTORY] = table[HISTORY].astype("float64")
    table["at"] = pd.to_datetime(table["at"], unit="s", utc=True)
    return table


def size(number: int | None) -> str:
    """Bytes for people."""
    return NOT_TOLD if number is None else f"{number / 2**30:.1f} GiB"


def of(value: float | None, limit: float | None, unit: str) -> str:
    """Such as '1410 of 1980 MHz'; what is not told is said so."""
    parts = [NOT_TOLD if number is None else f"{number:.0f}" for number in (value, limit)]
    if value is None and limit is None:
        return NOT_TOLD
    return f"{parts[0]} of {parts[1]} {unit}" if limit is not None else f"{parts[0]} {unit}"


def throttling(reasons: tuple[str, ...] | None) -> str:
    """What holds the clocks down, in a sentence."""
    if reasons is None:
        return f"{NOT_TOLD}: the driver does not say what holds the clocks down"
    if not reasons:
        return "nothing holds the clocks down"
    return (
        f"clocks are held down: {', '.join(reasons)}"
        if reasons != ("idle",)
        else "idle: clocks are low for lack of work"
    )
