"""Ranks as threads, with a store between them: whatever any of them does, all hear the same."""

import random
import threading
import time

import pytest
from torch import distributed

from compiled_logprobs.choose import meeting
from compiled_logprobs.choose.meeting import Meeting, Over, Unreachable, by_rank
from compiled_logprobs.errors import InputError

SILENCE_S, GRACE_S = 0.6, 0.3
STEPS = 3


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(meeting, "SILENCE_S", SILENCE_S)
    monkeypatch.setattr(meeting, "GRACE_S", GRACE_S)
    monkeypatch.setattr(meeting, "SIGN_S", 0.0)


class Group(distributed.ProcessGroup):
    """One that can do nothing but meet."""

    group_name = "theirs"

    def __init__(self, store: distributed.Store, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._store = store

    def get_group_store(self) -> distributed.Store:
        return self._store


def meetings(size: int, store: distributed.Store | None = None) -> list[Meeting]:
    """The same one, as each rank is at it."""
    store = distributed.HashStore() if store is None else store
    return [Meeting(Group(store, rank, size)) for rank in range(size)]


def all_at_once(*calls) -> list:
    """What each returned, or raised; fails where one does not come back."""
    found: list = ["it hangs"] * len(calls)

    def run(index: int) -> None:
        try:
            found[index] = calls[index]()
        except BaseException as error:  # noqa: BLE001  for the test to look at
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert "it hangs" not in found
    return found


def step(one: Meeting, work=lambda: None, conclude=lambda said: said):
    return lambda: one.step(work, conclude)


def told(found: object) -> object:
    return (found.reason, found.is_input) if isinstance(found, Over) else found


def test_all_hear_what_the_first_concludes():
    at = meetings(5)
    found = all_at_once(*(step(one, lambda one=one: {"rank": one.rank}) for one in at))
    assert found == [[{"rank": rank} for rank in range(5)]] * 5
    # Steps do not mix, and neither do meetings.
    assert all_at_once(*(step(one, lambda: "next", len) for one in at)) == [5] * 5


def all_say(what: object, at: list[Meeting]) -> list:
    return all_at_once(*(step(one, lambda: what) for one in at))


def test_meetings_are_told_apart_by_their_number():
    store = distributed.HashStore()
    for number in range(3):
        assert all_say(number, meetings(2, store)) == [[number] * 2] * 2


def test_a_name_that_is_given_again():
    """To a group with a store of its own, or in the same store: of as many ranks, or of more."""
    for store in (distributed.HashStore(), distributed.HashStore()):
        for size in (2, 3, 2, 3):
            assert all_say(size, meetings(size, store)) == [[size] * size] * size


def test_a_process_that_was_at_meetings_of_another_group_of_that_name():
    """As where the first of three was in a group with the second, and then is in one with the third."""
    first_two, first_and_third = distributed.HashStore(), distributed.HashStore()
    for _ in range(2):
        all_say("before", meetings(2, first_two))
    assert all_say("now", meetings(2, first_and_third)) == [["now"] * 2] * 2


def fail(error: BaseException):
    def work(*_: object):
        raise error

    return work


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("error", "reason", "is_input"),
    [
        (OSError("no room"), "OSError: no room", False),
        (InputError("got none"), "InputError: got none", True),
        (MemoryError(), "MemoryError: ", False),
    ],
)
def test_all_hear_what_failed_on_one(rank, error, reason, is_input):
    at = meetings(3)
    began = time.monotonic()
    found = all_at_once(*(step(one, fail(error) if one.rank == rank else lambda: None) for one in at))
    assert list(map(told, found)) == [(f"rank {rank}: {reason}", is_input)] * 3
    assert time.monotonic() - began < SILENCE_S  # nobody waited for the limit


def test_all_hear_that_the_first_cannot_conclude():
    found = all_at_once(*(step(one, conclude=fail(InputError("got apples and pears"))) for one in meetings(3)))
    assert list(map(told, found)) == [("got apples and pears", True)] * 3
    found = all_at_once(*(step(one, conclude=fail(ValueError("odd"))) for one in meetings(3)))
    assert list(map(told, found)) == [("ValueError: odd", False)] * 3


def test_what_cannot_be_said_is_an_error():
    first, second = all_at_once(*(step(one, object if one.rank == 1 else lambda: None) for one in meetings(2)))
    assert isinstance(second, TypeError) and told(first) == (f"rank 1: TypeError: {second}", False)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_hear_of_an_interruption_which_goes_on_there(rank):
    at = meetings(3)
    interrupted, began = KeyboardInterrupt(), time.monotonic()
    found = all_at_once(*(step(one, fail(interrupted) if one.rank == rank else lambda: None) for one in at))
    assert found.pop(rank) is interrupted
    assert list(map(told, found)) == [(f"rank {rank}: KeyboardInterrupt: ", False)] * 2
    assert time.monotonic() - began < SILENCE_S


