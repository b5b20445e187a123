"""Which backend serves: where the rule looks, in which order, and what no longer holds."""

import dataclasses
import itertools
import random
import sys
from typing import get_args

import pytest
import torch
import torch.distributed as dist

import compiled_logprobs as clp
from compiled_logprobs.backends import cpp_build, get_backend, why_not
from compiled_logprobs.backends.compiled import Compiled
from compiled_logprobs.backends.cpp import Cpp
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.choose import auto, memory, rule, staleness
from compiled_logprobs.choose.memory import Choice, Memory
from compiled_logprobs.decision import Candidate
from compiled_logprobs.machine.clock import MIB
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.policy import Policy, policy
from compiled_logprobs.problem import MODES, Layout, Problem, Temperature, bucket
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.presets import grid
from tests.helpers.stored_decisions import (
    CPU,
    LARGE,
    NEW,
    all_measured,
    chosen,
    decided,
    measured,
    publish,
    raising,
    undecided,
)

pytestmark = pytest.mark.usefixtures("elsewhere")
SMALL = LARGE._replace(rows=8)


def start_anew(monkeypatch) -> None:
    """As a new process does."""
    monkeypatch.setattr(memory, "MEMORY", Memory())


def why_not_measure(problem: Problem, device: torch.device = CPU, under: Policy = Policy()) -> str | None:  # noqa: B008
    stores = {"user store": user_store()}
    environment = fingerprint_of(CPU)
    return rule.why_not_measure(rule.Context(problem, under, device, environment, stores, memory.MEMORY))


# The order of the steps


def test_what_is_stored_is_looked_up_in_order(mode, nothing_measures, elsewhere, monkeypatch):
    mode("tune")
    for folder, backend, source in (
        (elsewhere / "bundled", "eager", "bundled profiles"),
        (elsewhere / "profiles", "compiled", "project profiles"),
        (user_store().root, "eager", "user store"),
    ):
        publish(decided(chosen=backend), Store(folder))
        start_anew(monkeypatch)
        assert chosen() == (backend, source)
    monkeypatch.setattr(Store, "read", lambda *_: pytest.fail("it looked again"))
    assert chosen(LARGE._replace(rows=1020)) == ("eager", "user store")  # the same bucket


@pytest.mark.parametrize("source", ["tuned here", "ranks"])
def test_what_this_process_decided_stands_before_what_is_stored(source, mode, nothing_measures):
    mode("lookup")
    publish(decided(chosen="eager"))
    assert chosen() == ("eager", "user store")
    memory.MEMORY.hold(LARGE, Choice("compiled", source, decided(chosen="compiled")))
    assert chosen() == ("compiled", source)


@pytest.mark.parametrize("name", ["tune", "lookup"])
def test_a_decision_for_a_near_number_of_rows_serves_before_anything_is_measured(name, mode, nothing_measures):
    mode(name)
    for rows, backend in ((2048, "eager"), (8192, "compiled"), (2**16, "cpp")):
        publish(decided(LARGE._replace(rows=rows), backend))
    assert [chosen(LARGE._replace(rows=rows)) for rows in (1100, 6144, 2**15)] == [
        ("eager", "near"),
        ("compiled", "near"),
        ("cpp", "near"),
    ]
    assert chosen(LARGE._replace(rows=8192)) == ("compiled", "user store")


KINDS = [
    *({"temperature": "number"}, {"layout": "rows"}),
    *({"aligned": True}, {"entropy": True}, {"labels_per_row": 4}),
]


@pytest.mark.parametrize("other", KINDS, ids=str)
def test_the_nearest_kind_serves_only_where_nothing_may_be_measured_and_if_it_passes(other, mode, fake, checks):
    publish(decided(LARGE._replace(**other), "compiled"))
    assert chosen() == ("eager", "tuned here") and fake.asked == [LARGE]
    memory.MEMORY.decided.clear()
    user_store().path(fingerprint_of(CPU), LARGE).unlink()
    memory.MEMORY.spent_s = 60.0  # all that there is
    memory.MEMORY.forget(LARGE)
    assert chosen() == ("compiled", "related")
    assert set(memory.MEMORY.checks) == (set() if "rows" in other else {("compiled", LARGE._replace(rows=0), False)})
    checks["compiled"] = False
    memory.MEMORY.checks.clear()
    mode("lookup")
    assert chosen() == (("compiled", "related") if "rows" in other else ("cpp", "default rule"))


