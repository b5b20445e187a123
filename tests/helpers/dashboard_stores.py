"""Stores for the dashboard's tests: one folder of profiles a scenario, made by hand; nothing is measured.

`SCENARIOS` names them; the fixture `scenario` makes one the user's store, with no other beside it. `generate` writes
thousands of decisions.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from compiled_logprobs.decision import Candidate, Check, Decision, Speedup
from compiled_logprobs.machine.environment import Environment, environment_at
from compiled_logprobs.problem import MODES, Problem, as_it_lies
from compiled_logprobs.store.files import FACTS, Store
from compiled_logprobs.tuning.presets import MODELS
from tests.helpers.stored_decisions import CPU, all_measured, decided, evidence_of, measured

QWEN = MODELS["qwen3"]
AT = "2026-11-20T12:00:00Z"
EARLIER = "2026-10-20T12:00:00Z"
H100 = dataclasses.replace(
    environment_at(CPU),
    device_type="cuda",
    memory_bytes=80 * 2**30,
    gpu_name="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    multiprocessors=132,
    l2_bytes=50 * 2**20,
    driver="580.65",
    torch="2.12.0+cu130",
    triton="3.6.0",
    cuda="13.0",
)
"""A device that no test runs on. Its figures below are made up, and no page that people see holds them."""
HOSTILE = '"<b onclick=alert(1)>x</b>'


def here() -> Environment:
    """The CPU that the test runs on."""
    return environment_at(CPU)


def problem(
    rows: int = 512, vocab: int = QWEN, dtype: torch.dtype = torch.bfloat16, mode: str = "backward", device: str = "cpu"
) -> Problem:
    """A problem as a profile run poses it."""
    return as_it_lies(Problem(device, rows, vocab, dtype, **{**MODES, "forward, entropy": {"entropy": True}}[mode]))


def about(speedup: float) -> Speedup:
    """With an interval of 5 % to both sides."""
    return Speedup(0.95 * speedup, speedup, 1.05 * speedup)


def good_candidates(scale: float = 1.0) -> dict[str, Candidate]:
    """cpp the fastest, then compiled, then eager; flash_attn cannot run. `scale` multiplies all times."""
    checks = tuple(Check(name, True, 1e-6, 1e-5, "") for name in ("log_prob_error", "gradient_error"))
    times = {"eager": (0.2, 1.31, 1.0), "compiled": (0.075, 1.0, 2.67), "cpp": (0.03, 1.0, 6.67)}
    found = {
        name: measured(
            name,
            seconds=seconds * scale,
            extra_bytes=int(multiple * 512 * QWEN * 2),
            extra_multiple=multiple,
            speedup=about(speedup) if name != "eager" else Speedup(1.0, 1.0, 1.0),
            speedup_over_plain=about(1.2 * speedup),
            percent_of_bandwidth=6.0 * speedup,
            checks=checks,
        )
        for name, (seconds, multiple, speedup) in times.items()
    }
    found["flash_attn"] = all_measured()["flash_attn"]
    return found


def good(what: Problem | None = None, scale: float = 1.0, **changes: Any) -> Decision:
    """A decision for cpp, measured here."""
    fields: dict[str, Any] = {
        "candidates": good_candidates(scale),
        "measured_at": AT,
        "bandwidth": {"read": 3.5e10, "copy": 3.1e10, "in_place": 4.5e10, "buffer_bytes": 2.0**27},
    }
    return decided(what or problem(), "cpp", **{**fields, **changes})


def all_failed(what: Problem | None = None) -> Decision:
    """Nothing but eager got through: the others are wrong, crashed, out of memory, timed out or failed."""
    eager = good_candidates()["eager"]
    wrong = Check("log_prob_error", False, 0.7, 1e-5, "row 3 is off by 0.7")
    candidates = {
        "eager": eager,
        "cpp": Candidate("wrong", "log_prob_error: row 3 is off by 0.7", "0" * 16, checks=(wrong, *eager.checks)),
        "compiled": Candidate("crashed", "the worker ended with signal 11", "0" * 16),
        "flash_attn": Candidate("oom", "out of memory", None),
        "third": Candidate("timeout", "not done within 20 s", "1" * 16),
        "fourth": Candidate("failed", "RuntimeError: no", "2" * 16),
    }
    told = {"code": "ONLY_ONE", "reason": "nothing but eager could be measured", "measured_at": AT}
    return decided(what or problem(), "eager", candidates=candidates, **told)


def publish(where: Store, decision: Decision, environment: Environment | None = None, *, evidence: bool = True) -> None:
    """Store `decision`, with raw times that agree with it, as if it were measured in `environment`."""
    environment = environment or here()
    decision = dataclasses.replace(decision, environment=environment.to_dict())
    seconds = {
        name: [one.seconds * (0.95 + 0.005 * number) for number in range(decision.rounds)]
        for name, one in decision.candidates.items()
        if one.seconds is not None
    }
    where.publish(environment, decision, evidence_of(decision, seconds) if evidence else None)


def many(where: Store) -> None:
    """A grid of this machine with a tie and a loss in it, two decisions by an earlier torch, another machine's."""
    special = {(64, QWEN): tied, (64, MODELS["gpt2"]): baseline_wins}
    vocabs, dtypes = (QWEN, MODELS["llama3"], MODELS["gpt2"]), (torch.float32, torch.bfloat16)
    for rows, vocab, dtype, mode in itertools.product((64, 512, 2048), vocabs, dtypes, ("forward", "backward")):
        what = problem(rows, vocab, dtype, mode)
        make = special.get((rows, vocab), partial(good, scale=rows * vocab / (512 * QWEN)))
        publish(where, make(what))
    for mode in ("forward", "backward"):
        publish(where, good(problem(mode=mode), scale=1.4, measured_at=EARLIER), an_earlier_torch())
    other_device(where)


