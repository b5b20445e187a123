"""Live GPU: what the GPUs of this machine are doing, or its CPU where there is none."""

from typing import Any

import pandas as pd
import streamlit as st
from compiled_logprobs_dashboard import runs, selection
from compiled_logprobs_dashboard.charts.live_gpu import line
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.machine import NOT_TOLD, GpuLook, Host, Machine, process_name
from compiled_logprobs_dashboard.tables.live_gpu import history, of, size, throttling

EVERY = {"off": None, "1 s": 1.0, "2 s": 2.0, "5 s": 5.0}
BUSY = (
    "The share of the last moments in which a kernel was running. 100 % does not mean that the GPU is full: one "
    "small kernel will do."
)
MEMORY = (
    "What processes use on the device: more than torch has allocated. The driver keeps some of the rest for itself."
)
LINES = [
    ("memory_used_bytes", "memory in use", "GiB"),
    ("busy_percent", "time busy", "%"),
    ("sm_clock_mhz", "clock", "MHz"),
    ("power_w", "power", "W"),
]


@st.cache_resource
def the_machine() -> Machine:
    """One for all tabs."""
    return Machine()


def show_gpu(look: GpuLook) -> None:
    """Figures of one GPU, or of a slice."""
    seen = look.snapshot
    st.subheader(plain(look.label))
    if look.trouble is not None:
        st.error(
            f"The driver does not answer for this GPU: {plain(look.trouble)}. What it told before is in the charts."
        )
    if look.is_slice:
        st.caption("Memory and processes are the slice's; all else is the whole GPU's.")
    memory = of(seen.memory_clock_mhz, seen.memory_clock_max_mhz, "MHz")
    show_figures(
        ("Memory in use", size(seen.memory_used_bytes), MEMORY),
        f"of {size(seen.memory_total_bytes)}; free: {size(seen.memory_free_bytes)}",
        ("A kernel was running", percent(seen.busy_percent), BUSY),
        f"memory was at work (which is no share of the bandwidth): {percent(seen.memory_busy_percent)}",
        ("Clock", of(seen.sm_clock_mhz, None, "MHz"), None),
        f"at most {of(seen.sm_clock_max_mhz, None, 'MHz')}; memory {memory}",
        ("Power", of(seen.power_w, None, "W"), None),
        f"limit {of(seen.power_limit_w, None, 'W')}",
        ("Temperature", of(seen.temperature_c, None, "°C"), None),
        f"persistence mode {on_or_off(seen.persistence_mode)}; MIG {on_or_off(seen.mig_mode)}",
    )
    held = seen.throttle_reasons is not None and set(seen.throttle_reasons) - {"idle"}
    (st.warning if held else st.caption)(f"Throttling: {throttling(seen.throttle_reasons)}.")
    if seen.processes is None:
        st.caption("Processes: n/a. The driver does not tell this user which there are.")
    elif not seen.processes:
        st.caption("No process computes on it.")
    else:
        names = [process_name(running.pid) for running in seen.processes]
        st.dataframe(
            pd.DataFrame(
                {
                    "process": [running.pid for running in seen.processes],
                    "name": [NOT_TOLD if name is None else plain_line(name) for name in names],
                    "memory": [size(running.memory_bytes) for running in seen.processes],
                }
            ),
            hide_index=True,
            width="content",
        )


def show_host(host: Host) -> None:
    """Figures of this machine's CPU and memory."""
    show_figures(
        ("Processors busy", percent(host.busy_percent), "Of all processors, since the look before."),
        f"{host.processors} processors",
        ("Load", f"{host.load:.2f}", None),
        "programs that ran or waited, averaged over the last minute",
        ("Memory in use", size(host.memory_used_bytes), None),
        f"of {size(host.memory_total_bytes)}; free for one process: {size(host.memory_free_bytes)}",
        ("Clock", of(host.clock_mhz, None, "MHz"), None),
        "mean of the processors",
    )


def show_figures(*data: Any) -> None:
    """Label, value and meaning of each figure, and then its caption, side by side."""
    for column, (label, value, meaning), caption in zip(st.columns(len(data) // 2), data[::2], data[1::2], strict=True):
        column.metric(label, value, help=meaning)
        column.caption(caption)


def percent(value: float | None) -> str:
    return NOT_TOLD if value is None else f"{value:.0f} %"


def on_or_off(value: bool | None) -> str:
    return NOT_TOLD if value is None else "on" if value else "off"


st.title("Live GPU")
measuring = runs.RUNS.is_measuring
every = st.segmented_control(
    "Refresh every",
    list(EVERY),
    default="off" if measuring else "2 s",
    key="refresh",
    bind="query-params",
    help="Off while a run measures: looking takes a little from what is measured.",
)
if measuring and EVERY.get(every or "off") is not None:
    st.warning("A profile run is going on: looking takes a little from what it measures.")


@st.fragment(run_every=EVERY.get(every or "off"))
def show() -> None:
    """All of it, again and again."""
    watched = the_machine()
    looks = watched.looks()
    now = looks[-1]
    if watched.reason is not None:
        st.info(
            f"No NVIDIA GPU is reported on here: {plain(watched.reason)}. This is the CPU and the memory of this "
            "machine instead."
        )
        show_host(now.host)
    else:
        drivers = sorted({gpu.driver for gpu in watched.gpus if gpu.driver})
        st.caption(f"As NVML tells it, in its order; driver {plain(', '.join(drivers) or NOT_TOLD)}.")
        for gpu in now.gpus:
            show_gpu(gpu)
        with st.expander("CPU and memory of this machine"):
            show_host(now.host)
    table = history(looks, watched.interval)
    table["memory_used_bytes"] /= 2**30
    st.subheader("The last minutes")
    columns = st.columns(2)
    lines = [entry for entry in LINES if table[entry[0]].notna().any()]
    for place, (column, title, unit) in enumerate(lines):
        with columns[place % 2]:
            last = table[column].dropna().iloc[-1]
            selection.chart(
                line(table, column, title, unit, top=100 if unit == "%" else None),
                alt=f"{title} over the last minutes, in {unit}; now {last:.4g}",
                key=f"live_{column}",
            )
    silent = [title for column, title, _ in LINES if table[column].isna().all()]
    if silent:
        st.caption(f"Not told here, so not drawn: {', '.join(silent)}.")


show()