@pytest.mark.parametrize("other", [{"vocab": 1032}, {"needs_grad": True}, {"dtype": torch.float16}], ids=str)
def test_other_problems_are_not_related(mode, checks, other):
    mode("lookup")
    publish(decided(LARGE._replace(rows=2048, **other)))
    assert chosen() == ("cpp", "default rule")


def test_the_default_rule_takes_the_first_that_passes(mode, checks):
    mode("lookup")
    assert chosen() == ("cpp", "default rule")
    checks["cpp"] = False
    assert chosen(LARGE._replace(rows=2048))[0] == "cpp"  # asked once for all N
    assert chosen(LARGE._replace(vocab=1032, aligned=True)) == ("compiled", "default rule")


def test_a_backend_with_the_wrong_sign_serves_nothing(monkeypatch):
    """By the real check."""
    forward = Cpp.forward

    def wrong_sign(self, *arguments, **options):
        log_probs, entropies, residuals = forward(self, *arguments, **options)
        return -log_probs, entropies, residuals

    monkeypatch.setattr(Cpp, "forward", wrong_sign)
    monkeypatch.setattr(Compiled, "why_not", lambda self, problem: "not now")
    assert chosen(LARGE._replace(vocab=1101)) == ("eager", "default rule")


@pytest.mark.parametrize("other", [None, {"temperature": "number"}], ids=["default rule", "related"])
def test_a_check_without_memory_speaks_against_nobody_and_is_not_repeated_on_every_call(other, mode, monkeypatch):
    mode("lookup")
    clock, checked = [0.0], []
    if other is not None:
        publish(decided(LARGE._replace(**other), "cpp"))

    def no_room(*_, **__):
        checked.append(1)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(rule.time, "monotonic", lambda: clock[0])
    with monkeypatch.context() as context:
        context.setattr(rule, "check_backend", no_room)
        assert [chosen(), chosen(), chosen()] == [("eager", "default rule")] * 3 and len(checked) == 1
    clock[0] = rule.NO_ROOM_S + 1
    monkeypatch.setattr(rule, "_passes", lambda *_: True)
    assert chosen() == ("cpp", "related" if other else "default rule")


def is_ready(monkeypatch, *names: str) -> None:
    """Of `cpp` and `compiled`, only `names` run without compiling anything first."""
    for backend in (Cpp, Compiled):
        monkeypatch.setattr(backend, "is_warm", lambda self, problem: self.name in names)


@pytest.mark.parametrize(
    ("ready", "serving"), [((), "eager"), (("compiled",), "compiled"), (("compiled", "cpp"), "cpp")], ids=str
)
@pytest.mark.parametrize("name", ["off", "lookup", "tune"])
def test_small_problems_are_for_what_is_ready_without_compiling(ready, serving, name, mode, monkeypatch):
    mode(name)
    is_ready(monkeypatch, *ready)
    monkeypatch.setattr(cpp_build, "_build", lambda *_: pytest.fail("it compiled"))
    assert chosen(SMALL) == (serving, "small")


def test_what_failed_in_this_process_is_not_ready(monkeypatch):
    is_ready(monkeypatch, "compiled", "cpp")
    memory.MEMORY.put_aside("cpp", SMALL, RuntimeError("a fault"))
    assert chosen(SMALL) == ("compiled", "small")
    start_anew(monkeypatch)
    memory.MEMORY.checks["cpp", SMALL._replace(rows=0), False] = False
    assert chosen(SMALL) == ("compiled", "small")


