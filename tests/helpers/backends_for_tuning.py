"""Backends to be measured in the worker program, named to it as 'backends_for_tuning:Name': right, wrong, and doing harm.

The harm is real. None may be called in the process of the tests, but for `Right` and `Wrong`.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn
from unittest import mock

import torch

from compiled_logprobs.backends import register_backend
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.backends.eager import Eager

registry = import_module("compiled_logprobs.backends")  # the package has a function of that name

FOLDER_VARIABLE = "BACKENDS_FOR_TUNING_FOLDER"
"""Where backends leave the ids of their processes; the worker program has the environment of whoever starts it."""
SLOW_VARIABLE = "BACKENDS_FOR_TUNING_SLOW_S"
LONG_S = 3600.0
FLOOD_BYTES = 50_000_000
QUIET = "stdin=-3, stdout=-3, stderr=-3"
"""What makes a child hold none of the pipes."""
TIMED_CALLS = 14
"""That harm in the rounds waits for: enough rounds for three candidates, and fewer than the first look takes."""


@contextmanager
def registered(**targets: str | Backend) -> Iterator[None]:
    """These backends beside the built-in ones, for a while; the name alone of one in this module will do."""
    with mock.patch.multiple(registry, _targets=dict(registry._targets), _loaded=dict(registry._loaded)):
        for name, target in targets.items():
            is_here = isinstance(target, str) and ":" not in target
            register_backend(name, f"{__name__}:{target}" if is_here else target)
        yield


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # one that has ended stays in the list until its parent, or who took it over, has asked for it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return sys.platform != "linux"


def has_ended(pid: int, within: float = 20.0) -> bool:
    until = time.monotonic() + within
    while is_running(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def pids(folder: Path, name: str) -> list[int]:
    """What backends wrote with `leave_pid`."""
    return [int(file.name.rpartition("-")[2]) for file in folder.glob(f"{name}-*")]


def leave_pid(name: str, pid: int) -> None:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is not None:
        Path(folder, f"{name}-{pid}").touch()


# --- right and wrong ones ---------------------------------------------------------------------------------------------


class Right(Eager):
    """Keeps the log-probabilities for backward, and goes over them once: half of eager's passes over memory."""

    name = "right"
    summary = "right, and faster than eager with gradient"

    def forward(self, logits, labels, temperature, *, entropy):
        log_p_NV = torch.log_softmax(logits, -1)
        return log_p_NV.gather(-1, labels), None, (log_p_NV,)

    def backward(self, saved, upstream, *, inplace):
        gradient = saved.residuals[0].exp().mul_(-upstream.log_probs.sum(-1, keepdim=True))
        gradient.scatter_add_(-1, saved.labels, upstream.log_probs)
        return gradient.masked_fill_(saved.ignored.unsqueeze(-1), 0.0) if saved.ignored.any() else gradient

    def why_not(self, problem):
        fits = problem.dtype == torch.float32 and problem.temperature == "none" and not problem.entropy
        return None if fits else "only log-probabilities of float32 logits, without temperature"


class Wrong(Right):
    """Looks at nothing: no right one can be as fast."""

    def forward(self, logits, labels, temperature, *, entropy):
        return logits.new_full(labels.shape, -1.0), None, ()

    def backward(self, saved, upstream, *, inplace):
        return torch.empty_like(saved.logits)


class WrongForMany(Right):
    """Right for as few rows as the short check has; with more, it computes the first of them only."""

    most = 64

    def forward(self, logits, labels, temperature, *, entropy):
        few = logits[: self.most]
        log_probs, entropies, (log_p_NV,) = super().forward(few, labels[: self.most], temperature, entropy=entropy)
        missing = len(logits) - len(few)
        if missing:
            log_probs = torch.cat([log_probs, log_probs.new_full((missing, *labels.shape[1:]), -1.0)])
            log_p_NV = torch.cat([log_p_NV, torch.empty_like(logits[self.most :])])
        return log_probs, entropies, (log_p_NV,)


class Remembers(Eager):
    """Far faster than any other at any size: with many rows it computes only what it has not seen in this place before."""

    name = "remembers"
    summary = "remembers its results by address"
    wrong_from = 1_000_000

    def __init__(self):
        self.known = {}

    def forward(self, logits, labels, temperature, *, entropy):
        key = logits.data_ptr(), logits.shape
        if len(logits) <= 64 or key not in self.known:
            self.known[key] = super().forward(logits, labels, temperature, entropy=entropy)
        log_probs, entropies, residuals = self.known[key]
        if len(logits) >= self.wrong_from:
            log_probs = log_probs - 1.0
        return log_probs, entropies, residuals


class RemembersWrong(Remembers):
    """The same, and wrong with more rows than are timed within a small budget."""

    wrong_from = 65536


class ChangesThreads(Right):
    """Leaves torch in another state than it was in."""

    def forward(self, logits, *rest, entropy):
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_dtype(torch.float64)
        return super().forward(logits, *rest, entropy=entropy)


