"""One rank of a process group: goes through scenarios, one after another, and writes what came of each, as JSON.

python rank.py FOLDER SCENARIO...

Under torchrun it joins the group as that says. Else RANK, WORLD_SIZE and METHOD (where to meet) say so; the last of several
scenarios may kill ranks, and nothing but the limits of `Meeting` keeps the others from waiting for ever.
"""

import dataclasses
import json
import os
import resource
import signal
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path

import torch
from torch import distributed

import compiled_logprobs as clp
from compiled_logprobs import Problem
from compiled_logprobs.choose import group as ours
from compiled_logprobs.choose import meeting, rule, view
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.decision import Evidence
from compiled_logprobs.store.files import ROOT_VARIABLE, Store, digest
from tests.helpers.backends_for_tuning import SLOW_VARIABLE
from tests.helpers.stored_decisions import decided, measured, publish

registry = import_module("compiled_logprobs.backends")
FOLDER = Path(sys.argv[1])
RANK = int(os.environ["RANK"])
QUICK = {"eager": registry.BUILT_IN["eager"], "right": "backends_for_tuning:Right"}
"""The backends of most scenarios: to be measured in seconds."""


def problem_of(number: int) -> Problem:
    """One for each scenario, so that none knows what another decided."""
    return Problem("cpu", 1024, 1031 + 2 * number, torch.float32, needs_grad=True, aligned=False)


def backends(**targets: str) -> None:
    """These and no others are registered from now on."""
    registry._targets.clear()
    registry._targets.update(targets)
    for name in [*registry._loaded]:
        if name not in targets:
            del registry._loaded[name]