def an_earlier_torch() -> Environment:
    """This machine, before torch was upgraded."""
    return dataclasses.replace(here(), torch="2.12.0+cpu")


def undecided(what: Problem | None = None, **changes: Any) -> Decision:
    """12 rounds do not tell whether cpp, 4.83x as fast in their median, is faster than eager."""
    candidates = with_changes(good_candidates(), "cpp", "compiled", speedup=Speedup(0.9, 0.95, 1.0))
    candidates = with_changes(candidates, "cpp", outcome="tie", speedup=Speedup(0.24, 4.83, 31.85))
    told = {"code": "LEAST_REGRET", "reason": "12 rounds do not tell whether cpp is faster than eager by 3%"}
    fields = {"candidates": candidates, "rounds": 12, "settled": False, "measured_at": AT, **told, **changes}
    return decided(what or problem(), "eager", **fields)


def with_changes(candidates: dict[str, Candidate], *names: str, **changes: Any) -> dict[str, Candidate]:
    """`candidates` with these fields of those names changed; of all that were timed, where none is named."""
    names = names or tuple(name for name, each in candidates.items() if each.measured)
    return candidates | {name: dataclasses.replace(candidates[name], **changes) for name in names}


def tied(what: Problem) -> Decision:
    """compiled is as fast as cpp, and cpp is taken for being simpler."""
    speeds = {"speedup": Speedup(6.4, 6.6, 6.8), "speedup_over_plain": Speedup(7.7, 7.9, 8.1), "seconds": 0.003}
    told = {"outcome": "tie", "reason": "as fast as cpp, within 3%"}
    candidates = with_changes(good_candidates(0.1), "compiled", **speeds, **told)
    return good(what, candidates=candidates, code="TIE_SIMPLEST", reason="clearly faster than eager; a tie with others")


def baseline_wins(what: Problem) -> Decision:
    """Nothing is clearly faster than eager."""
    speeds = {"speedup": Speedup(0.9, 0.95, 1.0), "speedup_over_plain": Speedup(1.0, 1.1, 1.2), "seconds": 0.0021}
    candidates = with_changes(good_candidates(0.01), "cpp", "compiled", **speeds, outcome="slower", reason="slower")
    told = {"code": "BASELINE_NO_CLEAR_GAIN", "reason": "nothing is faster than eager by 3%", "measured_at": AT}
    return decided(what, "eager", candidates=candidates, **told)


def corrupt(where: Store) -> None:
    """One good decision among files that are broken, each in another way that the dashboard has to list."""
    publish(where, good())
    folder = where.path(here().fingerprint(), problem()).parent
    whole = where.path(here().fingerprint(), problem()).read_text()
    broken = {"n1": "", "n3": "[" * 100_000, "n4": whole}  # the last is of another problem
    for name, text in {f"cpu-{rows}-v1031-float32-unaligned": text for rows, text in broken.items()}.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "not-a-problem.json").write_text("{}")
    (folder / "cpu-n24-v1031-float32-unaligned.json").mkdir()
    (folder / "README.json.txt").write_text("not one of a store's files")


def cut_off(where: Store) -> None:
    """As a run that was cut off leaves it: part of a grid, no evidence, no facts, figures missing."""
    unknown = ("extra_bytes", "extra_multiple", "percent_of_bandwidth", "first_call_seconds", "speedup_over_plain")
    unknown += ("repeatable", "row_invariant")
    speedup = Speedup(None, 1.5, None)
    candidates = with_changes(good_candidates(), **dict.fromkeys(unknown), checks=(), speedup=speedup)
    few: dict[str, Any] = {"rounds": 3, "settled": False, "measured_rows": 128, "short_check": True, "bandwidth": {}}
    publish(where, good(problem(512), candidates=candidates, **few), evidence=False)
    publish(where, good(problem(64), candidates={name: candidates[name] for name in ("cpp", "eager")}, **few))
    where.path(here().fingerprint(), problem()).parents[1].joinpath(FACTS).unlink()