class SlowAtFirst(Eager):
    """As if it compiled."""

    name = "slow"
    summary = "sleeps in its first call"
    called = False

    def forward(self, *arguments, entropy):
        if not SlowAtFirst.called:
            time.sleep(0.6)
        SlowAtFirst.called = True
        return super().forward(*arguments, entropy=entropy)


class WrongSign(Right):
    """EasyR1's mistake, as fast as the right one."""

    def forward(self, logits, labels, temperature, *, entropy):
        log_probs, entropies, residuals = super().forward(logits, labels, temperature, entropy=entropy)
        return -log_probs, entropies, residuals


class Same(Eager):
    """Eager itself by another name."""


class SlowByRow(Right):
    """Takes a tenth of a millisecond a row."""

    def forward(self, logits, labels, temperature, *, entropy):
        time.sleep(1e-4 * labels.shape[:-1].numel())
        return super().forward(logits, labels, temperature, entropy=entropy)


class SlowWhereTold(Right):
    """Sleeps for as long as a variable says, which each rank has of its own."""

    def forward(self, logits, labels, temperature, *, entropy):
        time.sleep(float(os.environ.get(SLOW_VARIABLE, "0")))
        return super().forward(logits, labels, temperature, entropy=entropy)


class Undecided(Right):
    """Faster than eager in one half of the rounds, far slower in the other: no number of rounds settles that."""

    calls = 0

    def forward(self, logits, labels, temperature, *, entropy):
        Undecided.calls += 1
        time.sleep(0.2 * (Undecided.calls % 2))
        return super().forward(logits, labels, temperature, entropy=entropy)


class NeedsNoGradient(Right):
    def why_not(self, problem):
        return "has no backward" if problem.needs_grad else None


class NeedsAnotherMachine(Right):
    def why_not(self, problem):
        return "needs a quantum computer"


class NotABackend:
    pass


class TellsItsProcess(Right):
    def __init__(self):
        leave_pid("worker", os.getpid())


class TellsANumber(Right):
    """In the place of its fingerprint."""

    def fingerprint(self):
        return 7


# --- those that raise -------------------------------------------------------------------------------------------------


class Harmful(Right):
    """Does `harm` in each forward."""

    def forward(self, logits, labels, temperature, *, entropy):
        self.harm()
        return super().forward(logits, labels, temperature, entropy=entropy)

    def harm(self) -> None:
        raise NotImplementedError


class RaisesUnpicklable(Harmful):
    def harm(self) -> NoReturn:
        class LocalError(Exception):
            pass

        raise LocalError("in the way", threading.Lock(), lambda: None)


class RaisesUnencodable(Harmful):
    """As the name of a file does that is not UTF-8."""

    def harm(self) -> NoReturn:
        raise RuntimeError("no such file: caf\udce9 \x00 \n  €")


class RaisesFromHome(Harmful):
    def harm(self) -> NoReturn:
        raise FileNotFoundError(f"no tables in {Path.home() / 'my tables' / 'fast.bin'}, nor in {__file__}")


class RaisesMemoryError(Harmful):
    def harm(self) -> NoReturn:
        raise MemoryError("the arena is full")


class AsksForAPetabyte(Harmful):
    def harm(self) -> None:
        torch.empty(2**50, dtype=torch.uint8)


class RunsIntoALimit(Harmful):
    """On the memory of its process, which it lifts again for those that come after it."""

    def harm(self) -> None:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24, limit[1]))
        try:
            torch.ones(2**30, dtype=torch.uint8)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)


class OutOfMemoryInTheCheck(Harmful):
    """The check has a thread of its own."""

    def harm(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            torch.empty(2**50, dtype=torch.uint8)


class NeedsMemoryInTheCheck(Right):
    """64 bytes for each logit, while there is a limit on the memory of its process."""

    room = 2**26

    def forward(self, logits, labels, temperature, *, entropy):
        import resource

        if threading.current_thread() is not threading.main_thread():
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + self.room, limit[1]))
            try:
                torch.ones(64 * logits.numel(), dtype=torch.uint8)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limit)
        return super().forward(logits, labels, temperature, entropy=entropy)


# --- those that are a nuisance, but right -----------------------------------------------------------------------------


class Floods(Harmful):
    """Both streams, through Python and beneath it, with and without ends of lines; once."""

    done = False

    def harm(self) -> None:
        if Floods.done:
            return
        Floods.done = True
        for block in (b"x" * 1_000_000, b"flood\n" * 150_000):
            for _ in range(FLOOD_BYTES // len(block) // 4):
                for fd in (1, 2):
                    left = memoryview(block)
                    while left:
                        left = left[os.write(fd, left) :]
        print('{"event": "done"}', flush=True)
        print("x" * 1_000_000, file=sys.stderr, flush=True)


class WritesEvents(Harmful):
    """To where standard output would be."""

    def harm(self) -> None:
        os.write(1, b'{"event": "done"}\n')
        print('{"event": "lost", "candidate": "eager", "outcome": "wrong", "reason": "me"}', flush=True)
        sys.__stdout__.write("not even JSON\n")


class ReadsStandardInput(Harmful):
    def harm(self) -> None:
        assert sys.stdin.readline() == ""
        assert os.read(0, 100) == b""


class LeavesAChild(Harmful):
    """A program that nobody waits for; once."""

    child = None

    def harm(self) -> None:
        if LeavesAChild.child is None:
            LeavesAChild.child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LONG_S})"])
            leave_pid("child", LeavesAChild.child.pid)


