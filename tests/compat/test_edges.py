"""The edges of `compat`: unusual input, options, labels and process groups; and what it imports."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from compiled_logprobs import InputError
from compiled_logprobs.compat import (
    FRAMEWORKS,
    areal,
    conventions,
    easyr1,
    liger,
    megatron,
    nemo_rl,
    prime_rl,
    rlinf,
    roll,
    skyrl,
    slime,
    torchtitan,
    torchtune,
    trl,
    verl,
)

X = torch.linspace(-2, 2, 30).view(2, 3, 5)
LABELS = torch.tensor([[0, 1, 2], [3, 4, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verls_sum_of_squares_is_the_same_with_and_without_a_gradient(dtype):
    x = X.to(dtype)
    one_pass, two_passes = (
        verl.calculate_sum_pi_squared_from_logits(x.clone().requires_grad_(n)) for n in (False, True)
    )
    assert two_passes.requires_grad and one_pass.dtype == dtype
    torch.testing.assert_close(one_pass, two_passes.detach())


@pytest.mark.parametrize("function", [verl.logprobs_from_logits, skyrl.logprobs_from_logits])
def test_the_gradient_is_written_over_the_logits_where_the_option_asks_for_it(function):
    leaf = X.clone().requires_grad_()
    expected = torch.autograd.grad(verl.logprobs_from_logits_v2(leaf, LABELS).sum(), leaf)[0]
    for options, left in (({}, expected), ({"inplace_backward": False}, X)):
        logits = leaf * 1
        (gradient,) = torch.autograd.grad(function(logits, LABELS, **options).sum(), logits)
        torch.testing.assert_close((gradient, logits.detach()), (expected, left))
    function(leaf, LABELS).sum().backward()  # a leaf's value is kept
    assert torch.equal(leaf, X)


KEEP = torch.ones(3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("tokens", "keep", "message"),
    [
        ([1, -100, 2], None, r"labels\[1\] = -100"),
        ([1, -100, 2], KEEP, r"labels\[1\] = -100"),
        ([1, 5, 2], KEEP, r"labels\[1\] = 5"),
        ([1, 2], KEEP, r"labels of shape \[2\]"),
        ([1.0, 2.0, 3.0], KEEP, "labels of dtype float32"),
        ([1, 2, 3], KEEP[:, :4], r"log_prob_keep_mask of shape \[3, 4\]"),
        ([1, 2, 3], KEEP.float(), "torch.float32 for logits .* torch.bool are valid"),
    ],
)
def test_slime_says_what_does_not_fit(tokens, keep, message):
    with pytest.raises(InputError, match=message):
        slime.calculate_log_probs_and_entropy(X[0], torch.tensor(tokens), None, True, log_prob_keep_mask=keep)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [None, KEEP], ids=["no mask", "mask"])
def test_slime_gives_nan_to_a_token_outside_where_no_value_can_be_looked_at(keep):
    """As on an accelerator; the other rows are as they are without it."""
    tokens, logits = torch.tensor([1, -100, 2]), X[0].clone().requires_grad_()
    traced = torch.compile(slime.calculate_log_probs_and_entropy, fullgraph=True, backend="aot_eager")
    log_probs, entropy = traced(logits, tokens, None, False, log_prob_keep_mask=keep)
    log_probs.sum().backward()
    good, _ = slime.calculate_log_probs_and_entropy(X[0], tokens.clamp(0, 4), None, log_prob_keep_mask=keep)
    assert entropy is None and log_probs[1].isnan().all() and logits.grad[1].isnan().all()
    torch.testing.assert_close(log_probs[[0, 2]], good[[0, 2]])
    assert logits.grad[[0, 2]].isfinite().all()


def test_trl_does_not_look_at_masked_rows():
    logits, labels = X.clone(), LABELS.clone()
    logits[0, 0], labels[0, 0] = math.nan, -100
    logits.requires_grad_()
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    log_probs, entropy = trl.selective_log_softmax_and_entropy(logits, labels, row_mask=mask)
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs[0, 0] == 0 and entropy[0, 0] == 0 and (logits.grad[0, 0] == 0).all()
    assert log_probs.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("device", "rows", "index", "mask", "dtype"),
    [
        ("cpu", (2, 3), LABELS, None, torch.bfloat16),
        ("cuda", (2, 3), LABELS, None, torch.float32),
        ("cuda", (2, 3), LABELS, torch.ones(2, 3, dtype=torch.bool), torch.float32),
        ("cuda", (2, 3), LABELS, torch.ones(2, 3), torch.bfloat16),
        ("cuda", (2, 3), LABELS.unsqueeze(-1).expand(2, 3, 4), None, torch.bfloat16),
        ("cuda", (2, 3), LABELS.to(torch.int16), None, torch.bfloat16),
        ("cuda", (1, 2, 3), LABELS.unsqueeze(0), None, torch.bfloat16),
    ],
)
def test_trl_returns_float32_where_trl_has_a_kernel(monkeypatch, device, rows, index, mask, dtype):
    asked = []

    def ask(*_, out_dtype, **__):
        asked.append(out_dtype)
        return None, None

    monkeypatch.setattr(conventions, "log_probs_from_logits", ask)
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(*rows, 5, dtype=torch.bfloat16, device=device)
    trl.selective_log_softmax(logits, index, row_mask=mask)
    trl.selective_log_softmax_and_entropy(logits, index, row_mask=mask)
    assert asked == [dtype, dtype]


@pytest.mark.parametrize(
    "function",
    [
        trl.selective_log_softmax,
        verl.logprobs_from_logits_v2,
        areal.gather_logprobs,
        prime_rl.selective_log_softmax,
        torchtune.logits_to_logprobs,
        roll.log_probs_from_logits,
    ],
)
def test_where_the_original_gathers_minus_100_is_an_error(function):
    with pytest.raises(InputError, match=r"labels\[1, 2\] = -100; 0 to 4 .* are valid. Correct it, or put any"):
        function(X, torch.tensor([[0, 1, 2], [3, 4, -100]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: easyr1.log_probs_from_logits(X[:, :-1], LABELS),
            r"labels of shape \[2, 3\] for logits of shape \[2, 2, 5\]",
        ),
        (
            lambda: verl.logprobs_from_logits(X, LABELS[:, 1:]),
            r"labels of shape \[2, 2\] for logits of shape \[2, 3, 5\]",
        ),
        (lambda: rlinf.compute_logprobs_from_logits(X, LABELS[:1]), r"labels of shape \[1, 3\] for logits of shape"),
        (lambda: verl.log_probs_from_logits_response(LABELS, X, 3), "response_length=3 for .*; 1 to 2 are valid"),
        (
            lambda: verl.log_probs_from_logits_response_rmpad(LABELS, torch.ones_like(LABELS), X.flatten(0, 1), 3),
            "response_length=3 for sequences of 3 tokens; 1 to 2 are valid",
        ),
        (
            lambda: verl.log_probs_from_logits_response_rmpad(LABELS, LABELS[:, 1:], X[0], 1),
            "attention_mask of shape .*2, 2",
        ),
        (
            lambda: verl.log_probs_from_logits_response_rmpad(LABELS, LABELS, X[0], 1),
            r"labels of shape \[4\] for logits",
        ),
        (
            lambda: trl.selective_log_softmax(X, LABELS, row_mask=LABELS[:, 1:]),
            r"row_mask of shape \[2, 2\] for an index",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_errors_of_the_originals_stay_value_errors():
    with pytest.raises(ValueError, match=r"attention_mask shape \[3, 2\] does not match logits shape \[2, 3, 5\]"):
        skyrl.chunked_entropy_from_logits(X, attention_mask=torch.ones(3, 2))
    with pytest.raises(ValueError, match="Do not shift"):
        torchtune.get_batch_log_probs(X, LABELS[:, 1:])
    with pytest.raises(ValueError, match="'torch', 'flash_attn', 'liger_kernel' are valid"):
        rlinf.compute_logprobs_from_logits(X, LABELS, "triton")


def test_heads_take_labels_in_int32():
    """Token 0 too, which torch takes for what is ignored, a number that no int32 holds."""
    hidden, weight, labels = torch.randn(1, 4, 8), torch.randn(20, 8), torch.tensor([[3, 0, 19, 7]])
    for function in (
        lambda labels: verl.linear_cross_entropy(hidden, weight, labels)[0],
        lambda labels: verl.FusedLinearForPPO()(hidden, weight, labels)[0],
    ):
        assert torch.equal(function(labels.int()), function(labels))
        with pytest.raises(InputError, match=r"labels\[.*2\] = 20; 0 to 19"):
            function(torch.tensor([[1, 2, 20, 3]]).int())


@pytest.fixture
def world():
    """Two ranks, of which this is one; what they say to each other is made up."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda group: nemo_rl.from_parallel_logits_to_logprobs(X, LABELS, 5, 10, group),
            "from 5 to 10 for logits of 5 columns, on rank 0 of 2; 0 to 5 is valid",
        ),
        (
            lambda group: nemo_rl.DistributedLogprob.apply(X, LABELS, 5, 10, None),
            "from 5 to 10 for logits of 5 columns, with a group of one rank; 0 to 5 is valid",
        ),
        (
            lambda group: nemo_rl.get_next_token_logprobs_from_logits(LABELS, X, None, 1, group),
            "vocab_parallel_rank=1 on rank 0 of",
        ),
        (
            lambda group: nemo_rl.get_next_token_logprobs_from_logits(
                LABELS, X, None, 0, group, sampling_params=SimpleNamespace(top_k=3, top_p=1.0)
            ),
            "top_k=3 and top_p=1.0 for a vocabulary that is split over ranks; None and 1 are valid",
        ),
        (
            lambda group: nemo_rl.from_parallel_logits_to_logprobs_packed_sequences(
                X[:1], LABELS[:1], torch.tensor([0, 3]), 3, 0, 5, None, cp_group=group
            ),
            "got 3 tokens for logits at 6 positions in all",
        ),
        (
            lambda group: nemo_rl.DistributedLogprob.apply(X, LABELS, 0, 5, distributed.GroupMember.NON_GROUP_MEMBER),
            "got the group NON_GROUP_MEMBER",
        ),
        (lambda group: verl.vocab_parallel_entropy(X), "one of 2 ranks, and no tensor-parallel group of Megatron's"),
        (lambda group: megatron.vocab_parallel_cross_entropy(X, LABELS, 0.1, group), "label_smoothing=0.1; 0 is valid"),
        (lambda group: liger.LigerVocabParallelCrossEntropy(reduction="mean"), "reduction='mean'; 'none' is valid"),
        (lambda group: liger.LigerVocabParallelCrossEntropy()(X[0], LABELS[0]), r"shape \[3, 5\]; three dimensions"),
    ],
)
def test_what_ranks_cannot_share_is_named(call, message, world):
    with pytest.raises(InputError, match=message):
        call(world)


