"""TRL's GRPO and DPO, with its own log-probability functions and, patched, with those of this library.

Run with the last version whose trainers compute them from logits, with one of the older arguments, and with the newest,
whose trainers compute them from hidden states (`make test-integrations`).
"""

import contextlib
import functools
import inspect
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import trl
from torch import Tensor
from trl.trainer import dpo_trainer, grpo_trainer, utils

from compiled_logprobs import compat
from tests.integrations.tiny_trainers import STEPS, Steps, train_dpo, train_grpo

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FROM_HIDDEN = "outputs" in inspect.signature(utils._ChunkedLogProbFunction.forward).parameters
from_logits = pytest.mark.skipif(FROM_HIDDEN, reason="these trainers compute from hidden states")
EPS = torch.finfo(torch.float32).eps
TRAIN = {"grpo": train_grpo, "dpo": train_dpo}
CALLS_A_STEP = {"grpo": 1, "dpo": 2}
"""How often the loss of a step needs log-probabilities at least: DPO's those of the reference model as well."""


class Formula:
    """TRL's function from hidden states, in plain torch."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        assert bias is None and softcap is None
        x = hidden @ weight.T * logit_scale / temperature
        log_p = x.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], entropy, None, x.mean(-1), x.argmax(-1) == targets


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """Trains once for each set of arguments."""

    @functools.cache
    def run(algorithm: str, dtype: torch.dtype, patched: bool) -> Steps:
        # Other dtypes are given the completions that were sampled in float32.
        replayed = None if dtype == torch.float32 else run(algorithm, torch.float32, False)
        how = compat.patch("trl") if patched else contextlib.nullcontext()
        if FROM_HIDDEN and dtype == torch.float64:  # in which TRL computes in float32
            how = mock.patch.object(utils, "_ChunkedLogProbFunction", Formula)
        with how:
            return TRAIN[algorithm](dtype, tmp_path_factory.mktemp(algorithm), replayed)

    return run


def distance(got: list[Tensor], true: list[Tensor]) -> float:
    """Relative to the size of what is true."""
    got_all, true_all = (torch.cat([part.double().flatten() for part in parts]) for parts in (got, true))
    return ((got_all - true_all).norm() / true_all.norm()).item()


@pytest.mark.skipif(not FROM_HIDDEN, reason="these trainers compute from logits")
def test_patching_reaches_what_the_fused_head_calls():
    before = utils._ChunkedLogProbFunction
    with compat.patch("trl") as patched:
        assert utils._ChunkedLogProbFunction is not before
    assert "trl.trainer.utils._ChunkedLogProbFunction" in patched.places
    assert utils._ChunkedLogProbFunction is before


@from_logits
def test_patching_reaches_both_trainers():
    before = grpo_trainer.selective_log_softmax
    with compat.patch("trl") as patched:
        assert grpo_trainer.selective_log_softmax is dpo_trainer.selective_log_softmax is not before
    for module in ("trl.trainer.utils", "trl.trainer.grpo_trainer", "trl.trainer.dpo_trainer"):
        assert f"{module}.selective_log_softmax" in patched.places
    assert patched.version == trl.__version__
    assert grpo_trainer.selective_log_softmax is dpo_trainer.selective_log_softmax is before


@from_logits
def test_the_page_about_frameworks_runs():
    """The block that tests/test_docs.py cannot execute."""
    page = (Path(__file__).parents[2] / "docs/frameworks.md").read_text()
    (block,) = re.findall(r"<!-- not executed: it needs TRL.*?-->\n```python\n(.*?)```", page, re.S)
    before, names = grpo_trainer.selective_log_softmax, {}
    exec(block, names)
    assert "trl.trainer.utils.selective_log_softmax" in names["report"].places
    assert grpo_trainer.selective_log_softmax is before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", TRAIN)
def test_ours_is_called_in_each_step(train, algorithm, dtype):
    patched, plain = train(algorithm, dtype, True), train(algorithm, dtype, False)
    assert len(patched.calls) == STEPS and min(patched.calls) >= CALLS_A_STEP[algorithm]
    assert plain.calls == [0] * STEPS


@pytest.mark.parametrize("algorithm", TRAIN)
def test_float32_agrees_to_rounding(train, algorithm):
    """The same completions are sampled; losses and gradients are as close to TRL's as those are to float64."""
    theirs, mine = train(algorithm, torch.float32, False), train(algorithm, torch.float32, True)
    true = train(algorithm, torch.float64, False)
    assert mine.completions == theirs.completions
    assert len(mine.losses) == len(theirs.losses) == STEPS
    # A log-probability is some 10 nats here. A loss is a mean of them, or of differences of their sums over 16 tokens.
    assert max(abs(a - b) for a, b in zip(mine.losses, theirs.losses, strict=True)) < 16 * 10 * EPS
    apart = distance(mine.gradients, theirs.gradients)
    from_true = [distance(steps.gradients, true.gradients) for steps in (theirs, mine)]
    assert apart < 2 * from_true[0] and from_true[1] < 1.5 * from_true[0]