def other_device(where: Store) -> None:
    """Of a GPU that is not here, by another torch; figures that nobody measured."""
    for rows in (2048, 8192):
        for mode in ("forward", "backward"):
            # As an earlier release stored them, which did not time plain log_softmax and gather.
            candidates = with_changes(good_candidates(rows / 512 / 100), speedup_over_plain=None)
            candidates["compiled"] = dataclasses.replace(candidates["cpp"], fingerprint="f" * 16)
            candidates["cpp"] = Candidate("unsupported", "needs the CPU", "0" * 16)
            what = problem(rows, mode=mode, device="cuda")
            publish(where, decided(what, "compiled", candidates=candidates, measured_at=AT), H100)


def every_failed(where: Store) -> None:
    """Decisions in which nothing but the baseline got through."""
    publish(where, all_failed())
    publish(where, all_failed(problem(64, mode="forward")))


def hostile(where: Store) -> None:
    """Names, reasons and a device that hold markup, and figures that are far out; all of it with right digests."""
    environment = dataclasses.replace(H100, gpu_name=f"{HOSTILE} [x](http://example.invalid)", torch="**2.13**")
    strange = dataclasses.replace(
        good_candidates()["compiled"],
        reason=f"{HOSTILE} $x$ :red[y]",
        seconds=1e300,
        extra_bytes=2**62,
        percent_of_bandwidth=-1e300,
    )
    candidates = {**good_candidates(), HOSTILE: strange, "%{x}<a href='http://example.invalid'>": strange}
    what = problem(2048, mode="backward", device="cuda")
    publish(where, decided(what, HOSTILE, candidates=candidates, reason=HOSTILE, measured_at=HOSTILE), environment)
    odd = {"cpu_threads": "many", "torch": 5, "gpu_name": f"{HOSTILE} [x](http://example.invalid)"}
    facts = where.path(environment.fingerprint(), what).parents[1] / FACTS
    facts.write_text(json.dumps({**environment.to_dict(), **odd}))


def wrong_sign(what: Problem | None = None, name: str = "compiled") -> Decision:
    """cpp serves; `name` returned the loss, and was stopped."""
    checks = (
        Check("log_prob_sign", False, 20.3, 0.0, "row 3 is +20.3"),
        Check("log_prob_error", False, 40.6, 1e-5, "row 3 is off by 40.6"),
    )
    reason = "returns the loss: minus the log-probability (log_prob_sign, log_prob_error: row 3 is +20.3)"
    decision = good(what)
    return dataclasses.replace(
        decision, candidates={**decision.candidates, name: Candidate("wrong", reason, "0" * 16, checks=checks)}
    )


def signs(where: Store) -> None:
    """A grid of which one backend has the wrong sign at one V and mode, and a decision is undecided."""
    vocabs, modes = (QWEN, MODELS["llama3"], MODELS["gpt2"]), ("forward", "backward")
    for rows, vocab, dtype, mode in itertools.product((64, 512, 4096), vocabs, (torch.float32, torch.bfloat16), modes):
        what = problem(rows, vocab, dtype, mode)
        is_wrong = vocab == QWEN and mode == "backward" and rows == 512
        publish(where, wrong_sign(what) if is_wrong else good(what, scale=rows * vocab / (512 * QWEN)))
    publish(where, undecided(problem(64, MODELS["gemma3"])))


def dated(where: Store) -> None:
    """The same problems, measured a month before and again; one of them is slower now, and one has another winner."""
    for rows in (64, 512):
        publish(where, good(problem(rows), measured_at=EARLIER))
    publish(where, good(problem(64), scale=1.5))
    publish(where, baseline_wins(problem(512)))


SCENARIOS: dict[str, Callable[[Store], None]] = {
    "no profile": lambda where: None,
    "one": lambda where: publish(where, good()),
    "many": many,
    "corrupt": corrupt,
    "partial": cut_off,
    "other device": other_device,
    "all failed": every_failed,
    "undecided": lambda where: publish(where, undecided()),
    "hostile": hostile,
    "signs": signs,
    "dated": dated,
}


def generate(where: Store, count: int, *, wrong: int = 0) -> None:
    """Write `count` decisions over modes, dtypes, N and many V; in the last `wrong` of them a sign is wrong.

    Without evidence, and without waiting for the disk.
    """
    name, facts = here().fingerprint(), here().to_dict()
    folder = where.path(name, problem()).parent
    folder.mkdir(parents=True)
    folder.parent.joinpath(FACTS).write_text(json.dumps(facts))
    kinds = itertools.product(("forward", "backward"), (torch.float32, torch.bfloat16), (64, 512, 4096, 16384))
    for number, (vocab, (mode, dtype, rows)) in enumerate(itertools.product(range(count), list(kinds))):
        if number == count:
            break
        what = problem(rows, QWEN + 128 * vocab, dtype, mode)
        decision = good(what) if number < count - wrong else wrong_sign(what)
        changed = dataclasses.replace(decision, environment=facts, seed=number)
        where.path(name, what).write_bytes(changed.to_json())