def test_a_group_of_one_rank_has_the_whole_vocabulary(world):
    alone = distributed.new_group([0])
    expected, entropy = areal.gather_logprobs_entropy(X, LABELS)
    for got in (
        areal.gather_logprobs(X, LABELS, tp_group=alone),
        slime.calculate_log_probs_and_entropy(X.flatten(0, 1), LABELS.flatten(), alone)[0].view(2, 3),
        nemo_rl.DistributedLogprob.apply(X, LABELS, 0, 5, alone),
        -liger.LigerVocabParallelCrossEntropy()(X, LABELS, alone),
        -megatron.fused_vocab_parallel_cross_entropy(X, LABELS, alone),
    ):
        assert torch.equal(got, expected)
    assert torch.equal(-nemo_rl.ChunkedDistributedEntropy.apply(X, 2, alone), entropy)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_nemo_rl_refuses_more_than_all_tokens(top_p):
    with pytest.raises(InputError, match="top_k=6 for logits with 5 columns; 1 to 5 are valid"):
        nemo_rl.get_next_token_logprobs_from_logits(LABELS, X, sampling_params=SimpleNamespace(top_k=6, top_p=top_p))


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Partial()], ids=str)
def test_torchtitan_takes_the_local_rows_of_a_dtensor(placement, world):
    logits = DTensor.from_local(X, init_device_mesh("cpu", (2,)), [placement], run_check=False)
    if placement in (Replicate(), Shard(0)):
        assert torch.equal(torchtitan.compute_logprobs(logits, LABELS), torchtitan.compute_logprobs(X, LABELS))
    else:
        with pytest.raises(InputError, match="over 2 ranks; whole rows and a shard of the columns are valid"):
            torchtitan.compute_logprobs(logits, LABELS)


def test_importing_brings_no_framework():
    packages = {module.partition(".")[0] for framework in FRAMEWORKS.values() for module, _ in framework.functions}
    assert not packages & {name.partition(".")[0] for name in sys.modules}
