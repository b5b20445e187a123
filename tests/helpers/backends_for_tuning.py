"""Backends for the worker program, named to it as 'tests.helpers.backends_for_tuning:Name': right, wrong, and doing
harm.

The harm is real: only those above `Harmful` may be called in the process of the tests.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn
from unittest import mock

import psutil
import torch

from compiled_logprobs.backends import register_backend
from compiled_logprobs.backends.base import AnyBackend
from compiled_logprobs.backends.chunked import Chunked
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.operation import contract

registry = import_module("compiled_logprobs.backends")  # the package has a function of that name

FOLDER_VARIABLE = "BACKENDS_FOR_TUNING_FOLDER"
"""Where backends leave the ids of their processes; the worker program has the environment of whoever starts it."""
LONG_S = 3600.0
FLOOD_BYTES = 20_000_000


@contextmanager
def registered(*, from_hidden: bool = False, **targets: str | AnyBackend) -> Iterator[None]:
    """These backends beside the built-in ones, for a while; the name alone of one in this module will do."""
    tables = {name: dict(getattr(registry, name)) for name in ("_targets", "_from_hidden", "_loaded")}
    with mock.patch.multiple(registry, **tables):
        for name, target in targets.items():
            is_here = isinstance(target, str) and ":" not in target
            register_backend(name, f"{__name__}:{target}" if is_here else target, from_hidden=from_hidden)
        yield


def has_ended(pid: int, within: float = 20.0) -> bool:
    """Whether it ends by then; one that has ended stays in the list until its parent has asked for it."""
    until = time.monotonic() + within
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
    return True


def pids(folder: Path, name: str) -> list[int]:
    """What backends wrote with `leave_pid`."""
    return [int(file.name.rpartition("-")[2]) for file in folder.glob(f"{name}-*")]


def leave_pid(name: str, pid: int) -> None:
    Path(os.environ[FOLDER_VARIABLE], f"{name}-{pid}").touch()


# --- right and wrong ones ---------------------------------------------------------------------------------------------


class Right(Eager):
    """Without chunks, and with torch's own softmax: half of eager's passes over memory."""

    name = "right"
    summary = "right, and faster than eager with gradient"

    def forward(self, inputs, wanted):
        rows, m = contract.clean(inputs), inputs.logits.amax(-1)
        log_probs = torch.log_softmax(inputs.logits, -1).gather(-1, rows.labels)
        log_s = inputs.logits.gather(-1, rows.labels)[:, 0] - m - log_probs[:, 0]
        return contract.finish(rows, wanted, log_probs, m, log_s)

    def backward(self, inputs, stats, upstream, *, inplace):
        rows = contract.clean(inputs)
        upstream = contract.clean_upstream(rows, upstream)
        gradient = torch.softmax(inputs.logits, -1).mul_(-upstream.log_probs.sum(-1, keepdim=True))
        gradient.scatter_add_(-1, rows.labels, upstream.log_probs)
        return gradient.masked_fill_(rows.dropped.unsqueeze(-1), 0.0) if rows.dropped.any() else gradient

    def why_not(self, problem):
        fits = problem.dtype == torch.float32 and problem.temperature == "none" and not problem.entropy
        return None if fits else "only log-probabilities of float32 logits, without temperature"


class WrongSign(Right):
    """EasyR1's mistake, as fast as the right one."""

    def forward(self, inputs, wanted):
        results = super().forward(inputs, wanted)
        return results._replace(log_probs=-results.log_probs)


class Remembers(Eager):
    """Far faster than any other at any size: with many rows it computes only what it has not seen in this place
    before."""

    name = "remembers"
    summary = "remembers its results by address"
    wrong_from = 1_000_000

    def __init__(self):
        self.results = {}

    def forward(self, inputs, wanted):
        logits = inputs.logits
        key = logits.data_ptr(), logits.shape, logits._version
        if len(logits) <= 64 or key not in self.results:  # with the logits, so that nothing else comes to lie there
            self.results[key] = logits, super().forward(inputs, wanted)
        results = self.results[key][1]
        return results._replace(log_probs=results.log_probs - float(len(logits) >= self.wrong_from))


class RemembersWrong(Remembers):
    """The same, and wrong with more rows than are timed within a small budget."""

    wrong_from = 65536


class NeedsFlatLogits(Right):
    def why_not(self, problem):
        return None if problem.layout == "flat" else "takes flat logits only"


class NeedsAnotherMachine(Right):
    def why_not(self, problem):
        return "needs a quantum computer"


class TellsANumber(Right):
    def fingerprint(self):
        return 7


class NotABackend:
    pass


class AtOnce(Chunked):
    """From hidden states: all logits at once, within whatever limit it is asked to keep."""

    def __init__(self):
        super().__init__("at_once", "all of them", None)

    def why_not(self, problem):
        return None

    def least_memory(self, problem):
        return None

    def _chunks(self, inputs):
        return iter([slice(0, len(inputs.labels))])


class ForgetsTheWeight(AtOnce):
    def backward(self, *arguments):
        gradients = super().backward(*arguments)
        return gradients._replace(weight=torch.zeros_like(gradients.weight))


# --- those that do harm -----------------------------------------------------------------------------------------------


class Harmful(Right):
    """Does `harm`, and fails if that has not ended it."""

    def forward(self, inputs, wanted):
        self.harm()
        raise RuntimeError("it is done")

    def harm(self) -> None:
        raise NotImplementedError


class RaisesFromHome(Harmful):
    """With the name of a file that is not UTF-8."""

    def harm(self) -> NoReturn:
        raise FileNotFoundError(f"no caf\udce9 \n in {Path.home() / 'my tables' / 'fast.bin'}, nor in {__file__}")


class RaisesMemoryError(Harmful):
    def harm(self) -> NoReturn:
        raise MemoryError("the arena is full")


class MeddlesWithStreams(Harmful):
    """Floods both, beneath Python; writes events to where standard output would be; reads what could be jobs."""

    def harm(self) -> None:
        for block in (b"x" * 1_000_000, b"flood\n" * 150_000):
            for _ in range(FLOOD_BYTES // len(block) // 4):
                for fd in (1, 2):
                    left = memoryview(block)
                    while left:
                        left = left[os.write(fd, left) :]
        print('{"event": "lost", "candidate": "eager", "outcome": "wrong", "reason": "me"}', flush=True)
        sys.__stdout__.write("not even JSON\n")
        assert sys.stdin.readline() == ""
        assert os.read(0, 100) == b""


class LeavesChildren(Harmful):
    """Programs that nobody waits for, one of them in a session of its own, as daemons are."""

    def harm(self) -> None:
        leave_pid("worker", os.getpid())
        for is_apart in (False, True):
            command = [sys.executable, "-c", f"import time; time.sleep({LONG_S})"]
            leave_pid("child", subprocess.Popen(command, start_new_session=is_apart).pid)


class Exits(Harmful):
    def harm(self) -> NoReturn:
        print("no device", file=sys.stderr, flush=True)
        os._exit(3)


class Loops(Harmful):
    def harm(self) -> NoReturn:
        leave_pid("looping", os.getpid())
        while True:
            pass


class HangsInImport(Right):
    """With signals that it could be told by to end shut out."""

    def __init__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(LONG_S)