def test_an_interruption_while_waiting_reaches_those_in_the_next_step(monkeypatch):
    """The second has said all that it had to, so that the first goes on."""
    first, second = meetings(2)
    waits = second._wait
    monkeypatch.setattr(second, "_wait", lambda *what: waits(*what) and fail(KeyboardInterrupt())())
    found = all_at_once(lambda: [step(first)(), told(all_at_once(step(first))[0])], step(second))
    assert isinstance(found[1], KeyboardInterrupt)
    assert found[0] == [[None, None], ("rank 1: KeyboardInterrupt: ", False)]


def test_who_is_silent_for_too_long_hears_what_the_others_heard():
    first, second, third = meetings(3)
    found = all_at_once(step(first), step(second, lambda: time.sleep(3 * SILENCE_S)), step(third))
    assert list(map(told, found)) == [(f"rank 1 was silent for {SILENCE_S:g} s", False)] * 3


def test_nor_does_the_first_decide_alone():
    first, second, third = meetings(3)
    found = all_at_once(step(first, lambda: time.sleep(3 * SILENCE_S)), step(second), step(third))
    assert list(map(told, found)) == [(f"the first rank was silent for {SILENCE_S + GRACE_S:g} s", False)] * 3


def test_signs_of_life_are_waited_on():
    at = meetings(3)

    def work(one: Meeting):
        for _ in range(12):
            time.sleep(SILENCE_S / 4)
            one.sign_of_life()

    found = all_at_once(*(step(one, lambda one=one: work(one) if one.rank == 1 else None) for one in at))
    assert found == [[None] * 3] * 3


def test_a_store_that_ends():
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = distributed.TCPStore("localhost", store.port, is_master=False)
    _, second = meetings(2, client)
    del store
    with pytest.raises(Unreachable, match="does not answer, as when the rank that keeps it has ended"):
        second.step(lambda: None, list)


class Stopped(distributed.HashStore):
    """Keeps who asks, after so many answers."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.answers, self.asked = answers, 0

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        if self.asked > self.answers:
            threading.Event().wait()
        return super().check(keys)


@pytest.mark.parametrize("answers", [0, 3])
def test_a_store_that_never_answers(answers):
    store, began = Stopped(answers), time.monotonic()
    _, second = meetings(2, store)
    for why in ("no answer within 0.9 s", "it gave no answer before"):
        [found] = all_at_once(step(second))
        assert isinstance(found, Unreachable) and f"has ended or is stopped: {why}" in str(found)
    assert store.asked == answers + 1  # and was left alone then
    assert time.monotonic() - began > SILENCE_S + GRACE_S


def test_no_room_for_another_thread(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    [one] = meetings(1)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert one.step(lambda: "said", list) == ["said"]


def test_an_interruption_while_the_meeting_is_counted(monkeypatch):
    """It is counted once, so that the next meeting is the same one for all again."""
    store = distributed.HashStore()
    first, second = meetings(2, store)
    real = Meeting._ask

    def interrupted(self, ask, *arguments):
        answer = real(self, ask, *arguments)
        if self is second:
            monkeypatch.setattr(Meeting, "_ask", real)
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(Meeting, "_ask", interrupted)
    found = all_at_once(step(first), step(second))
    assert told(found[0]) == ("rank 1: KeyboardInterrupt: ", False) and isinstance(found[1], KeyboardInterrupt)
    assert all_say("next", meetings(2, store)) == [["next"] * 2] * 2


def test_reasons_by_rank():
    assert by_rank([None, None]) == "" and by_rank([None, "late", "gone"]) == "rank 1: late; rank 2: gone"


def acts(one: Meeting, chance: random.Random) -> object:
    """Three steps, in each of which anything may happen: what was heard, or the interruption that ended it."""
    heard = []
    for number in range(STEPS):
        what = chance.choices(["goes on", "fails", "is late", "is very late", "is interrupted"], [20, 1, 1, 1, 1])[0]
        if what == "is interrupted" and chance.random() < 0.5:
            return None  # as if it was killed
        waits = {"is late": chance.uniform(0.8, 1.2) * SILENCE_S, "is very late": chance.uniform(1, 2) * SILENCE_S}
        wait_s = waits.get(what, chance.uniform(0, 0.1))

        def work(what=what, wait_s=wait_s, number=number):
            time.sleep(wait_s)
            if what == "fails":
                raise OSError(f"at step {number}")
            if what == "is interrupted":
                raise KeyboardInterrupt
            return number

        try:
            heard.append(one.step(work, sum))
        except Over as over:
            return [*heard, told(over)]
        except KeyboardInterrupt:
            return None
    return heard


def test_whatever_they_do_all_that_are_left_hear_the_same():
    """Delays are as long as the limits, so that who waits and who comes are often at the same moment."""
    many = [(seed, meetings(4)) for seed in range(60)]
    calls = [
        lambda one=one, seed=seed: acts(one, random.Random(f"{seed} {one.rank}")) for seed, at in many for one in at
    ]
    found = all_at_once(*calls)
    ends = set()
    for seed, _ in many:
        heard = [one for one in found[4 * seed : 4 * seed + 4] if one is not None]
        assert not heard or all(one == heard[0] for one in heard), (seed, heard)
        ends |= {str(one[-1]) for one in heard[:1]}
    assert len(ends) > 5  # of which one is good