def test_small_problems_are_for_whom_a_profile_names(mode, nothing_measures, monkeypatch):
    mode("tune")
    is_ready(monkeypatch)
    publish(decided(SMALL._replace(rows=16), chosen="compiled"))
    memory.MEMORY.forget(SMALL)
    assert chosen(SMALL) == ("eager", "small")  # where launches count, another N says little
    publish(decided(bucket(SMALL), chosen="compiled"))
    memory.MEMORY.forget(SMALL)
    assert chosen(SMALL) == ("compiled", "user store")


def test_each_mode_remembers_for_itself_and_off_looks_at_nothing_that_is_stored(mode, checks):
    publish(decided())
    for name, backend in (("off", "cpp"), ("lookup", "eager"), ("off", "cpp")):
        mode(name)
        assert chosen()[0] == backend


def test_another_number_of_rows_of_the_same_bucket_is_chosen_for_by_what_is_remembered_alone(checks, monkeypatch):
    before, _ = chosen()
    monkeypatch.setattr(rule, "context_of", lambda *_: pytest.fail("it looked at the environment and the stores"))
    assert auto.choose(LARGE._replace(rows=LARGE.rows - 1), CPU, policy())[0] == before


def test_what_is_decided_later_replaces_a_guess(mode, checks):
    mode("lookup")
    others = LARGE._replace(rows=2048), LARGE._replace(temperature="number")
    assert [chosen(other) for other in others] == [("cpp", "default rule")] * 2
    memory.MEMORY.hold(LARGE, Choice("eager", "tuned here", decided()))
    assert [chosen(other) for other in others] == [("eager", "near"), ("eager", "related")]


class Kept:
    """A store that notes what is read of it."""

    def __init__(self, decisions):
        self.decisions, self.read_so_far = decisions, []

    def alike(self, environment, problem):
        return list(self.decisions)

    def read(self, environment, problem):
        self.read_so_far.append(problem)
        return self.decisions.get(problem)


LAYOUTS, TEMPERATURES = get_args(Layout), get_args(Temperature)


def documented_order(asked: Problem, other: Problem) -> tuple:
    """That of the docstring of `rule`."""
    ratio = max(asked.rows, other.rows) / min(asked.rows, other.rows)
    layouts, temperatures = LAYOUTS.index(other.layout), TEMPERATURES.index(other.temperature)
    return (
        ratio > 4,
        asked.entropy != other.entropy,
        sum(getattr(asked, name) != getattr(other, name) for name in ("logsumexp", "argmax", "sum_p_squared")),
        max(asked.labels_per_row, other.labels_per_row) / min(asked.labels_per_row, other.labels_per_row),
        abs(layouts - LAYOUTS.index(asked.layout)),
        abs(temperatures - TEMPERATURES.index(asked.temperature)),
        asked.aligned != other.aligned,
        ratio,
        other.rows,
        other.labels_per_row,
        layouts,
        temperatures,
    )


@pytest.mark.parametrize("seed", range(100))
def test_what_serves_is_the_nearest_by_the_documented_order_that_can(seed, checks, monkeypatch):
    pick = random.Random(seed)

    def any_problem() -> Problem:
        return LARGE._replace(
            rows=2 ** pick.randrange(10, 17),
            needs_grad=pick.random() < 0.1,
            entropy=pick.random() < 0.5,
            logsumexp=pick.random() < 0.3,
            argmax=pick.random() < 0.3,
            sum_p_squared=pick.random() < 0.3,
            labels_per_row=pick.choice([1, 2, 4]),
            temperature=pick.choice(TEMPERATURES),
            layout=pick.choice(LAYOUTS),
            aligned=pick.random() < 0.5,
        )

    asked, unable = any_problem(), pick.choice(["cpp", "compiled", ""])
    templates = [decided(chosen="eager"), decided(chosen="cpp"), decided(chosen="compiled"), undecided()]
    problems = {any_problem() for _ in range(pick.randrange(12))} - {asked}
    kept = Kept({problem: dataclasses.replace(pick.choice(templates), problem=problem) for problem in problems})
    monkeypatch.setattr(rule, "why_not", lambda name, problem: "it is tired" if name == unable else None)
    # Whatever results are asked for, all can return them.
    monkeypatch.setattr(staleness, "why_not", lambda name, problem: why_not(name, LARGE))
    context = rule.Context(asked, Policy("lookup"), CPU, "", {"a": kept}, Memory(), lambda *_: "no")
    in_order = sorted(
        (other for other in problems if other.needs_grad == asked.needs_grad),
        key=lambda other: documented_order(asked, other),
    )
    able = [other for other in in_order if kept.decisions[other].is_decided and kept.decisions[other].chosen != unable]
    choice = rule.related(context)
    if able:
        assert choice == Choice(kept.decisions[able[0]].chosen, "related", kept.decisions[able[0]])
        in_order = in_order[: in_order.index(able[0]) + 1]
    else:
        assert choice == "no profile decides a problem like it"
    assert kept.read_so_far == [asked, *in_order]  # and no more


