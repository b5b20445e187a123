"""`tune(group=...)` in one process, rank after rank, over a real store; `test_ranks.py` has real ranks."""

from unittest.mock import Mock

import pytest
import torch
from torch import distributed

import compiled_logprobs as clp
from compiled_logprobs.choose import group, memory
from compiled_logprobs.choose.memory import Memory
from compiled_logprobs.store import user_store
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.stored_decisions import LARGE, chosen, decided, raising

pytestmark = pytest.mark.usefixtures("elsewhere")


class Group:
    """What `tune` asks of a process group of two ranks."""

    def __init__(self) -> None:
        self.store, self.now = distributed.HashStore(), 0

    def rank(self) -> int:
        return self.now

    def size(self) -> int:
        return 2

    def get_group_store(self) -> distributed.Store:
        return self.store


@pytest.fixture
def ranks(monkeypatch, fake):
    """`ranks(rank)` tunes as that rank, which knows nothing else."""
    monkeypatch.setattr(group.distributed, "ProcessGroup", Group)
    both, memories = Group(), [Memory(), Memory()]

    def tune(rank: int, problems=(LARGE,), **options):
        both.now = rank
        monkeypatch.setattr(memory, "MEMORY", memories[rank])
        return clp.tune(list(problems), group=both, **options)

    return tune


def test_all_ranks_hold_what_the_first_measured(ranks, fake):
    fake.answer = lambda problem: decided(problem, "cpp")
    problems = [LARGE, LARGE._replace(rows=2048), LARGE._replace(rows=1000)]
    first = ranks(0, problems)
    assert chosen() == ("cpp", "ranks")
    assert ranks(1, problems) == first and chosen() == ("cpp", "ranks")
    assert len(fake.asked) == 2 == len(first)
    assert len(list(user_store().decisions())) == 2
    assert ranks(0) == ranks(1) == first[:1] and len(fake.asked) == 2  # it is stored
    assert ranks(0, again=True) == ranks(1, again=True) and len(fake.asked) == 3


def test_a_rank_that_waits_in_vain_has_all_hold_eager(ranks, fake, monkeypatch):
    fake.answer = lambda problem: decided(problem, "cpp")
    monkeypatch.setattr(group, "PATIENCE_S", -0.1)
    for rank in (1, 0):  # the first comes late, and finds that
        with pytest.warns(RuntimeWarning, match=r"rank \d of the group holds eager for .*: rank 1 waited for 0.1 s"):
            assert ranks(rank, budget_s=0.2) == [] and chosen() == ("eager", "ranks")
    assert clp.explain(torch.empty(1024, 1031), torch.zeros(1024, dtype=torch.int64)).why == (
        "agreed between the ranks by tune(group=...); nothing is measured now, because rank 1 waited for 0.1 s"
    )
    monkeypatch.setattr(group, "PATIENCE_S", 10.0)
    assert [ranks(rank)[0].chosen for rank in (0, 1)] == ["cpp", "cpp"]  # another call is another cell


@pytest.mark.parametrize("error", [TuningFailed("no backend could be measured"), OSError("gone"), KeyboardInterrupt()])
def test_where_the_first_fails_all_hold_eager(ranks, fake, error):
    fake.answer = raising(error)
    if isinstance(error, KeyboardInterrupt):  # which goes on there
        with pytest.raises(KeyboardInterrupt):
            ranks(0)
    for rank in (1,) if isinstance(error, KeyboardInterrupt) else (0, 1):
        with pytest.warns(RuntimeWarning, match=f"rank 0: {type(error).__name__}: {error}"):
            assert ranks(rank) == [] and chosen() == ("eager", "ranks")


@pytest.mark.parametrize("other", [[LARGE._replace(masked_logits=True)], [LARGE, LARGE._replace(rows=2)], []], ids=len)
def test_other_problems_than_the_first_are_refused(ranks, other):
    ranks(0)
    with pytest.raises(
        clp.InputError, match="on rank 1 of the group; the same as on its first are valid, which are cpu-n1024"
    ):
        ranks(1, other)


def test_wrong_arguments_of_a_rank_are_told_to_the_first(ranks):
    with pytest.raises(clp.InputError, match="got budget_s=-1"):
        ranks(1, budget_s=-1)
    with pytest.warns(RuntimeWarning, match="rank 1: InputError: got budget_s=-1"):
        assert ranks(0) == [] and chosen() == ("eager", "ranks")


def test_a_rank_in_another_environment_or_without_the_winner_holds_eager(ranks, fake, monkeypatch):
    fake.answer = lambda problem: decided(problem, "cpp")
    assert ranks(0)[0].chosen == "cpp"
    with monkeypatch.context() as patch:
        patch.setattr(group, "holds", lambda decision, name: False)
        with pytest.warns(RuntimeWarning, match="backend 'cpp' cannot run on rank 1, or has other code"):
            assert ranks(1) == [] and chosen() == ("eager", "ranks")
    ranks(0)
    monkeypatch.setattr(group, "fingerprint_of", lambda device: "0" * 16)
    with pytest.warns(RuntimeWarning, match=f"rank 1 is in environment {'0' * 16}, the first in "):
        assert ranks(1) == [] and chosen() == ("eager", "ranks")


def test_a_store_that_does_not_answer_leaves_eager(ranks, fake, monkeypatch):
    """As when the machine that it is on is gone."""
    store = Mock(add=lambda *_: 1, compare_set=Mock(side_effect=RuntimeError("the connection is closed")))
    monkeypatch.setattr(Group, "get_group_store", lambda self: store)
    with pytest.warns(RuntimeWarning, match="rank 0: RuntimeError: the connection is closed"):
        assert ranks(0) == [] and chosen() == ("eager", "ranks")


@pytest.mark.parametrize("what", ["WORLD", -100, distributed.GroupMember.NON_GROUP_MEMBER])
def test_what_is_no_group(what):
    with pytest.raises(clp.InputError, match=r"got group=.*; a process group of torch.distributed"):
        clp.tune([LARGE], group=what)