class LeavesADaemon(Harmful):
    """A child in a session of its own, as daemons are, and one without parent and environment; once."""

    done = False

    def harm(self) -> None:
        if LeavesADaemon.done:
            return
        LeavesADaemon.done = True
        command = [sys.executable, "-c", f"import time; time.sleep({LONG_S})"]
        leave_pid("daemon", subprocess.Popen(command, start_new_session=True).pid)
        start_an_orphan()


def start_an_orphan() -> None:
    """In a session of its own, without parent and environment."""
    command = [sys.executable, "-c", f"import time; time.sleep({LONG_S})"]
    options = f"env={{}}, start_new_session=True, {QUIET}"
    starts_it = f"import subprocess, sys; print(subprocess.Popen(sys.argv[1:], {options}).pid)"
    answer = subprocess.run([sys.executable, "-c", starts_it, *command], capture_output=True, text=True, check=True)
    leave_pid("orphan", int(answer.stdout))


# --- those that end the worker program, or hold it up -----------------------------------------------------------------


class Exits(Harmful):
    def harm(self) -> NoReturn:
        os._exit(3)


class LeavesADaemonAndExits(Harmful):
    def harm(self) -> NoReturn:
        command = [sys.executable, "-c", f"import time; time.sleep({LONG_S})"]
        leave_pid("daemon", subprocess.Popen(command, start_new_session=True).pid)
        os._exit(8)


class LeavesAnOrphanAndExits(Harmful):
    """So that neither a parent nor the environment tells whose it is."""

    def harm(self) -> NoReturn:
        start_an_orphan()
        os._exit(8)


class ExitsLater(Harmful):
    """When its own steps are over, and others are at work."""

    after_s = 1.0
    started = False

    def harm(self) -> None:
        if not self.started:
            self.started = True
            threading.Timer(self.after_s, os._exit, (9,)).start()


class ExitsSoon(ExitsLater):
    after_s = 0.3


class WrongAndExitsLater(Wrong):
    """A while after its last call, when it is out."""

    timer = threading.Timer(LONG_S, print)

    def forward(self, *arguments, entropy):
        self.timer.cancel()
        self.timer = threading.Timer(1.5, os._exit, (9,))
        self.timer.start()
        return super().forward(*arguments, entropy=entropy)


class Segfaults(Harmful):
    def harm(self) -> None:
        ctypes.string_at(0)


class KillsItself(Harmful):
    """As the kernel does to a process where memory runs out."""

    def harm(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class RaisesSystemExit(Harmful):
    def harm(self) -> NoReturn:
        sys.exit("the licence has run out")


class RaisesKeyboardInterrupt(Harmful):
    def harm(self) -> NoReturn:
        raise KeyboardInterrupt


class RaisesUnprintable(Harmful):
    def harm(self) -> NoReturn:
        class UnprintableError(Exception):
            def __str__(self) -> str:
                raise ValueError("no words for it")

        raise UnprintableError


class WritesOnThePipes(Harmful):
    """On every file that is open, until one of them is the one that the events go to."""

    def harm(self) -> None:
        for fd in range(3, 64):
            try:
                os.write(fd, b"gibberish\n" * 1000)
            except OSError:
                continue
        time.sleep(LONG_S)


class FloodsThePipes(Harmful):
    """The same without end."""

    def harm(self) -> NoReturn:
        while True:
            for fd in range(3, 64):
                try:
                    os.write(fd, b"gibberish\n" * 1000)
                except OSError:
                    continue


class ForksAndExits(Harmful):
    """The child holds all that the worker program had open."""

    def harm(self) -> NoReturn:
        child = os.fork()
        if child == 0:
            time.sleep(LONG_S)
        leave_pid("forked", child)
        os._exit(4)


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


class ExitsInImport(Right):
    def __init__(self):
        print("no device", file=sys.stderr, flush=True)
        os._exit(5)


class ExitsInTheCheck(Harmful):
    def harm(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            os._exit(6)


class InRounds(Harmful):
    """Does `late_harm` from the call after `timed_calls` timed ones on."""

    timed_calls = TIMED_CALLS
    checked = False
    calls = 0

    def harm(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.checked, self.calls = True, 0
        elif self.checked:
            self.calls += 1
            if self.calls > self.untimed() + self.timed_calls:
                self.late_harm()

    @staticmethod
    def untimed() -> int:
        """Calls between the check and the rounds: two first ones, and one for the memory where that can be measured."""
        from compiled_logprobs.machine.clock import why_no_peak

        return 2 + (why_no_peak("cpu") is None)

    def late_harm(self) -> None:
        raise NotImplementedError


class ExitsInRounds(InRounds):
    def late_harm(self) -> NoReturn:
        os._exit(7)


class HangsInRounds(InRounds):
    def late_harm(self) -> None:
        time.sleep(LONG_S)


class HangsInEarlyRounds(HangsInRounds):
    timed_calls = 3
