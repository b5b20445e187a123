"""What a rank holds and looks at, in this process: what is agreed upon stands before all that it would find alone."""

import pytest
import torch
from torch import distributed

import compiled_logprobs as clp
from compiled_logprobs import InputError, Problem
from compiled_logprobs.backends import get_backend
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.choose import group as ours
from compiled_logprobs.choose import meeting, serving
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.policy import Policy, policy
from compiled_logprobs.store import user_store
from compiled_logprobs.tuning import tuner
from compiled_logprobs.tuning.process import WorkerLost
from tests.helpers.stored_decisions import CPU, LARGE, FakeTuner, decided, measured, publish


@pytest.fixture
def alone():
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_a_group_of_one(alone, monkeypatch, mode):
    mode("tune")
    fake = FakeTuner()
    monkeypatch.setattr(ours, "Tuner", fake)
    fake.answer = lambda problem: decided(problem, "cpp")
    [decision] = clp.tune([LARGE], group=alone)
    assert decision.chosen == "cpp" and clp.tune([LARGE], group=alone) == [decision] and fake.asked == [LARGE]
    assert decisions.stored(LARGE, CPU, Policy()) == decisions.Served("cpp", "ranks", decision)
    assert len(list(user_store().decisions())) == 1
    clp.tune([LARGE], group=alone, again=True)
    assert len(fake.asked) == 2


