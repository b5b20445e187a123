"""What to know before a profile run is started: how long it may take, what it needs, and whether the device is busy."""

import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compiled_logprobs.backends import EAGER, backends
from compiled_logprobs.choose.tune import current
from compiled_logprobs.cli.output import short
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.nvml import telemetry
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.rounds import BUFFERS, SHARE_OF_FREE_MEMORY
from compiled_logprobs.tuning.tuner import alone_on
from compiled_logprobs_dashboard.runs import Request

START_S = 15.0
"""About what it takes until the first problem begins, and to begin a worker program: torch is imported twice."""
DISK_A_PROBLEM = 2**18
"""Bytes that a decision and what stands beside it take at most, about."""
BUSY_SHARE = 0.25
"""Of the device: what more than this keeps busy would show in the figures."""


@dataclass(frozen=True)
class Preflight:
    """What a run would be like. None where this machine does not tell."""

    problems: tuple[Problem, ...]
    stored: int
    """How many of them are stored already, and would not be measured again."""
    most_seconds: float
    likely_seconds: float | None
    """By what problems took here before; None where none was measured."""
    largest: Problem | None
    """The problem with the most logits."""
    logits_bytes: int
    """Of that problem."""
    needed_bytes: int
    """That its inputs, its gradient and what is taken beside them need."""
    free_bytes: int | None
    warnings: tuple[str, ...]
    """In sentences."""
    obstacles: tuple[str, ...]
    """Why it cannot be started."""

    @property
    def to_measure(self) -> int:
        return len(self.problems) - self.stored


def preflight(request: Request, *, seconds_before: Sequence[float] = (), store: Store | None = None) -> Preflight:
    """What the run that `request` asks for would be like here. Nothing is measured, and nothing written.

    Args:
        request: the run.
        seconds_before: what problems took on this machine before, each.
        store: where it would be stored; by default the user's.

    Raises:
        InputError: the request is not valid.
    """
    device = torch.device(request.device)
    store = user_store() if store is None else store
    problems = request.problems()
    asked = [EAGER, *request.backends] if request.backends else backends()
    stored = 0 if request.again else sum(current(store, one, device, asked) is not None for one in problems)
    to_measure = len(problems) - stored
    largest = max(problems, key=_logits_bytes, default=None)
    needed = 0 if largest is None else (BUFFERS + largest.needs_grad + 1) * _logits_bytes(largest)
    free = _free_bytes(device)
    warnings = [*_busy(device)]
    if largest is not None and free is not None and needed > SHARE_OF_FREE_MEMORY * free:
        warnings.append(
            f"{short(largest)} needs {needed / 2**30:.1f} GiB, and the run takes at most {SHARE_OF_FREE_MEMORY:.0%} of the "
            f"{free / 2**30:.1f} GiB that are free: fewer rows will be timed, and the result says so."
        )
    obstacles = _obstacles(store.root, to_measure)
    likely = None
    if seconds_before:
        likely = START_S + to_measure * min(request.budget_s, statistics.median(seconds_before))
    return Preflight(
        problems=tuple(problems),
        stored=stored,
        most_seconds=START_S + to_measure * request.budget_s,
        likely_seconds=likely,
        largest=largest,
        logits_bytes=0 if largest is None else _logits_bytes(largest),
        needed_bytes=needed,
        free_bytes=free,
        warnings=tuple(warnings),
        obstacles=tuple(obstacles),
    )


def _logits_bytes(problem: Problem) -> int:
    return problem.rows * problem.vocab * problem.dtype.itemsize


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cpu":
        return clock.free_memory(device)
    # Through the driver's library: torch would take some of the GPU's memory to answer, for as long as the dashboard lives.
    seen = telemetry(device).snapshot()
    return None if seen is None else seen.memory_free_bytes  # the total holds what the driver keeps for itself


def _busy(device: torch.device) -> list[str]:
    """What else uses the device now."""
    found = []
    with alone_on(device, 0) as alone:
        if not alone:
            found.append(f"Another process of this library is measuring on {device} now; the run would wait for it.")
    if device.type == "cpu":
        cores = os.cpu_count() or 1
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > BUSY_SHARE * cores:
            found.append(
                f"This machine was busy in the last minute: {load:.1f} programs ran or waited, for {cores} cores. "
                "What runs beside the measurement makes it slower and less certain."
            )
        return found
    seen = telemetry(device).snapshot()
    if seen is None:
        return found
    if seen.process_count:
        found.append(f"Processes that compute on {device} now: {seen.process_count}. They would share it with the run.")
    if seen.busy_percent is not None and seen.busy_percent > 100 * BUSY_SHARE:
        found.append(f"A kernel was running on {device} for {seen.busy_percent} % of the last moments.")
    return found


def _obstacles(root: Path, problems: int) -> list[str]:
    place = next((folder for folder in (root, *root.parents) if folder.is_dir()), None)
    if place is None or not os.access(place, os.W_OK | os.X_OK):
        return [f"Profiles cannot be written to {root}. Make it writable, or set COMPILED_LOGPROBS_PROFILES."]
    free = shutil.disk_usage(place).free
    if free < problems * DISK_A_PROBLEM:
        return [f"The disk that holds {root} has {free / 2**20:.0f} MiB left. Free some space."]
    return []