def test_after_a_run_of_the_preset_rl_a_decision_serves_every_call_of_a_trainer():
    kept = Kept({problem: decided(problem, "cpp") for problem in grid("cpu", "rl")})
    fields = (MODES.values(), LAYOUTS, TEMPERATURES, (False, True), (1, 4), (64, 512, 16384))
    for mode, layout, temperature, entropy, labels, rows in itertools.product(*fields):
        asked = Problem(
            *("cpu", rows, 151936, torch.bfloat16),
            **mode,
            layout=layout,
            temperature=temperature,
            entropy=entropy,
            labels_per_row=labels,
        )
        *_, (step, choice) = rule.walk(rule.Context(asked, Policy("lookup"), CPU, "", {"a": kept}, Memory()))
        assert step in ("stored", "near", "related") and choice.backend == "cpp", asked


def test_a_walk_over_another_machines_store_takes_its_decisions_as_they_are():
    """As the dashboard does."""
    candidates = {"theirs": measured("eager", fingerprint=NEW), "eager": measured("eager")}
    publish(decided(chosen="theirs", candidates=candidates))
    asked = LARGE._replace(rows=2048)
    context = rule.Context(
        asked, Policy("lookup"), CPU, fingerprint_of(CPU), {"a": user_store()}, Memory(), is_here=False
    )
    steps = dict(rule.walk(context))
    assert list(steps) == ["remembered", "stored", "small", "near"] and steps["near"].backend == "theirs"
    other = dict(rule.walk(context._replace(problem=asked._replace(temperature="number"))))
    assert (other["related"].backend, other["related"].source) == ("theirs", "related")
    *_, (_, last) = rule.walk(context._replace(problem=asked._replace(vocab=7, rows=2**20)))
    assert isinstance(last, rule.Pending)


# What the rounds did not settle


def test_what_least_regret_chose_serves_its_own_bucket_alone(mode, fake):
    publish(undecided())
    mode("tune")
    assert chosen() == ("eager", "user store") and not fake.asked
    fake.answer = lambda problem: undecided(problem, chosen="cpp")
    other = LARGE._replace(rows=2048)
    assert chosen(other) == ("cpp", "tuned here") and fake.asked == [other]  # which LARGE says nothing of
    with clp.autotune("lookup", require_hit=True):
        assert chosen(LARGE) == ("eager", "user store")


def test_a_first_call_says_that_least_regret_settled_it(fake, capsys):
    fake.answer = lambda problem: undecided(problem, reason="settled by least regret, not by the rounds")
    assert chosen() == ("eager", "tuned here") and fake.asked == [LARGE]
    said = "eager serves it: settled by least regret, not by the rounds; `compiled-logprobs profile` gives it more time"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("choice", [Choice("eager", "ranks", undecided()), Choice("eager", "ranks")])
def test_ranks_hold_what_they_agreed_upon_and_for_nothing_else(choice, mode, checks):
    mode("lookup")
    memory.MEMORY.hold(LARGE, choice)
    assert chosen() == ("eager", "ranks")
    assert chosen(LARGE._replace(rows=2048)) == ("cpp", "default rule")


