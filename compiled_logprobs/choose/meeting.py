"""A meeting of the ranks of a process group: in each step all say something, and one conclusion holds for all of them.

It goes by the key-value store that every process group has, not by collectives. A collective waits as long as the group was
told to (10 minutes under NCCL, 30 under gloo by default), then the group is lost, under NCCL the process with it; and it can
succeed on one rank and fail on another. Here the limit of each wait is ours, the group stays as it was, and a conclusion is a
cell of the store that is written once, atomically: who waits in vain writes there that the meeting is over, and whatever got
there first is what every rank reads, also one that comes late.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from torch import distributed

from compiled_logprobs.errors import InputError, LogProbsError

SILENCE_S = 240.0
"""How long the first rank waits for the others when nobody gives a sign of life."""
GRACE_S = 30.0
"""How much longer the others wait for the first, so that it is the one to say what was missing."""

SIGN_S = 5.0
"""Between two signs of life of a rank at work."""


class Over(Exception):
    """The meeting ended without the conclusion that was due, on all ranks."""

    def __init__(self, reason: str, *, is_input: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_input = is_input
        """Whether the arguments of a rank were to blame."""


class Unreachable(LogProbsError):
    """The group's store does not answer, so that this rank cannot know what the others hold."""


class Meeting:
    """What this rank says and hears; see the module."""

    def __init__(self, group: Any) -> None:
        if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
            raise InputError(
                f"got group={group!r:.80}; a process group of torch.distributed that this process belongs to is valid, e.g. "
                "torch.distributed.group.WORLD. On a rank outside of it, do not call."
            )
        self.rank, self.size = group.rank(), group.size()
        self._store = group.get_group_store()
        self._number, self._is_counted, self._is_reachable = 0, False, True
        self._step = 0
        self._signs, self._quiet_since, self._signed_at = 0, 0.0, 0.0
        self._pause_s = min(1.0, 0.02 * self.size)  # many ranks share the one process that answers

    def step(self, work: Callable[[], Any], conclude: Callable[[list[Any]], Any]) -> Any:
        """Do `work`, and say what it returns; on the first rank, `conclude` from what all said, in the order of ranks.

        Both return plain values, as JSON has them. An error of theirs ends the meeting.

        Returns:
            The conclusion, the same on all ranks.

        Raises:
            Over: there is none, on any rank: here or elsewhere something failed, or was silent for too long.
            Unreachable: the store does not answer.
        """
        self._step += 1
        try:
            self._say(work)
            self._quiet_since = time.monotonic()
            if self.rank == 0:
                self._conclude(conclude)
            within = SILENCE_S + GRACE_S
            found = self._wait(within, self._cell) or self._end(f"the first rank was silent for {within:g} s")
        except BaseException as error:  # such as an interruption, which goes on here; the others are not to wait
            with contextlib.suppress(Unreachable):
                self._end(f"rank {self.rank}: {_told(error)}")
                self._step += 1  # the others may have the conclusion already, and wait in the next step
                self._end(f"rank {self.rank}: {_told(error)}")
            raise
        if "over" in found:
            raise Over(found["over"], is_input=found["is_input"])
        return found["conclusion"]

    def sign_of_life(self) -> None:
        """Let the others wait on."""
        if time.monotonic() - self._signed_at > SIGN_S:
            self._ask(self._store.add, f"{self._prefix}signs", 1)
            self._signed_at = time.monotonic()

    @property
    def _prefix(self) -> str:
        """Of the keys of this meeting. The n-th meetings of all ranks are the same one.

        Where the group is, there are those that its ranks were at before: the name of a group can be given again, to other
        ranks of other processes, and its store can outlive it.
        """
        ours = f"compiled_logprobs/{self.size}/"
        if self._number == 0:
            more = 0 if self._is_counted else 1  # once, also where an interruption kept the answer from here
            self._is_counted = True
            self._number = self._ask(self._store.add, f"{ours}of rank {self.rank}", more)
        return f"{ours}{self._number}/"

    @property
    def _cell(self) -> str:
        return f"{self._prefix}{self._step}/conclusion"

    def _post(self, rank: int) -> str:
        return f"{self._prefix}{self._step}/{rank}"

    def _say(self, work: Callable[[], Any]) -> None:
        try:
            said = {"said": work()}
        except Exception as error:  # noqa: BLE001  the others wait to hear of it, whatever it is
            said = {"failed": _told(error), "is_input": isinstance(error, InputError)}
        self._ask(self._store.set, self._post(self.rank), json.dumps(said))

    def _conclude(self, conclude: Callable[[list[Any]], Any]) -> None:
        """Write the cell of this step."""
        said = []
        for rank in range(self.size):
            found = self._wait(SILENCE_S, self._post(rank), self._cell)
            if found is None:
                self._end(f"rank {rank} was silent for {SILENCE_S:g} s")
            elif "failed" in found:
                self._end(f"rank {rank}: {found['failed']}", found["is_input"])
            elif "said" in found:
                said.append(found["said"])
            if len(said) <= rank:
                return
        try:
            self._write({"conclusion": conclude(said)})
        except Exception as error:  # noqa: BLE001  as above
            self._end(str(error) if isinstance(error, LogProbsError) else _told(error), isinstance(error, InputError))

    def _end(self, why: str, is_input: bool = False) -> dict[str, Any]:
        return self._write({"over": why, "is_input": is_input})

    def _write(self, conclusion: dict[str, Any]) -> dict[str, Any]:
        """What the cell of this step holds: `conclusion`, unless something was there already."""
        return _plain(self._ask(self._store.compare_set, self._cell, "", json.dumps(conclusion)))

    def _wait(self, within: float, *keys: str) -> dict[str, Any] | None:
        """What is under the first of `keys` that has something; None after so many seconds without a sign of life."""
        while True:
            for key in keys:
                if self._ask(self._store.check, [key]):
                    return _plain(self._ask(self._store.get, key))
            signs = self._ask(self._store.add, f"{self._prefix}signs", 0)
            if signs != self._signs:
                self._signs, self._quiet_since = signs, time.monotonic()
            elif time.monotonic() - self._quiet_since > within:
                return None
            time.sleep(self._pause_s)

    def _ask(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        """What the store answers. Another thread asks, since a store whose host is stopped keeps who asks for good."""
        within = SILENCE_S + GRACE_S
        if not self._is_reachable:
            raise _unreachable("it gave no answer before")
        answer: SimpleQueue[tuple[Any, RuntimeError | None]] = SimpleQueue()

        def answered() -> None:
            try:
                answer.put((ask(*arguments), None))
            except RuntimeError as error:
                answer.put((None, error))

        try:
            threading.Thread(target=answered, daemon=True, name="meeting").start()
        except RuntimeError:  # there is no room for another thread: then without a limit
            answered()
        try:
            found, error = answer.get(timeout=within)
        except Empty:
            self._is_reachable = False  # what is asked next would wait as long
            raise _unreachable(f"no answer within {within:g} s") from None
        if error is not None:
            raise _unreachable(str(error)) from error
        return found


def _unreachable(why: str) -> Unreachable:
    return Unreachable(
        f"the store of the process group does not answer, as when the rank that keeps it has ended or is stopped: {why}\n"
        "A group whose store answers is valid. Start the ranks anew."
    )


def _plain(said: bytes) -> dict[str, Any]:
    return json.loads(said)  # type: ignore[no-any-return]  # all that is written here is an object


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  foreign code may raise anything, also when it is to tell what
        return type(error).__name__


def by_rank(reasons: Sequence[str | None]) -> str:
    """Those that there are, each with its rank; empty where there are none."""
    return "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None)
