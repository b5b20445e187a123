"""TRL's GRPO and DPO, with its own log-probability functions and, patched, with those of this library.

Run with the last version whose trainers call them, and with one of the older arguments (`make test-integrations`).
"""

import contextlib
import functools
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import trl
from torch import Tensor
from trl.trainer import dpo_trainer, grpo_trainer

from compiled_logprobs import compat
from tests.helpers import compat_originals
from tests.integrations.tiny_trainers import LEARNING_RATE, STEPS, Steps, train_dpo, train_grpo

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

EPS = torch.finfo(torch.float32).eps
ALGORITHMS = ("grpo", "dpo")
FUNCTIONS = ("selective_log_softmax", "selective_log_softmax_and_entropy")
CALLS_A_STEP = {"grpo": 1, "dpo": 2}
"""How often the loss of a step needs log-probabilities at least: DPO's those of the reference model as well."""


def training(algorithm: str, dtype: torch.dtype, folder, learning_rate: float, replayed: Steps | None) -> Steps:
    if algorithm == "grpo":
        return train_grpo(dtype, folder, learning_rate, replayed)
    return train_dpo(dtype, folder, learning_rate)


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """Trains once for each set of arguments."""

    @functools.cache
    def run(algorithm: str, dtype: torch.dtype, patched: bool, learning_rate: float = LEARNING_RATE) -> Steps:
        # Other dtypes are given the completions that were sampled in float32.
        replayed = None if dtype == torch.float32 else run(algorithm, torch.float32, False)
        with compat.patch("trl") if patched else contextlib.nullcontext():
            return training(algorithm, dtype, tmp_path_factory.mktemp(algorithm), learning_rate, replayed)

    return run


def distance(got: list[Tensor], true: list[Tensor]) -> float:
    """Relative to the size of what is true."""
    got_all, true_all = (torch.cat([one.double().flatten() for one in some]) for some in (got, true))
    return ((got_all - true_all).norm() / true_all.norm()).item()


def test_patching_reaches_both_trainers(report):
    before = grpo_trainer.selective_log_softmax
    with compat.patch("trl") as patched:
        assert grpo_trainer.selective_log_softmax is dpo_trainer.selective_log_softmax is not before
    for module in ("trl.trainer.utils", "trl.trainer.grpo_trainer", "trl.trainer.dpo_trainer"):
        assert f"{module}.selective_log_softmax" in patched.places
    assert patched.version == trl.__version__
    assert grpo_trainer.selective_log_softmax is dpo_trainer.selective_log_softmax is before
    report(str(patched))


def test_the_page_about_frameworks_runs():
    """The block that tests/test_docs.py cannot execute."""
    page = (Path(__file__).parents[2] / "docs/frameworks.md").read_text()
    (block,) = re.findall(r"<!-- not executed: it needs TRL.*?-->\n```python\n(.*?)```", page, re.S)
    before, names = grpo_trainer.selective_log_softmax, {}
    exec(block, names)
    assert "trl.trainer.utils.selective_log_softmax" in names["report"].places
    assert grpo_trainer.selective_log_softmax is before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ours_is_called_in_each_step(train, algorithm, dtype):
    patched, plain = train(algorithm, dtype, True), train(algorithm, dtype, False)
    assert len(patched.calls) == STEPS and min(patched.calls) >= CALLS_A_STEP[algorithm]
    assert plain.calls == [0] * STEPS


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_float32_agrees_to_rounding(train, report, algorithm):
    """The same completions are sampled; losses and gradients are as close to TRL's as those are to float64."""
    theirs, mine = train(algorithm, torch.float32, False), train(algorithm, torch.float32, True)
    true = train(algorithm, torch.float64, False)
    assert mine.completions == theirs.completions
    assert len(mine.losses) == len(theirs.losses) == STEPS
    # A log-probability is some 10 nats here. A loss is a mean of them, or of differences of their sums over 16 tokens.
    assert max(abs(a - b) for a, b in zip(mine.losses, theirs.losses, strict=True)) < 16 * 10 * EPS
    apart = distance(mine.gradients, theirs.gradients)
    from_true = [distance(steps.gradients, true.gradients) for steps in (theirs, mine)]
    report(
        f"{algorithm}, float32: gradients {apart:.1e} apart; from a float64 run TRL's {from_true[0]:.1e}, "
        f"ours {from_true[1]:.1e}"
    )
    assert apart < 2 * from_true[0] and from_true[1] < 1.5 * from_true[0]


