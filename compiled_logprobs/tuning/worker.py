"""The program in which candidates run: `python -m compiled_logprobs.tuning.worker`.

It reads jobs from standard input and writes events to what was standard output when it started, both as JSON, one a
line. Before anything that may crash or hang, an event says what comes next, so that whoever listens knows at which step
it ended. What candidates print goes to standard error.
"""

import ctypes
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import chain
from statistics import median
from typing import Any

import torch

from compiled_logprobs.backends import get_backend, is_built_in, register_backend
from compiled_logprobs.backends.base import AnyBackend
from compiled_logprobs.check.cases import cases
from compiled_logprobs.check.hidden_run import ROWS_OF_LOGITS
from compiled_logprobs.check.inputs import rows_compared
from compiled_logprobs.check.report import CheckReport
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.check.verdicts import yardstick_rows
from compiled_logprobs.decision import PLAIN
from compiled_logprobs.errors import BackendUnavailable, is_out_of_memory, nothing_can_serve_after
from compiled_logprobs.machine.bandwidth import measured_bandwidth, percent_of_bandwidth
from compiled_logprobs.machine.clock import MIB, free_memory, measurable
from compiled_logprobs.machine.environment import environment_of, without_paths
from compiled_logprobs.machine.nvml import Watch, telemetry
from compiled_logprobs.problem import Problem, problem_from_dict
from compiled_logprobs.tuning.rounds import LONGEST_REASON, Measurement
from compiled_logprobs.tuning.sizes import BUFFERS, SHARE_OF_FREE_MEMORY, sizes_of, top_within
from compiled_logprobs.tuning.statistics import LOOKS, Selection, far_behind, fewest_rounds, select

SHARE_OF_TIME = 0.6
"""Of the seconds that are left, what the rounds up to the first look may take; inputs have to be made, too."""
SHARE_WITH_PLAIN = 0.9
"""Of the same, what the fewest rounds that a choice needs may take with plain torch in them; else it is left out."""
SHARE_FOR_PROOF = 0.25
"""Of all seconds, where none may be added to them, what the rounds leave for calling the winner once with all rows."""
HALVED = 2
"""How often the size of what is timed, and looked at, is halved for each process that had not the time for it."""
CHECKED_LOGITS = {"cpu": 2**27}
"""Size of the largest input of the check; an accelerator takes the whole problem."""
BYTES_OF_A_LOGIT, OF_A_COPIED_LOGIT, OF_A_COMPARED_LOGIT = 28, 64, 200
"""What the check takes for each in float32, as measured and rounded up; where the rows of its view lie apart; and, on
top of that, for each that is held against float64."""
ONLY_THERE = (
    "only the process that registered it knows it; register it by its place, 'package.module:attribute', "
    "so that it can be imported where candidates are measured"
)