# What no longer holds


@pytest.mark.parametrize("why", ["changed", "cannot run", "cannot say", "unregistered"])
def test_a_winner_that_is_not_what_was_measured_is_not_used(why, mode, checks, monkeypatch):
    mode("lookup")
    candidates = all_measured()
    if why == "changed":
        candidates["compiled"] = measured("compiled", fingerprint=NEW)
    elif why == "cannot run":
        monkeypatch.setattr(Compiled, "why_not", lambda self, problem: "no compiler")
    elif why == "cannot say":
        monkeypatch.setattr(Compiled, "fingerprint", lambda self: 1 / 0)
    else:
        candidates["os:system"] = measured("eager")
    publish(decided(chosen="os:system" if why == "unregistered" else "compiled", candidates=candidates))
    passed_over = {
        "cannot run": "passed over: backend 'compiled' cannot run here: no compiler. Another backend serves. Mend",
        "unregistered": "passed over: it chose backend 'os:system', which is not registered here. Another backend",
    }
    if why in passed_over:
        with pytest.warns(RuntimeWarning, match=passed_over[why]):
            assert chosen() == ("cpp", "default rule")
        memory.MEMORY.forget(LARGE)  # and it is told once
    assert chosen() == ("cpp", "default rule")


class Doubling(Eager):
    """A backend of somebody else's."""

    name = "doubling"


OTHERS_CHANGED = {
    "backend 'doubling' was registered after this was measured": {},
    "backend 'compiled' has changed since this was measured": {"compiled": measured("compiled", fingerprint=NEW)},
    "backend 'compiled' could not run this when it was measured, and can now": {
        "compiled": Candidate("unavailable", "no compiler", get_backend("compiled").fingerprint())
    },
}


@pytest.mark.parametrize("reason", OTHERS_CHANGED, ids=["new", "changed", "available"])
def test_what_is_stale_is_measured_again_and_serves_where_that_cannot_be(reason, own_registry, mode, fake, monkeypatch):
    better = "doubling" if "registered" in reason else "compiled"
    if better == "doubling":
        clp.register_backend("doubling", f"{__name__}:Doubling")
    publish(decided(candidates=all_measured() | OTHERS_CHANGED[reason]))
    mode("lookup")
    assert chosen() == ("eager", "user store")
    assert rule.remembered(rule.context_of(LARGE, CPU, policy())).stale == reason
    mode("tune")
    with clp.autotune(require_hit=True):
        assert chosen() == ("eager", "user store") and not fake.asked
    start_anew(monkeypatch)
    fake.answer = raising(RuntimeError("can't start new thread"))
    assert chosen() == ("eager", "user store") and len(fake.asked) == 1
    fake.answer = lambda problem: decided(problem, better, candidates=all_measured() | {better: measured(better)})
    for source in ("tuned here", "user store"):
        start_anew(monkeypatch)
        assert chosen() == (better, source) and len(fake.asked) == 2


def test_backends_that_were_left_out_or_that_no_worker_can_import_do_not_make_it_stale(own_registry, mode, monkeypatch):
    mode("tune")
    monkeypatch.setattr(sys.modules["__main__"], "Doubling", Doubling, raising=False)
    for name, target in (("left", f"{__name__}:Doubling"), ("object", Doubling()), ("main", "__main__:Doubling")):
        clp.register_backend(name, target)
        get_backend(name)
    tried = {name: Candidate("unavailable", "only this process") for name in ("object", "main")}
    publish(decided(candidates=all_measured() | tried, left_out=("left",)))
    assert chosen() == ("eager", "user store")


def test_a_failure_counts_for_a_day(mode, fake):
    failed = {"compiled": Candidate("failed", "no space left on device", measured("compiled").fingerprint)}
    publish(decided(candidates=all_measured() | failed))
    assert chosen()[0] == "eager" and not fake.asked
    memory.MEMORY.forget(LARGE)
    publish(decided(candidates=all_measured() | failed, measured_at="2026-01-01T00:00:00Z"))
    assert chosen()[0] == "eager" and fake.asked == [LARGE]


