"""Measure the candidates of a problem and decide: in the worker program, within a budget, alone on the device."""

import atexit
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import cuda

from compiled_logprobs.backends import EAGER, backends_for, is_built_in, target_of
from compiled_logprobs.decision import Decision, Evidence
from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.machine.clock import finish_queued, measurable, with_index
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.problem import Problem, bucket, problem_to_dict
from compiled_logprobs.tuning.headway import Headway
from compiled_logprobs.tuning.process import Event, Worker, WorkerLost
from compiled_logprobs.tuning.tally import Tally

LIMITS_S = {
    "import": 120.0,
    "compile": 180.0,
    "check": 180.0,
    "memory": 60.0,
    "time": 60.0,
    "inputs": 120.0,
    "full size": 120.0,
}
"""How long one step may take before it is taken for hanging."""
START_S = 120.0
"""How long the worker program may take to start: it imports torch."""
SHARE = 0.25
"""Of what is left of a limit for all of it, what a step of a third party's backend may take."""
ONCE = ("import", "compile", "check", "memory")
"""The steps that a candidate goes through once."""
BEFORE_ROUNDS = ("start", "import", "compile", "check", "memory", "time")
"""What goes on in the background where a budget ended in it."""


class TuningFailed(LogProbsError):
    """Nothing was decided; the message says why."""