def test_a_decision_that_cannot_be_stored_holds_all_the_same(alone, monkeypatch, mode, tmp_path):
    mode("tune")
    monkeypatch.setenv("COMPILED_LOGPROBS_PROFILES", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    fake = FakeTuner()
    monkeypatch.setattr(ours, "Tuner", fake)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        [decision] = clp.tune([LARGE], group=alone)
    assert decisions.stored(LARGE, CPU, Policy()).decision == decision


def test_what_the_baseline_is_explained_with(alone, monkeypatch, mode):
    mode("tune")
    monkeypatch.setattr(ours, "Tuner", None)
    with pytest.warns(
        RuntimeWarning, match="rank 0 of the group holds eager, as all its ranks are to, for 1024 x 1031"
    ):
        clp.tune([LARGE], group=alone)
    lines = str(clp.explain(torch.empty(1024, 1031), torch.zeros(1024, dtype=torch.int64))).splitlines()
    assert lines[1:] == [
        "  agreed between the ranks by tune(group=...)",
        "  RANKS_DIFFER: it is what all ranks have: rank 0: TypeError: 'NoneType' object is not callable",
        "  eager  chosen: the baseline",
    ]


@pytest.mark.parametrize("group", ["WORLD", -100, distributed.GroupMember.NON_GROUP_MEMBER])
def test_what_is_no_group(group):
    with pytest.raises(InputError, match=r"got group=.*; a process group of torch.distributed"):
        clp.tune([Problem("cpu", 1024, 1031, torch.float32)], group=group)


class Late:
    """In the place of `Worker`: says each thing as late as it may, then is lost; `now` goes on by that, in no time."""

    now = 0.0

    def __init__(self) -> None:
        self._jobs: list[dict] = []
        self._says = self._all_that_it_says()

    def _all_that_it_says(self):
        yield {"event": "ready"}
        while len(self._jobs) == 1:  # at the next problem it is found to be lost
            yield {"event": "started", "environment": fingerprint_of(CPU)}
            candidates = self._jobs[0]["candidates"]
            if candidates:
                for step in tuner.LIMITS_S:
                    yield {"event": "step", "candidate": candidates[0][0], "step": step}
                return
            yield {"event": "done"}

    def send(self, job: dict) -> None:
        self._jobs.append(job)

    def next_event(self, *, within: float) -> dict:
        Late.now += within
        event = next(self._says, None)
        if event is None:
            raise WorkerLost("timeout", f"no end after {within:.0f} s")
        return event

    def end(self) -> None:
        pass


def test_no_step_of_a_rank_that_measures_is_taken_for_silence(alone, monkeypatch, mode):
    """Though each candidate hangs in its last step, and each program is as slow to start as it may be."""
    mode("tune")
    monkeypatch.setattr(Late, "now", 0.0)
    monkeypatch.setattr(tuner, "Worker", Late)
    signs = [0.0]
    monkeypatch.setattr(meeting.Meeting, "sign_of_life", lambda self: signs.append(Late.now))
    with pytest.warns(RuntimeWarning, match="no backend could be measured.*full size: no end after"):
        clp.tune([LARGE, LARGE._replace(rows=2048)], group=alone)
    longest = max(later - before for before, later in zip(signs, [*signs[1:], Late.now], strict=True))
    assert longest >= max(tuner.START_S, *tuner.LIMITS_S.values()) and Late.now > 10 * longest
    # A sign is left out where there was another just before.
    assert max(longest, ours.LOCK_S) + meeting.SIGN_S < meeting.SILENCE_S < 600  # that is how long NCCL waits


@pytest.fixture
def rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


def call(rows: int) -> tuple[str, str]:
    """The backend that serves, and where the choice comes from."""
    logits, labels = torch.randn(rows, LARGE.vocab), torch.zeros(rows, dtype=torch.int64)
    clp.log_probs_from_logits(logits, labels)
    found = clp.explain(logits, labels)
    return found.backend, found.source


@pytest.mark.parametrize("is_early", [True, False])
def test_other_n_are_served_the_same_whether_or_not_they_came_before_the_agreement(rank, mode, is_early):
    mode("lookup")
    if is_early:
        assert call(1500) == ("cpp", "default rule")
    decisions.remember_decision(decided(LARGE, "eager"), "ranks")
    assert call(1500) == ("eager", "nearest")
    decisions.remember_decision(decided(LARGE._replace(rows=1536), "cpp"), "ranks")
    assert call(1500) == ("cpp", "ranks") and call(2000) == ("cpp", "nearest")


def test_an_agreement_leaves_other_problems_and_what_is_decided_for_other_n(rank, mode):
    mode("lookup")
    publish(decided(LARGE._replace(rows=1536), "cpp"))
    assert call(1500) == ("cpp", "user store")
    decisions.remember_decision(decided(LARGE._replace(vocab=1033), "eager"), "ranks")
    decisions.remember_decision(decided(LARGE, "eager"), "ranks")
    assert [one.source for one in decisions._served.values()] == ["user store"]


@pytest.mark.parametrize("holds_another", [True, False])
@pytest.mark.parametrize("rows", [1024, 1500], ids=["exact", "nearest"])
def test_no_rank_looks_elsewhere_where_what_all_hold_cannot_be_used(rank, holds_another, rows):
    """The baseline was not measured, so that nothing is known of its rows; the store of one rank holds more."""
    theirs = LARGE._replace(needs_grad=True, aligned=True)
    if holds_another:
        candidates = {"eager": measured("eager"), "compiled": measured("compiled")}
        publish(decided(theirs, "compiled", candidates=candidates))
    decisions.remember_decision(ours._baseline(theirs, "rank 1: OSError", CPU), "ranks")
    under = Policy("lookup", row_invariant=True)
    find = decisions.stored if rows == theirs.rows else decisions.nearest
    found = find(theirs._replace(rows=rows), CPU, under)
    assert (found.name, found.source) == ("eager", "ranks" if rows == theirs.rows else "nearest")


def test_what_a_process_tuned_by_itself_is_gone_when_it_joins_a_group(mode):
    mode("lookup")
    agreed = LARGE._replace(rows=4096)
    decisions.remember_decision(decided(LARGE, "eager"))
    decisions.remember_decision(decided(agreed, "cpp"), "ranks")
    assert call(1024) == ("eager", "tuned here")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert call(1024) == ("cpp", "nearest")
        decisions.remember_decision(decided(LARGE, "eager"))  # such as by tune(), on demand
        assert call(1024) == call(1024) == ("eager", "tuned here")
    finally:
        distributed.destroy_process_group()
    assert call(1024) == ("eager", "tuned here")


# Where rows have to be invariant

OLD, NEW = LARGE, LARGE._replace(needs_grad=True)
"""What old log-probabilities are computed with, and new ones."""


def eager_whose_rows_depend_on_n(monkeypatch) -> None:
    """By their last bit, as where kernels change with N."""
    forward = Eager.forward

    def otherwise_from_65_rows_on(self, logits, labels, temperature, *, entropy):
        log_probs, *others = forward(self, logits, labels, temperature, entropy=entropy)
        return log_probs * (1.0 if len(labels) < 65 else 1.0 + 2**-23), *others

    monkeypatch.setattr(Eager, "forward", otherwise_from_65_rows_on)


@pytest.mark.parametrize("agreed", [OLD, NEW], ids=["without gradient", "with gradient"])
def test_what_all_hold_without_having_measured_it_is_checked_for_invariant_rows(agreed, rank, mode, monkeypatch):
    mode("lookup")
    decisions.remember_decision(ours._baseline(agreed, "rank 1: OSError", CPU), "ranks")
    logits, labels = torch.randn(1024, 1031), torch.zeros(1024, dtype=torch.int64)
    with clp.autotune(row_invariant=True):
        found = clp.explain(logits, labels)
        assert found.backend is None and found.why.startswith("the next call checks whether the rows of eager depend")
        assert [serving.serve(problem, CPU, policy()) for problem in (OLD, NEW)] == ["eager", "eager"]
        assert clp.explain(logits, labels).source == "ranks"
        [(name, _, _)] = serving._short_checks
        assert name == "eager"

        serving._short_checks.clear()
        decisions._served.clear()
        decisions._hot.clear()
        eager_whose_rows_depend_on_n(monkeypatch)
        for _ in range(2):
            with pytest.raises(clp.BackendUnavailable, match="has rows whose bits do not depend on N.*Tried: eager"):
                clp.log_probs_from_logits(logits, labels)
    assert serving.serve(agreed, CPU, policy()) == "eager"  # where nobody asks for it


def test_what_was_set_aside_leaves_no_baseline_whose_rows_are_not_known(rank, mode, monkeypatch):
    mode("lookup")
    candidates = {"eager": measured("eager", row_invariant=None), "cpp": measured("cpp")}
    decisions.remember_decision(decided(NEW, "cpp", candidates=candidates), "ranks")
    eager_whose_rows_depend_on_n(monkeypatch)
    logits, labels = torch.randn(1024, 1031), torch.zeros(1024, dtype=torch.int64)
    with clp.autotune(row_invariant=True), monkeypatch.context() as broken:
        broken.setattr(get_backend("cpp"), "forward", None)
        with pytest.warns(RuntimeWarning, match="'cpp' failed on"):
            clp.log_probs_from_logits(logits, labels)  # this very call is served, and told of
        with pytest.raises(clp.BackendUnavailable, match="Tried: eager"):
            clp.log_probs_from_logits(logits, labels)


def test_where_rows_have_to_be_invariant_no_rank_goes_by_its_store_if_anything_of_the_kind_was_agreed(rank, mode):
    """Here ranks tuned together what needs no gradient; the store of this one has more, and with the gradient."""
    mode("lookup")
    publish(decided(NEW, "compiled"))
    publish(decided(NEW._replace(rows=4096), "compiled"))
    with clp.autotune(row_invariant=True):
        assert serving.serve(OLD, CPU, policy()) == "compiled"
        decisions.remember_decision(decided(OLD, "eager"), "ranks")
        decisions.remember_decision(decided(OLD._replace(rows=2048), "cpp"), "ranks")
        alone = decided(NEW._replace(rows=8192), "compiled")  # such as by tune(), on this rank
        decisions.remember_decision(alone)
        for problem in (OLD, NEW, NEW._replace(rows=4096), OLD._replace(layout="rows")):
            assert serving.serve(problem, CPU, policy()) == "cpp"
        assert [name for name, _, _ in serving._short_checks] == ["cpp"]  # nothing was known of its gradient
        decisions.remember_decision(decided(NEW._replace(rows=64), "eager"), "ranks")  # of the very kind that serves
        assert {serving.serve(problem, CPU, policy()) for problem in (OLD, NEW)} == {"eager"}
    assert serving.serve(OLD, CPU, policy()) == "eager"


def test_an_agreed_backend_that_cannot_be_had_with_the_gradient_leaves_the_baseline(rank, mode, monkeypatch):
    mode("lookup")
    publish(decided(NEW, "compiled"))
    decisions.remember_decision(decided(OLD, "cpp"), "ranks")
    no_backward = lambda problem: "has no backward" if problem.needs_grad else None  # noqa: E731
    monkeypatch.setattr(get_backend("cpp"), "why_not", no_backward)
    with clp.autotune(row_invariant=True):
        assert [serving.serve(problem, CPU, policy()) for problem in (OLD, NEW)] == ["eager", "eager"]