def test_a_winner_that_failed_is_set_aside_in_every_mode(mode, checks):
    publish(decided(chosen="compiled"))
    mode("lookup")
    assert chosen()[0] == "compiled"
    assert memory.MEMORY.put_aside("compiled", LARGE._replace(rows=1020), RuntimeError("it broke"))
    assert chosen() == ("eager", "set aside")
    assert not memory.MEMORY.put_aside("compiled", LARGE._replace(rows=4096), RuntimeError("it broke"))  # known of such
    with clp.autotune(require_hit=True):
        assert chosen() == ("eager", "set aside")  # since a profile had decided it
    memory.MEMORY.forget(LARGE)
    publish(decided(LARGE._replace(rows=2048), chosen="compiled"))
    assert chosen(LARGE._replace(rows=2048))[0] == "compiled"
    assert chosen() == ("cpp", "default rule")  # what is near does not bring it back


def test_what_ranks_agreed_upon_ends_the_search(mode, monkeypatch, nothing_measures):
    """What each would find beside it is its own."""
    mode("lookup")
    publish(decided(chosen="cpp"))
    memory.MEMORY.hold(LARGE, Choice("compiled", "ranks", decided(chosen="compiled")))
    monkeypatch.setattr(Compiled, "why_not", lambda self, problem: "no compiler")
    assert chosen() == ("eager", "ranks")


# require_hit


@pytest.mark.parametrize("name", ["tune", "lookup"])
def test_a_required_hit_that_is_none_is_told(name, mode, nothing_measures):
    mode(name)
    publish(decided(LARGE._replace(rows=2048)))  # near is no hit
    with clp.autotune(require_hit=True), pytest.raises(clp.ProfileError) as error:
        chosen()
    assert str(error.value) == (
        "no profile decides 1024 x 1031 float32 on cpu (not 16-byte aligned), and require_hit=True forbids to measure "
        "or guess. Run `compiled-logprobs profile` or tune(...) for it on this machine, or set require_hit=False.\n"
        "Nearest in the profiles: 2048 x 1031 float32 on cpu (user store): rows is 2048 there, and 1024 here"
    )


def test_a_guess_is_no_hit_and_a_mode_may_have_none(mode, checks):
    mode("lookup")
    assert chosen()[0] == "cpp"
    with clp.autotune(require_hit=True), pytest.raises(clp.ProfileError):
        chosen()
    publish(decided())
    with clp.autotune("off", require_hit=True):
        with pytest.raises(
            clp.ProfileError, match="the mode is 'off', in which no profile is looked at.*Set the mode to"
        ):
            chosen()
        assert chosen(SMALL)[1] == "small"


# row_invariant


def test_one_backend_serves_all_calls_of_a_kind_whatever_is_stored(mode, checks):
    mode("lookup")
    publish(decided(chosen="eager"))
    publish(decided(LARGE._replace(needs_grad=True), chosen="compiled"))
    kinds = [LARGE, SMALL, LARGE._replace(needs_grad=True, entropy=True, layout="rows", temperature="per_token")]
    with clp.autotune(row_invariant=True):
        assert [chosen(problem) for problem in kinds] == [("cpp", "row invariant")] * 3
        with clp.autotune(require_hit=True):
            assert chosen()[0] == "cpp"
    assert len(memory.MEMORY.checks) == 1 and chosen()[0] == "eager"


def test_only_backends_that_declare_it_and_pass_are_admitted_in_the_order_of_the_list(checks, monkeypatch):
    with clp.autotune(row_invariant=True):
        assert chosen()[0] == "cpp"
        memory.MEMORY.put_aside("cpp", SMALL, RuntimeError("it broke"))
        assert chosen()[0] == "compiled"
        with monkeypatch.context() as patch:
            patch.setattr(auto, "why_not", lambda name, problem: "is tired")
            with pytest.raises(clp.BackendUnavailable, match="'compiled', which serves such problems .* is tired"):
                chosen(LARGE._replace(rows=4096, layout="slice"))
        checks["cpp"] = False
        monkeypatch.setattr(Compiled, "row_invariant", False)
        with pytest.raises(clp.BackendUnavailable, match="no backend that can run such calls declares rows whose bits"):
            chosen(LARGE._replace(vocab=1032))