def tune(*asked, **options) -> dict:
    """What `tune(group=...)` comes to on this rank, and what serves a call afterwards."""
    found: dict = {"began": time.monotonic()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = clp.tune(*asked, **{"budget_s": 2, "group": distributed.group.WORLD, **options})
            found["decisions"] = [
                {"chosen": one.chosen, "code": one.code, "digest": digest(one.record()), "record": one.record()}
                for one in got
            ]
        except (clp.LogProbsError, KeyboardInterrupt) as error:
            found["error"] = f"{type(error).__name__}: {error}"
    found["seconds"] = time.monotonic() - found.pop("began")
    found["warned"] = [str(one.message) for one in caught if one.category is RuntimeWarning]
    return found


def call(problem: Problem) -> dict:
    """What a call says of itself; it has to be right."""
    logits = torch.randn(problem.rows - 4, problem.vocab, requires_grad=problem.needs_grad)
    labels = torch.randint(problem.vocab, (problem.rows - 4,))
    out = clp.log_probs_from_logits(logits, labels)
    true = logits.detach().double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert (out.detach() - true).abs().max() < 1e-5, "wrong"
    found = clp.explain(logits, labels)
    return {"backend": found.backend, "source": found.source}


def store_at(name: str) -> Store:
    """The user's store from now on; one that all ranks share, unless the name says otherwise."""
    os.environ[ROOT_VARIABLE] = str(FOLDER / name)
    return Store(FOLDER / name)


def tune_and_call(problem: Problem, **options) -> dict:
    return {**tune([problem], **options), **call(problem)}


def measuring(instead) -> None:
    """Let this rank do something else than to measure, should it be to."""

    class Tuner(ours.Tuner):
        def decide(self, *arguments, **options):
            instead()
            raise RuntimeError("after that, there is nothing")

    ours.Tuner = Tuner


class Made(ours.Tuner):
    """Decides at once, for the last of those that it is to measure."""

    def decide(self, problem, seconds, *, names, incumbent):
        candidates = {name: measured(name) for name in names}
        times = {name: [measured(name).seconds] * 10 for name in names}
        return decided(problem, names[-1], candidates=candidates), Evidence(times)


def fail(error: BaseException):
    def instead():
        raise error

    return instead


# --- nothing is wrong ------------------------------------------------------------------------------------------------


def same() -> dict:
    """Two problems, one of them twice over."""
    problems = [problem_of(0), problem_of(1), problem_of(0)._replace(rows=1000)]
    return {**tune(problems), **call(problem_of(0))}


def tuned_again() -> dict:
    """What is stored is not measured again."""
    measuring(fail(AssertionError("it is stored")))
    return tune_and_call(problem_of(0))


def subgroup() -> dict:
    """Of the last two ranks, whose own first one measures; the others hold nothing, and are told so if they call."""
    ours.Tuner = Made
    group = distributed.new_group([2, 3])
    return tune([problem_of(2)], group=group)


def name_given_again() -> dict:
    """To a group of other ranks, with a store of its own; the first was in both."""
    ours.Tuner = Made
    found = []
    for number, members in enumerate([[0, 1], [0, 2]]):
        join(f"file://{FOLDER / f'meeting {number}'}")
        group = distributed.new_group(members)
        found.append(group.group_name if RANK in members else None)
        if RANK in members:
            last = tune_and_call(problem_of(25 + number), group=group)
        distributed.barrier()
    return {**last, "names": found}


def joins_late() -> dict:
    """As with torch.multiprocessing.spawn: until it joins the group, a rank does not look like one, and tunes by itself."""
    size = os.environ.pop("WORLD_SIZE")
    distributed.destroy_process_group()
    candidates = {"eager": measured("eager"), "right": measured("right")}
    decisions.remember_decision(decided(problem_of(27), "right" if RANK else "eager", candidates=candidates))
    before = call(problem_of(27))["backend"]
    os.environ["WORLD_SIZE"] = size
    join(f"file://{FOLDER / 'meeting late'}")
    return {"before": before, **call(problem_of(27))}


def slowest() -> dict:
    """As if the ranks were on two devices, so that two measure; on the second, one backend is slow."""
    ours._machine = lambda: f"machine {min(RANK, 1)}"
    os.environ[SLOW_VARIABLE] = "0.1" if RANK == 1 else "0"
    backends(eager=QUICK["eager"], told="backends_for_tuning:SlowWhereTold", right=QUICK["right"])
    return tune_and_call(problem_of(3))


# --- arguments, registries, stores and environments that differ -------------------------------------------------------


def other_problems() -> dict:
    return tune([problem_of(4)._replace(masked_logits=RANK == 1)])


def more_problems() -> dict:
    return tune([problem_of(4), problem_of(5)][: 1 + (RANK == 1)])


def wrong_arguments() -> dict:
    return tune([problem_of(4)], budget_s=-1 if RANK == 1 else 2)


def broken_arguments() -> dict:
    """A generator that fails on one rank."""
    return tune(1 / (RANK != 1) and one for one in [problem_of(4)])


def registered_on_one() -> dict:
    """One backend on the first rank only, one on the second only, one under the same name with other code."""
    ours.Tuner = Made
    extra = {0: {"mine": "backends_for_tuning:Same"}, 1: {"its": "backends_for_tuning:Same"}}.get(RANK, {})
    backends(**QUICK, **extra, other="backends_for_tuning:" + ("Same" if RANK == 0 else "Right"))
    return tune_and_call(problem_of(6))


def cannot_run_on_one() -> dict:
    """A built-in backend that one rank has no compiler for."""
    ours.Tuner = Made
    backends(**QUICK, cpp=registry.BUILT_IN["cpp"])
    if RANK == 1:
        registry.get_backend("cpp").why_not = lambda problem: "there is no compiler"
    return tune_and_call(problem_of(7))


def cannot_import_on_one() -> dict:
    """A third party's, which is chosen, and which one rank has not installed."""
    ours.Tuner = Made
    if RANK == 1:
        module = sys.modules.pop("backends_for_tuning")
        sys.modules["backends_for_tuning"] = None  # type: ignore[assignment]
        registry._loaded.pop("right", None)
    found = tune_and_call(problem_of(8))
    if RANK == 1:
        sys.modules["backends_for_tuning"] = module
    return found


def other_stores() -> dict:
    """Each rank has its own; the second's holds a decision for eager, the third's one of other code, the others' none."""
    ours.Tuner = Made
    store = store_at(f"store of rank {RANK}")
    candidates = {"eager": measured("eager"), "right": measured("right")}
    if RANK == 1:
        publish(decided(problem_of(9), "eager", candidates=candidates), store)
    if RANK == 2:
        stale = {**candidates, "right": measured("right", fingerprint="of old")}
        publish(decided(problem_of(9), "right", candidates=stale), store)
    before = clp.explain(*posed(problem_of(9))).backend
    return {"before": before, **tune_and_call(problem_of(9))}


def only_first_has_it() -> dict:
    """The first rank's store holds a decision, and it is that; nothing is measured."""
    store = store_at(f"store of rank {RANK}")
    measuring(fail(AssertionError("the first rank's store has it")))
    if RANK == 0:
        publish(
            decided(problem_of(10), "right", candidates={"eager": measured("eager"), "right": measured("right")}), store
        )
    return tune_and_call(problem_of(10))


def other_environment() -> dict:
    if RANK == 1:
        torch.set_num_threads(torch.get_num_threads() + 1)
    found = tune_and_call(problem_of(11))
    torch.set_num_threads(1)
    return found


def other_release() -> dict:
    """One rank has other code of the package itself."""
    real = rule.code_of
    if RANK == 1:
        rule.code_of = lambda name: "of old"
    found = tune_and_call(problem_of(24))
    rule.code_of = real
    return found


def holds_another() -> dict:
    """What one rank received is not what was sent."""
    ours.Tuner = Made
    real = ours._limited
    if RANK == 1:
        ours._limited = lambda decision, missing: dataclasses.replace(real(decision, missing), reason="it is Tuesday")
    found = tune_and_call(problem_of(23))
    ours._limited = real
    return found


# --- faults ----------------------------------------------------------------------------------------------------------


def raises() -> dict:
    measuring(fail(OSError("the disk is gone")))
    return tune_and_call(problem_of(12))


def out_of_memory() -> dict:
    """Of the first rank, for real: its address space is limited to what it has."""

    def instead() -> None:
        limit = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24, limit[1]))
        try:
            bytearray(2**30)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)

    measuring(instead)
    return tune_and_call(problem_of(13))