@dataclass
class Seen:
    """What went through the log-probability functions of a training."""

    log_probs: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """Of the logits of each call that needs one."""


def record(monkeypatch, seen: Seen, exact: bool) -> None:
    """Have the trainers' functions write into `seen`; with `exact` replaced by the formula in float64."""

    def recording(name: str, function):
        def call(logits, *arguments, **options):
            x = logits.double() if exact else logits
            if x.requires_grad:
                number = len(seen.log_probs)
                x.register_hook(lambda gradient: seen.gradients.__setitem__(number, gradient.double()))
            results = function(x, *arguments, **options)
            seen.log_probs.append((results if name == FUNCTIONS[0] else results[0]).detach().double().clone())
            return results

        return call

    for module in (grpo_trainer, dpo_trainer):
        for name in FUNCTIONS:
            if hasattr(module, name):
                function = compat_originals.ORIGINALS[f"trl.{name}"] if exact else getattr(module, name)
                monkeypatch.setattr(module, name, recording(name, function))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16_is_no_further_from_float64(train, report, monkeypatch, tmp_path, algorithm):
    """From the same logits, those of a model in bfloat16 that learns nothing: log-probabilities, and gradients of the
    logits, beside a run that computes them in float64.
    """
    replayed = train(algorithm, torch.float32, False)
    seen = defaultdict(Seen)
    for who in ("TRL", "ours", "float64"):
        with compat.patch("trl") if who == "ours" else contextlib.nullcontext(), monkeypatch.context() as replaced:
            record(replaced, seen[who], exact=who == "float64")
            training(algorithm, torch.bfloat16, tmp_path, 0.0, replayed)
    true = seen["float64"]
    assert len(true.gradients) >= STEPS
    assert seen["TRL"].gradients.keys() == seen["ours"].gradients.keys() == true.gradients.keys()

    errors = {
        who: torch.cat([(a - b).abs().flatten() for a, b in zip(seen[who].log_probs, true.log_probs, strict=True)])
        for who in ("TRL", "ours")
    }
    assert (errors["ours"] <= errors["TRL"] + 64 * EPS).all()  # at a tie either of two neighbours is right
    apart = {
        who: distance(list(seen[who].gradients.values()), list(true.gradients.values())) for who in ("TRL", "ours")
    }
    report(
        f"{algorithm}, bfloat16, from float64 on the same logits: log-probabilities TRL's {errors['TRL'].mean():.2e}, "
        f"ours {errors['ours'].mean():.2e} nats; gradients of the logits TRL's {apart['TRL']:.2e}, ours "
        f"{apart['ours']:.2e}"
    )
    assert apart["ours"] <= apart["TRL"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16_in_the_whole_model_hides_the_difference(train, report, algorithm):
    """Beside a model in float64 all of bfloat16 counts, and ours may be off by as much as TRL's."""
    true = train(algorithm, torch.float64, False, 0.0)
    theirs, mine = (
        distance(train(algorithm, torch.bfloat16, patched, 0.0).gradients, true.gradients) for patched in (False, True)
    )
    report(
        f"{algorithm}, bfloat16, gradients of all weights from a float64 model's: TRL's {theirs:.2e}, ours {mine:.2e}"
    )
    assert mine <= 1.1 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_it_takes_is_printed(train, report, algorithm, dtype):
    """Loss and gradient of a step, model included: the median step's time, and the most memory of any step but the
    first."""
    figures = []
    for patched in (False, True):
        steps = train(algorithm, dtype, patched)
        assert len(steps.seconds) == len(steps.peak_bytes) == STEPS
        figures.append((sorted(steps.seconds)[STEPS // 2], max(steps.peak_bytes[1:]) / 2**20))
    (theirs_s, theirs_mib), (ours_s, ours_mib) = figures
    report(
        f"{algorithm}, {str(dtype).removeprefix('torch.')}, a step: TRL {trl.__version__} {theirs_s * 1e3:.0f} ms, "
        f"peak {theirs_mib:.0f} MiB; patched {ours_s * 1e3:.0f} ms, peak {ours_mib:.0f} MiB"
    )
    assert all(value > 0 for value in (theirs_s, theirs_mib, ours_s, ours_mib))