def test_ratios_start_at_exactly_1():
    logits, labels = torch.randn(1024, 1031), torch.randint(1031, (1024,))
    with clp.autotune(row_invariant=True):
        old = clp.log_probs_from_logits(logits, labels)
        new = [clp.log_probs_from_logits(logits[n : n + 64].requires_grad_(), labels[n : n + 64]) for n in (0, 64, 960)]
        few = clp.log_probs_from_logits(logits[:3], labels[:3])
    for start, part in zip((0, 64, 960), new, strict=True):
        assert ((part - old[start : start + 64]).exp() == 1.0).all()
    assert torch.equal(few, old[:3])


# Why nothing is measured


def test_why_nothing_is_measured(own_registry, monkeypatch):
    assert why_not_measure(LARGE) is None
    assert why_not_measure(LARGE, under=Policy("lookup")) == "the mode is 'lookup'"
    assert why_not_measure(LARGE, under=Policy("off")) == "the mode is 'off'"
    assert why_not_measure(LARGE, under=Policy(require_hit=True)) == "require_hit=True forbids it"
    assert why_not_measure(SMALL) == "it has fewer than 2^20 logits"
    only_eager = LARGE._replace(dtype=torch.float64)
    assert why_not_measure(only_eager) == "only eager can run it"
    clp.register_backend("doubling", "no_such_package:Doubling")  # which nobody imports
    assert why_not_measure(only_eager) is None
    assert why_not_measure(LARGE._replace(device_type="mps"), torch.device("mps")) == "nothing is measured on mps"
    memory.MEMORY.spent_s = 60.0
    assert why_not_measure(LARGE) == "the process has used up its 60 s for measuring"
    monkeypatch.setattr(memory, "MEMORY", Memory(is_forked=True))
    assert why_not_measure(LARGE) == "this process is a forked child of another"
    monkeypatch.setattr(memory, "MEMORY", Memory())
    publish(decided(candidates=all_measured() | {"doubling": measured("eager")}))
    assert why_not_measure(LARGE) == "it has been measured already, without a choice that may serve now"


RANKS = "this process is one of several ranks; call tune(..., group=...) on all of them"


@pytest.mark.parametrize(("size", "reason"), [("64", RANKS), ("1", None), ("", None), ("many", None)])
def test_one_of_several_ranks_measures_nothing(monkeypatch, size, reason):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert why_not_measure(LARGE) == reason


def test_nor_does_a_process_that_has_joined_a_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert why_not_measure(LARGE) == RANKS
    finally:
        dist.destroy_process_group()


def test_an_accelerator_needs_room_for_it(monkeypatch):
    """As on a GPU: three times the logits and 2 GiB have to be free."""
    problem = LARGE._replace(device_type="cuda", rows=2**20, vocab=1024)  # 4 GiB
    monkeypatch.setattr(rule, "_others_can_run", lambda problem: True)
    for free, reason in [
        (14 * 1024 * MIB, None),
        (14 * 1024 * MIB - 1, "14.0 GiB of the device's memory are free, and 14.0 GiB are needed"),
    ]:
        monkeypatch.setattr(rule, "free_memory", lambda device, free=free: free)
        assert why_not_measure(problem, torch.device("cuda")) == reason


def test_a_broken_profile_is_a_miss_that_does_not_hide_the_one_behind_it(mode, elsewhere, nothing_measures):
    mode("lookup")
    publish(decided())
    publish(decided(chosen="compiled"), Store(elsewhere / "bundled"))
    path = user_store().path(fingerprint_of(CPU), LARGE)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="is passed over"):
        assert chosen() == ("compiled", "bundled profiles")
