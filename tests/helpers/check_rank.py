"""One of two ranks that check a function of their columns together: a right one, and functions that are wrong.

RANK, WORLD_SIZE and METHOD (where to meet) say which rank this is.
"""

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import compiled_logprobs as clp
from compiled_logprobs.testing import assert_log_probs
from tests.helpers.ranks import report

RANK = int(os.environ["RANK"])
PROBLEM = clp.Problem("cpu", 8, 514, torch.float32, entropy=True, needs_grad=True)
WIDTH = PROBLEM.vocab // 2


class SumOverRanks(torch.autograd.Function):
    """Whose gradient is that of each part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def log_probs(
    logits: Tensor,
    labels: Tensor,
    first: int = RANK * WIDTH,
    over: distributed.ReduceOp.RedOpType = distributed.ReduceOp.MAX,
    all_have_gradients: bool = True,
) -> Tensor:
    """Right as it is, but for NaN."""
    ignored, column = labels == -100, labels - first
    is_here = (column >= 0) & (column < WIDTH) & ~ignored
    x = logits.float() if all_have_gradients else torch.where(is_here[:, None], logits, logits.detach())
    top = x.detach().amax(-1)
    added = top.clone()
    distributed.all_reduce(top, distributed.ReduceOp.MAX)
    distributed.all_reduce(added, over)
    total = SumOverRanks.apply((x - top[:, None]).exp().sum(-1)).log() + added
    picked = x.gather(-1, column.clamp(0, WIDTH - 1)[:, None]).squeeze(-1) - top
    return (SumOverRanks.apply(picked.masked_fill(~is_here, 0.0)) + top - total).masked_fill(ignored, 0.0)


def local_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    column = labels - RANK * WIDTH
    is_here = (column >= 0) & (column < WIDTH)
    return SumOverRanks.apply(clp.log_probs_from_logits(logits, column.masked_fill(~is_here, -100)))


def entropies_added_up(logits: Tensor, labels: Tensor, return_entropy: bool) -> Any:
    entropy = SumOverRanks.apply(clp.entropy_from_logits(logits)).masked_fill(labels == -100, 0.0)
    return (log_probs(logits, labels), entropy) if return_entropy else log_probs(logits, labels)


def one_rank_raises(logits: Tensor, labels: Tensor) -> Tensor:
    assert RANK == 0, "no"
    return logits.sum(-1)


def own_numbers(logits: Tensor, labels: Tensor) -> Tensor:
    return log_probs(logits, labels) - RANK * 1e-6


def of_another_shard(logits: Tensor, labels: Tensor) -> Tensor:
    return log_probs(logits, labels, first=(RANK + 1) * WIDTH)


def maxima_added_up(logits: Tensor, labels: Tensor) -> Tensor:
    return log_probs(logits, labels, over=distributed.ReduceOp.SUM)


def no_gradient_elsewhere(logits: Tensor, labels: Tensor) -> Tensor:
    return log_probs(logits, labels, all_have_gradients=False)


WRONG: dict[Callable[..., Any], tuple[str, str]] = {
    local_softmax: ("log_prob_error", "likely cause: normalises over one of 2 shards of the columns"),
    of_another_shard: (
        "log_prob_error",
        "likely cause: takes the column that lies minus one shard of 2 from the label",
    ),
    maxima_added_up: ("log_prob_error", "likely cause: adds up the maxima of 2 shards of the columns"),
    no_gradient_elsewhere: (
        "gradient_error",
        "likely cause: the values are right, and the gradient is 0 in a part of the columns",
    ),
    entropies_added_up: ("entropy_error", "likely cause: adds up the entropies of 2 shards of the columns"),
    own_numbers: ("same_on_ranks", "likely cause: gives other numbers on other ranks"),
    one_rank_raises: ("runs", "rank 1 raises AssertionError: no" if RANK == 0 else "AssertionError: no"),
}


def a_right_function_passes() -> None:
    both = partial(clp.log_probs_from_logits, group=distributed.group.WORLD)
    assert_log_probs(both, PROBLEM._replace(sum_p_squared=True, temperature="number"), group=distributed.group.WORLD)
    losses = partial(clp.cross_entropy_from_logits, group=distributed.group.WORLD, reduction="none")
    bf16 = PROBLEM._replace(dtype=torch.bfloat16)
    assert_log_probs(losses, bf16, returns="loss", short=True, group=distributed.group.WORLD)


def each_wrong_function_is_stopped_with_its_cause() -> None:
    for function, (reason, cause) in WRONG.items():
        with pytest.raises(AssertionError) as failure:
            assert_log_probs(function, PROBLEM, group=distributed.group.WORLD)
        assert reason in str(failure.value).splitlines()[0] and cause in str(failure.value), str(failure.value)


def what_does_not_fit_is_an_error() -> None:
    for subject, options, words in (
        ("eager", {}, "got backend 'eager' with a group"),
        (local_softmax, {"vocab": 515}, "a vocabulary of 515 for 2 ranks; a multiple is valid"),
    ):
        with pytest.raises(clp.InputError, match=words):
            clp.check_backend(subject, group=distributed.group.WORLD, **options)


if __name__ == "__main__":
    signal.alarm(200)  # rather than to hang: the test says what is missing
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=RANK, world_size=2, init_method=os.environ["METHOD"])
    report(
        a_right_function_passes,
        each_wrong_function_is_stopped_with_its_cause,
        what_does_not_fit_is_an_error,
    )
    os._exit(0)