def main() -> None:
    """Serve jobs until standard input ends."""
    _die_with_parent()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    jobs = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def emit(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
        events.flush()

    emit("ready")
    for line in jobs:
        Job(json.loads(line), emit).run()
        emit("done")


class Job:
    """One problem: load, compile, check and time its candidates.

    Its order, as it was read:
        problem: as `problem_to_dict` gives it; for a bucket of N, its top.
        device, threads: where, and by how many threads of the CPU.
        candidates: [name, target] of each, the baseline first; the target of one that only its own process knows is
            None.
        checked: names of those that have passed the check already.
        logits_backend: the name of what candidates from hidden states are handed for logits; None: the first that can.
        incumbent: for `statistics.select`.
        short: whether the check has its fewer inputs.
        plain: whether plain torch is timed beside the candidates.
        seconds: for the rounds and their inputs, after which no further round begins once there are enough of them for
            a choice. What comes before, to import, compile and check, takes none of them.
        strict: whether all has to end by then, also the look at the winner with more rows than were timed.
        in_all: whether what comes before takes of those seconds.
        too_slow: in how many processes the seconds were over before the rounds, and the look at the winner, were done;
            with each there is less of both.
        seed: of all inputs.
    """

    def __init__(self, order: dict[str, Any], emit: Callable[..., None]) -> None:
        self._began = time.monotonic()
        torch.set_num_threads(order["threads"])
        self._order, self._emit = order, emit
        self._problem = problem_from_dict(order["problem"])
        self._device = measurable(order["device"])
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # as it is where the call that this is for comes from
        self._lost: set[str] = set()
        self._sizes = sizes_of(self._problem, self._device)

    def run(self) -> None:
        """Each candidate gets an event `lost` that says why, or `checked`, and then a time in each event `round`.

        Before `checked`, an event `evidence` holds what the check found case by case.
        """
        self._emit("started", environment=environment_of(self._device).fingerprint())
        alive: dict[str, AnyBackend] = {}
        seconds_a_logit = 0.0
        for name, target in self._order["candidates"]:
            backend = self._load(name, target)
            if backend is None:
                continue
            seconds = self._first_call(name, backend)
            if seconds is not None and (name in self._order["checked"] or self._check(name)):
                alive[name] = backend
                seconds_a_logit += seconds
        if not alive:
            return
        self._step(None, "inputs")
        self._ends = (self._began if self._order["in_all"] else time.monotonic()) + self._order["seconds"]
        calls = LOOKS[0] + BUFFERS + 1  # the rounds up to the first look, and the calls before them
        logits = SHARE_OF_TIME * (self._ends - time.monotonic()) / (calls * seconds_a_logit)
        timed = self._sizes.that_fit(logits, lambda part: all(_is_able(backend, part) for backend in alive.values()))
        for _ in range(HALVED * self._order["too_slow"]):
            timed = self._sizes.smaller(timed) or timed
        while not self._measure(alive, timed, seconds_a_logit):
            timed = self._sizes.smaller(timed) or timed

    def _load(self, name: str, target: str | None) -> AnyBackend | None:
        if target is None:
            self._lose(name, "unavailable", ONLY_THERE)
            return None
        self._step(name, "import")
        if not is_built_in(name):
            register_backend(name, target, from_hidden=self._problem.hidden is not None)
        try:
            backend: AnyBackend = get_backend(name, self._problem)
            reason = backend.why_not(self._problem)
            device_type, rows, vocab = self._problem[:3]
            plain = Problem(device_type, rows, vocab, torch.float32, hidden=self._problem.hidden)
            can_run_others = reason is not None and backend.why_not(plain) is None
            fingerprint = backend.fingerprint()
            if not isinstance(fingerprint, str):  # it would be stored, and nobody could read that
                raise TypeError(f"fingerprint() returned {fingerprint!r:.80}; a string is valid")
            self._emit("loaded", candidate=name, fingerprint=fingerprint)
        except BackendUnavailable as error:
            self._lose(name, "unavailable", error)
            return None
        except Exception as error:  # noqa: BLE001 - whatever a candidate raises is its outcome
            self._lose(name, "failed", f"import: {type(error).__name__}: {error}")
            return None
        if reason is not None:
            self._lose(name, "unsupported" if can_run_others else "unavailable", reason)
            return None
        return backend

    def _first_call(self, name: str, backend: AnyBackend) -> float | None:
        """Compile it on few rows; seconds that a call takes for each logit then, None if it fails."""
        pilot = self._sizes.pilot(lambda part: _is_able(backend, part))
        measurement = self._measurement(pilot, {name: backend}, look_at_results=False)  # the check tells more
        list(measurement.rounds(2))
        run = measurement.runs[name]
        if not run.alive:
            self._lose(name, run.outcome, run.reason)
            return None
        self._sizes.learn(run.extra_multiple)
        self._emit("first_call", candidate=name, seconds=run.first_call_seconds)
        return min(run.seconds) / _logits_of(pilot)

    def _check(self, name: str) -> bool:
        try:
            problem, report = self._report(name)
        except Exception as error:
            if not nothing_can_serve_after(error):
                raise
            self._lose(name, "oom" if is_out_of_memory(error) else "failed", f"check: {type(error).__name__}: {error}")
            return False
        (result,) = report.results  # of the one problem
        checks = [asdict(check) for check in result.checks]
        by_case = [asdict(case) for case in result.cases]
        for check in chain(checks, *(case["checks"] for case in by_case)):
            check["detail"] = _line(check["detail"])
        self._emit("evidence", candidate=name, cases=by_case)
        posed = cases(problem, short=self._order["short"], foreign=False) if problem.hidden is None else result.cases
        self._emit(
            "checked",
            candidate=name,
            rows=max(case.rows for case in posed),
            fewer_for_memory=problem.rows < self._rows_to_check(),
            checks=checks,
            repeatable=report.repeatable,
            row_invariant=report.row_invariant,
        )
        if not report.passed:
            detail = next(check.detail for check in result.checks if not check.passed)
            failed = f"{', '.join(report.reasons)}: {detail}"
            self._lose(name, "wrong", f"{report.causes[0]} ({failed})" if report.causes else failed)
        return report.passed

    def _report(self, name: str) -> tuple[Problem, CheckReport]:
        """Check the candidate: for which N, and with what result. N shrinks where memory is short.

        Raises:
            MemoryError: there is no room for one row. And what else nothing can serve after.
        """
        room = SHARE_OF_FREE_MEMORY * free_memory(self._device)
        rows = self._rows_to_check()
        while True:
            problem = self._problem._replace(rows=rows)
            self._step(name, "check")
            try:
                # By what is free, too: systems hand out memory that they do not have, and kill for it later.
                if (needed := bytes_of_check(problem)) > room:
                    raise MemoryError(f"it takes {needed / MIB:.0f} MiB, and may take {room / MIB:.0f} of what is free")
                return problem, check_backend(
                    name, problem, short=self._order["short"], device=str(self._device), seed=self._order["seed"]
                )
            except Exception as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
            rows = top_within(rows // 2)

    def _rows_to_check(self) -> int:
        """Where memory is not short."""
        most = CHECKED_LOGITS.get(self._device.type, math.inf) // self._problem.vocab
        return top_within(int(min(self._problem.rows, most)))

    def _measure(self, alive: Mapping[str, AnyBackend], problem: Problem, seconds_a_logit: float) -> bool:
        """False if there is no memory for the inputs, or no time for enough rounds, and less is worth a try."""
        provider = telemetry(self._device)
        ends = self._ends
        if self._order["strict"] and problem != self._problem:  # room for a look at the winner with all rows
            ends -= min(SHARE_FOR_PROOF * self._order["seconds"], _logits_of(self._problem) * seconds_a_logit)
        plain_s = 0.0
        if self._order["plain"]:
            left = SHARE_WITH_PLAIN * (ends - time.monotonic())
            plain_s = left / fewest_rounds(len(alive)) - _logits_of(problem) * seconds_a_logit
        measurement = self._measurement(problem, alive, plain_s=plain_s)
        self._emit("measuring", rows=problem.rows, vocab=problem.vocab)
        rounds = measurement.rounds(LOOKS[-1])
        try:
            first = next(rounds, None)  # None if no candidate got through the calls before
        except Exception as error:
            if not is_out_of_memory(error) or self._sizes.smaller(problem) is None:
                raise
            return False
        began = time.monotonic()
        with Watch(provider) as watch:
            for done in chain([] if first is None else [first], rounds):
                if self._lose_failed(measurement):
                    continue
                if done == 1:
                    for name, size in measurement.extra_bytes().items():
                        multiple = measurement.runs[name].extra_multiple
                        self._emit("memory", candidate=name, bytes=size, multiple=multiple)
                times = measurement.times()
                plain = measurement.plain_times()
                seconds = {name: series[-1] for name, series in times.items()}
                host_seconds = {name: series[-1] for name, series in measurement.host_times().items()}
                self._emit("round", seconds=seconds, host_seconds=host_seconds, plain=plain[-1] if plain else None)
                if times and self._problem.memory_limit is None:  # with one, the fastest may prove to take too much
                    for name, other in far_behind(times, keep=self._order["incumbent"]).items():
                        measurement.leave(name, other)
                        self._emit("behind", candidate=name, other=other)
                    times = measurement.times()
                fewest = fewest_rounds(len(times))  # fewer cannot speak for any candidate
                before, began = began, time.monotonic()
                # By the second, when none of its code is new: others may be at work since the first calls were timed.
                is_late = done == 2 and began + (fewest - done) * (began - before) > ends
                helps = 2 * sum([*seconds.values(), *plain[-1:]]) > began - before  # not what comes before each call
                if is_late and helps and self._order["strict"] and self._sizes.smaller(problem) is not None:
                    rounds.close()
                    return False
                if not times or (began > ends and done >= fewest) or self._selection(measurement, final=False):
                    break
        self._lose_failed(measurement)
        rounds.close()  # and with it the inputs
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what plain torch took is in nobody's way
        self._look_at_winner(measurement, seconds_a_logit)
        seen = None if (summary := watch.summary()) is None else asdict(summary)
        why = provider.reason
        self._emit("circumstances", bandwidth={}, percent={}, telemetry=seen, telemetry_reason=why)
        is_over = self._order["strict"] and time.monotonic() > self._ends
        # Last, since it may take seconds of a small budget; from hidden states it is products that take the time.
        if problem.hidden is None and measurement.times() and not is_over:
            self._step(None, "time")
            speed = measured_bandwidth(self._device)
            medians = {name: median(series) for name, series in measurement.times().items()}
            percent = {name: percent_of_bandwidth(problem, a_call, speed) for name, a_call in medians.items()}
            self._emit("circumstances", bandwidth=asdict(speed), percent=percent, telemetry=seen, telemetry_reason=why)
        return True

    def _look_at_winner(self, measurement: Measurement, seconds_a_logit: float) -> None:
        """Call the winner with more than was timed, as far as memory and time go, to see that it is right, and that it
        keeps to a limit of memory."""
        logits = math.inf
        if self._order["strict"]:  # by the seconds of a call of each, where one is called; with room for twice the time
            logits = (self._ends - time.monotonic()) / seconds_a_logit / 2 ** (HALVED * self._order["too_slow"] + 1)
            if self._problem.hidden is not None:  # where all of it, or nothing, is called
                logits *= len(measurement.runs)
        looked = self._sizes.of_look(measurement.problem, logits)
        while looked is not None and measurement.times():
            selection = self._selection(measurement, final=True)
            is_baseline = selection is None or selection.chosen == next(iter(measurement.times()))
            if selection is None or (is_baseline and looked.memory_limit is None):
                return
            name = selection.chosen
            full = self._measurement(looked, {name: get_backend(name, self._problem)})
            try:
                full.look_at(name)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                looked = self._sizes.of_look(measurement.problem, _logits_of(looked) / 2)
                continue
            if full.runs[name].alive:
                self._emit("proven", rows=looked.rows, bytes=full.runs[name].extra_bytes)
                return
            measurement.runs[name] = full.runs[name]
            self._lose_failed(measurement)

    def _selection(self, measurement: Measurement, *, final: bool) -> Selection | None:
        incumbent, extra_bytes = self._order["incumbent"], measurement.extra_bytes()
        return select(measurement.times(), incumbent=incumbent, extra_bytes=extra_bytes, final=final)

    def _measurement(self, problem: Problem, candidates: Mapping[str, AnyBackend], **options: Any) -> Measurement:
        return Measurement(
            problem,
            candidates,
            device=self._device,
            seed=self._order["seed"],
            on_step=self._step,
            whole=self._problem,
            logits_backend=self._order["logits_backend"],
            **options,
        )

    def _lose_failed(self, measurement: Measurement) -> bool:
        """Whether others run again, which were far behind one that has failed, so that this round counts for nobody."""
        for name, run in measurement.runs.items():
            if not run.alive and name not in self._lost:
                self._lose(name, run.outcome, run.reason)
        return measurement.bring_back()

    def _lose(self, name: str, outcome: str, reason: object) -> None:
        self._lost.add(name)
        self._emit("lost", candidate=name, outcome=outcome, reason=_line(reason))

    def _step(self, name: str | None, step: str) -> None:
        if self._device.type == "cuda":
            # After a fault every call fails, those of right candidates too: raise while the last is still to blame.
            torch.cuda.synchronize(self._device)
        self._emit("step", candidate=None if name == PLAIN else name, step=step)


def bytes_of_check(problem: Problem) -> int:
    """What a check takes at most, whatever the backend, for inputs of up to as many rows as `problem` has."""
    rows = problem.rows if problem.hidden is None else min(problem.rows, ROWS_OF_LOGITS)
    logits = rows * problem.vocab
    a_logit = OF_A_COPIED_LOGIT if problem.layout == "slice" else BYTES_OF_A_LOGIT
    compared = max(yardstick_rows(problem.vocab), min(rows, rows_compared(problem.vocab))) * problem.vocab
    return a_logit * max(1, problem.dtype.itemsize // 4) * logits + OF_A_COMPARED_LOGIT * compared


def _logits_of(problem: Problem) -> int:
    return problem.rows * problem.vocab


def _is_able(backend: AnyBackend, part: Problem) -> bool:
    """Whether it can run a part of the problem, whose limit of memory is one of all of it."""
    return backend.why_not(part._replace(memory_limit=None)) is None


def _line(message: object) -> str:
    """On one line, without paths, short, and fit for UTF-8, as the undecodable names of files are not."""
    line = without_paths(" ".join(str(message).split()))[:LONGEST_REASON]
    return line.encode("utf-8", "replace").decode("utf-8")


def _die_with_parent() -> None:
    """Have this process end with its parent, even while a candidate holds it up."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    main()