def interrupted() -> dict:
    """As by Ctrl-C, on the rank that measures."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    measuring(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(30)))
    return tune_and_call(problem_of(14))


def comes_late() -> dict:
    ours.Tuner = Made
    if RANK == 1:
        time.sleep(meeting.SILENCE_S + meeting.GRACE_S + 2)
    return tune_and_call(problem_of(15))


def hangs() -> dict:
    """The rank that measures, for longer than the others wait; then it goes on."""
    measuring(lambda: time.sleep(meeting.SILENCE_S + meeting.GRACE_S + 2))
    return tune_and_call(problem_of(16))


def is_stopped() -> dict:
    """Another rank, in the last step, as a debugger or a scheduler stops it; it goes on when the others have ended theirs."""
    ours.Tuner = Made
    ours._Rank.hold = beforehand(ours._Rank.hold, lambda: RANK == 1 and os.kill(os.getpid(), signal.SIGSTOP))
    found = tune_and_call(problem_of(17))
    if RANK == 0:
        os.kill(int((FOLDER / "pid of rank 1").read_text()), signal.SIGCONT)
    return found


def exits() -> dict:
    """One rank, between two steps, without a word."""
    ours.Tuner = Made
    ours._Rank.hold = beforehand(ours._Rank.hold, lambda: RANK == 1 and os._exit(1))
    return tune_and_call(problem_of(18))


def without_it() -> dict:
    """Those that are left, once more."""
    ours.Tuner = Made
    return tune_and_call(problem_of(19))


def host_is_stopped() -> dict:
    """The first rank, while it measures, as a debugger stops it; it goes on when the others have ended theirs."""
    measuring(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    found = tune_and_call(problem_of(20))
    if RANK == 1:
        os.kill(int((FOLDER / "pid of rank 0").read_text()), signal.SIGCONT)
    return found


def is_killed() -> dict:
    """The first rank, while it measures: as the kernel does where memory runs out."""
    measuring(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return tune_and_call(problem_of(20))


# --- without tune ----------------------------------------------------------------------------------------------------


def frozen() -> dict:
    """Another process stores decisions while the ranks run."""
    measuring(fail(AssertionError("ranks never measure by themselves")))
    backends(**QUICK)
    store = store_at("shared store")
    early, late, nearby = problem_of(21), problem_of(22), problem_of(21)._replace(rows=4096)
    candidates = {"eager": measured("eager"), "right": measured("right")}
    if RANK == 0:
        publish(decided(early, "right", candidates=dict(candidates)), store)
    distributed.barrier()
    found = {"early": call(early) if RANK == 0 else clp.explain(*posed(early)).backend}
    distributed.barrier()
    if RANK == 0:
        for problem in (late, nearby):
            publish(decided(problem, "right", candidates=dict(candidates)), store)
        publish(decided(early, "eager", candidates=dict(candidates)), store)
    distributed.barrier()
    return {**found, "early": call(early), "late": call(late), "nearby": call(nearby)}


def invariant_rows() -> dict:
    """Tuned together without the gradient alone; the stores of the ranks hold different decisions with it, or none."""
    ours.Tuner = Made
    with_gradient, without = problem_of(28), problem_of(28)._replace(needs_grad=False)
    store = store_at(f"store of rank {RANK} for invariant rows")
    if RANK > 0:
        candidates = {"eager": measured("eager"), "right": measured("right")}
        publish(decided(with_gradient, ["eager", "right"][RANK % 2], candidates=candidates), store)
    found = tune([without])
    with clp.autotune(row_invariant=True):
        old, new = call(without), call(with_gradient)
    return {**found, **old, "new": new}


def posed(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.empty(problem.rows, problem.vocab, requires_grad=problem.needs_grad)
    return logits, torch.zeros(problem.rows, dtype=torch.int64)


def beforehand(method, action):
    def changed(*arguments):
        action()
        return method(*arguments)

    return changed


def join(method: str | None) -> None:
    """Become one of a new group; `method` says where all meet."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
    where = {} if method is None else {"init_method": method}
    distributed.init_process_group("gloo", rank=RANK, world_size=int(os.environ["WORLD_SIZE"]), **where)


def main() -> None:
    signal.alarm(200)  # rather than to hang: the test says what is missing
    (FOLDER / f"pid of rank {RANK}").write_text(str(os.getpid()))
    meeting.SILENCE_S = float(os.environ.get("SILENCE_S", meeting.SILENCE_S))
    meeting.GRACE_S = float(os.environ.get("GRACE_S", meeting.GRACE_S))
    torch.set_num_threads(1)
    join(os.environ.get("METHOD"))
    real = ours.Tuner, ours._machine, ours._Rank.hold
    for number, name in enumerate(sys.argv[2:]):
        ours.Tuner, ours._machine, ours._Rank.hold = real
        backends(**QUICK)
        store_at("store")
        view._frozen.clear()
        if name != "without_it":
            distributed.barrier()
        found = globals()[name]()
        # Whole, or not at all: the test looks for it as soon as the process has ended.
        (FOLDER / f"{number} {name} of rank {RANK}").write_text(json.dumps(found))
    os._exit(0)  # with ranks that were killed, there is nobody to leave the group with


main()