class Tuner:
    """Decides problems one after another, on one device, in one worker program that is replaced where it is lost.

    A context manager, which ends the program. Nothing is stored here.

    Args:
        device: where to measure.
        short: whether the check has its fewer inputs.
        on_event: told each event of the worker program as it comes, but not the evidence, which is long; and
            `program_lost`. No time between two of them is longer than the longest of `LIMITS_S` and `START_S`, but for
            moments.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        short: bool = False,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._first_calls: dict[tuple[str, Problem], float] = {}
        self.short = short
        self.device, self._on_event = measurable(device), on_event  # another process has another current device
        self._worker: Worker | None = None
        self._is_reused = False
        self.getting_ready: threading.Thread | None = None
        """What compiles and checks on in the background, since a budget ended before all candidates were ready."""

    def __enter__(self) -> "Tuner":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_worker()

    def decide(
        self,
        problem: Problem,
        seconds: float,
        *,
        strict: bool = False,
        in_all: bool = False,
        headway: Headway | None = None,
        names: Sequence[str] | None = None,
        incumbent: str | None = None,
        logits_backend: str | None = None,
    ) -> tuple[Decision, Evidence]:
        """Measure the bucket of `problem`; returns the decision, and what it rests on.

        Args:
            problem: what to decide.
            seconds: for the rounds; N shrinks where they would take longer. To import, compile and check comes before,
                and takes none of them.
            strict: whether to end when they are over, whatever is under way, and whether what comes before has a limit
                in all (`tally.GET_READY_S`): at the price, perhaps, of no decision. Else each step only has the limit
                after which it is taken for hanging, and what was spent on a program that was lost does not count.
            in_all: with `strict`, whether the seconds are for what comes before the rounds, too.
            headway: of earlier processes, and from now on of this one; with `strict` what they have done is not done
                again.
            names: of the backends to measure; the baseline is always among them. By default all that are registered.
            incumbent: the backend that has served so far, which only a clear win replaces.
            logits_backend: from hidden states: the name of what candidates are handed for logits; by default the first
                that can run them.

        Raises:
            TuningFailed: no decision came about.
        """
        began = time.monotonic()
        registered = backends_for(problem)
        asked = registered if names is None else names
        in_order = [EAGER, *(name for name in registered if name in asked and name != EAGER)]
        tally = Tally(bucket(problem), in_order, incumbent, seconds if strict else None, in_all=in_all, headway=headway)
        while True:
            try:
                self._run(tally, seconds, logits_backend, headway)
                break
            except WorkerLost as error:
                over = time.monotonic() >= tally.ends
                if over and headway is not None and not (in_all or tally.has_enough_rounds()):
                    headway.note_cut(tally.candidate, in_rounds=tally.in_rounds)
                if over and error.outcome == "timeout" and not tally.in_rounds and tally.step in BEFORE_ROUNDS:
                    self._leave_to_get_ready(self._order(tally, seconds, logits_backend, headway), headway, tally.step)
                self._end_worker()
                self._on_event({"event": "program_lost", "outcome": error.outcome, "reason": error.reason})
                if tally.step == "start" and self._is_reused and not over:
                    continue  # it has ended between two problems: a new one takes its place
                doing = tally.doing()
                # That the budget ends is no candidate's fault; a crash is, also then, and so is a call that does not
                # return.
                blames = not over or error.outcome == "crashed" or tally.is_stuck()
                survives = blames and tally.lose_program(error.outcome, error.reason)
                if over:
                    if tally.has_enough_rounds():
                        break
                    raise TuningFailed(f"{tally.what_ended()} ended {doing}") from error
                if not survives:
                    raise TuningFailed(f"the worker program was lost {doing}: {error.reason}") from error
            except BaseException:
                self._end_worker()  # it may be in the middle of something
                raise
        if not tally.times():
            outcomes = "; ".join(f"{name}: {each.outcome}: {each.reason}" for name, each in tally.candidates.items())
            raise TuningFailed(f"no backend could be measured: {outcomes}")
        if headway is not None:
            headway.settle()
        return tally.decide(self.device, short=self.short, tuning_seconds=time.monotonic() - began)

    def _run(self, tally: Tally, seconds: float, logits_backend: str | None, headway: Headway | None) -> None:
        """Have the worker program measure what is left of the candidates."""
        finish_queued(self.device)  # such as the forward pass of a model, which the candidates would wait for
        tally.begin()
        self._is_reused = self._worker is not None
        if self._worker is None:
            self._worker = Worker()
            self._on_event(self._next_event(self._worker, tally))
        self._worker.send(self._order(tally, seconds, logits_backend, headway))
        while True:
            event = self._next_event(self._worker, tally)
            if event["event"] == "first_call":  # a later problem of the same kind finds its code compiled
                key = event["candidate"], tally.problem._replace(rows=0)
                tally.hear({**event, "seconds": self._first_calls.setdefault(key, event["seconds"])})
            else:
                tally.hear(event)
            if headway is not None:
                headway.hear(event)
            if event["event"] != "evidence":
                self._on_event(event)
            if event["event"] == "started" and event["environment"] != fingerprint_of(self.device):
                raise TuningFailed("the worker program finds itself in another environment than this process")
            if event["event"] == "done":
                return

    def _order(
        self, tally: Tally, seconds: float, logits_backend: str | None, headway: Headway | None
    ) -> dict[str, Any]:
        """What the worker program is sent."""
        targets = ((name, target_of(name)) for name in tally.alive)
        too_slow = headway.too_slow if headway is not None and tally.budget_s is not None else 0
        return {
            "problem": problem_to_dict(tally.problem),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "candidates": [[name, target if isinstance(target, str) else None] for name, target in targets],
            "checked": tally.passed,
            "incumbent": tally.incumbent,
            "logits_backend": logits_backend,
            "short": self.short,
            "plain": tally.with_plain and not too_slow,
            "seconds": min(seconds, tally.rounds_s),
            "strict": tally.budget_s is not None,
            "in_all": tally.in_all,
            "too_slow": too_slow,
            "seed": tally.seed,
        }

    @staticmethod
    def _next_event(worker: Worker, tally: Tally) -> Event:
        left = tally.ends - time.monotonic()
        if tally.candidate is not None and not is_built_in(tally.candidate) and tally.step in ONCE and not tally.in_all:
            left *= SHARE  # if it hangs, the others are to have their turn
        return worker.next_event(within=min(LIMITS_S.get(tally.step, START_S), left))

    def _leave_to_get_ready(self, order: dict[str, Any], headway: Headway | None, step: str) -> None:
        """Have the program compile and check on in the background, on a CPU: an accelerator's memory is the caller's.

        Args:
            order: what it is to do, which it may not have been told yet where `step` is "start".
        """
        worker = self._worker
        if worker is None or self.device.type != "cpu":
            return
        self._worker = None
        if step == "start":
            worker.send(order)
        self.getting_ready = get_ready_apart(worker, headway)

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None


def compile_apart(problem: Problem, name: str, device: torch.device, headway: Headway) -> threading.Thread:
    """Have a worker program compile the backend called `name`, which needs no check; raises WorkerLost or OSError."""
    tuner = Tuner(device, short=True)
    tally = Tally(bucket(problem), [name], None)
    worker = Worker()
    worker.send(tuner._order(tally, 0.0, None, None) | {"checked": [name]})
    return get_ready_apart(worker, headway)


def get_ready_apart(worker: Worker, headway: Headway | None) -> threading.Thread:
    """Let `worker` do its job up to the rounds in the background, for `headway`.

    It runs where others leave a processor idle, holds nothing that they wait for, and ends with this process.
    """
    owner = os.getpid()
    worker.give_way()

    def end() -> None:
        if os.getpid() == owner:  # and not in a forked child
            worker.end()

    def finish() -> None:
        with worker, contextlib.suppress(WorkerLost):
            while (event := worker.next_event(within=LIMITS_S["compile"]))["event"] != "done":
                if event["event"] == "step" and event["step"] not in BEFORE_ROUNDS:
                    break
                if headway is not None:
                    headway.hear(event)
        atexit.unregister(end)

    atexit.register(end)
    thread = threading.Thread(target=finish, daemon=True, name="getting ready")
    try:
        thread.start()
    except RuntimeError:  # no room for another thread
        atexit.unregister(end)
        worker.end()
        raise
    return thread


def name_of(device: torch.device) -> str:
    """What tells `device` from every other of this machine, in all its processes."""
    if device.type != "cuda":
        return device.type
    return str(getattr(cuda.get_device_properties(device), "uuid", with_index(device).index))


@contextlib.contextmanager
def alone_on(device: torch.device, within: float) -> Iterator[bool]:
    """Hold the lock of `device` that all processes of this machine share; False if another holds it for too long."""
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as stack:
        is_alone = True
        try:
            lock = FileLock(Path(tempfile.gettempdir(), f"compiled-logprobs-{name_of(device)}.lock"), mode=0o666)
            stack.enter_context(lock.acquire(timeout=within))
        except Timeout:
            is_alone = False
        except OSError:  # no place for a lock, or one of another user: then there is no order
            pass
        yield is_alone
