"""The edges of `compat`: unusual input, options, labels and process groups; and what it imports."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from compiled_logprobs import InputError
from compiled_logprobs.compat import (
    FRAMEWORKS,
    areal,
    conventions,
    easyr1,
    nemo_rl,
    openrlhf,
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
from tests.helpers import compat_originals as originals

X = torch.linspace(-2, 2, 30).view(2, 3, 5)
LABELS = torch.tensor([[0, 1, 2], [3, 4, 0]])


@pytest.mark.parametrize(
    "function",
    [
        easyr1.log_probs_from_logits,
        verl.logprobs_from_logits,
        skyrl.logprobs_from_logits,
        rlinf.compute_logprobs_from_logits,
    ],
)
def test_labels_of_any_shape_with_as_many_elements_are_taken(function):
    flat = function(X, LABELS.view(-1))
    assert torch.equal(flat, function(X, LABELS)) and flat.shape == (2, 3)


@pytest.mark.parametrize("function", [verl.logprobs_from_logits, skyrl.logprobs_from_logits])
def test_the_gradient_is_written_over_the_logits_where_the_option_asks_for_it(function):
    leaf = X.clone().requires_grad_()
    expected = torch.autograd.grad(verl.logprobs_from_logits_v2(leaf, LABELS).sum(), leaf)[0]
    for options, left in (({}, expected), ({"inplace_backward": False}, X)):
        logits = leaf * 1
        (gradient,) = torch.autograd.grad(function(logits, LABELS, **options).sum(), logits)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(logits.detach(), left)
    function(leaf, LABELS).sum().backward()  # a leaf's value is kept
    assert torch.equal(leaf, X)


def test_something_else_that_needs_the_logits_is_told():
    logits = X.clone().requires_grad_() * 1
    both = logits.square().sum() + verl.logprobs_from_logits(logits, LABELS).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()


def test_rlinf_takes_the_vocabulary_in_any_dimension():
    ours = rlinf.compute_entropy_from_logits(X, dim=1)
    torch.testing.assert_close(ours, originals.rlinf_compute_entropy_from_logits(X, dim=1))


KEEP = torch.ones(3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("tokens", "keep", "message"),
    [
        (torch.tensor([1, -100, 2]), None, r"labels\[1\] = -100"),
        (torch.tensor([1, -100, 2]), KEEP, r"labels\[1\] = -100"),
        (torch.tensor([1, 5, 2]), KEEP, r"labels\[1\] = 5"),
        (torch.tensor([1, 2]), KEEP, r"labels of shape \[2\]"),
        (torch.tensor([1.0, 2.0, 3.0]), KEEP, "labels of dtype float32"),
        (torch.tensor([1, 2, 3]), KEEP[:, :4], r"log_prob_keep_mask of shape \[3, 4\]"),
        (torch.tensor([1, 2, 3]), KEEP.float(), "torch.float32 for logits .* torch.bool are valid"),
    ],
)
def test_slime_says_what_does_not_fit(tokens, keep, message):
    with pytest.raises(InputError, match=message):
        slime.calculate_log_probs_and_entropy(X[0], tokens, None, True, log_prob_keep_mask=keep)


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
        ("cuda", (2, 3), LABELS.unsqueeze(-1).expand(2, 3, 4), None, torch.bfloat16),
        ("cuda", (2, 3), LABELS, torch.ones(2, 3), torch.bfloat16),
        ("cuda", (2, 3), LABELS.to(torch.int16), None, torch.bfloat16),
        ("cuda", (1, 2, 3), LABELS.unsqueeze(0), None, torch.bfloat16),
    ],
    ids=["cpu", "kernel", "kernel, mask", "K labels", "mask of floats", "int16", "4 dimensions"],
)
def test_trl_returns_float32_where_trl_has_a_kernel(monkeypatch, device, rows, index, mask, dtype):
    asked = []

    def ask(*_, out_dtype, **__):
        asked.append(out_dtype)
        return SimpleNamespace(log_probs=None, entropy=None)

    monkeypatch.setattr(conventions, "log_probs_from_logits", ask)
    monkeypatch.setattr(conventions, "entropy_from_logits", ask)
    monkeypatch.setattr(trl, "_masked", lambda index, row_mask: index)  # which would mix devices here
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(*rows, 5, dtype=torch.bfloat16, device=device)
        trl.selective_log_softmax(logits, index, row_mask=mask)
        trl.selective_log_softmax_and_entropy(logits, index, row_mask=mask)
        trl.entropy_from_logits(logits)
    assert asked == [dtype, dtype, torch.float32 if device == "cuda" and len(rows) == 2 else torch.bfloat16]


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
    with pytest.raises(InputError, match=r"labels\[1, 2\] = -100"):
        function(X, torch.tensor([[0, 1, 2], [3, 4, -100]]))


def test_errors_of_the_originals_stay_value_errors():
    with pytest.raises(ValueError, match="attention_mask of shape"):
        skyrl.chunked_entropy_from_logits(X, attention_mask=torch.ones(3, 2))
    with pytest.raises(ValueError, match="Do not shift"):
        torchtune.get_batch_log_probs(X, LABELS[:, 1:])
    with pytest.raises(ValueError, match="'torch', 'flash_attn', 'liger_kernel' are valid"):
        rlinf.compute_logprobs_from_logits(X, LABELS, "triton")


@pytest.mark.parametrize(
    "entropy",
    [
        verl.entropy_from_logits,
        verl.entropy_from_logits_with_chunking,
        skyrl.chunked_entropy_from_logits,
        trl.entropy_from_logits,
        openrlhf.compute_entropy,
        prime_rl.compute_entropy,
        roll.entropy_from_logits,
        rlinf.compute_entropy_from_logits,
    ],
    ids=lambda one: f"{one.__module__.split('.')[-1]}.{one.__name__}",
)
def test_a_token_of_probability_0_counts_0_in_an_entropy(entropy):
    logits = X.clone()
    logits[..., :2] = -math.inf
    torch.testing.assert_close(entropy(logits), originals.rlinf_compute_entropy_from_logits(X[..., 2:]))


GROUPED = {
    "areal": lambda group: areal.gather_logprobs(X, LABELS, tp_group=group),
    "areal entropy": lambda group: areal.gather_logprobs_entropy(X, LABELS, 1.0, group),
    "slime": lambda group: slime.calculate_log_probs_and_entropy(X[0], LABELS[0], group),
    "nemo_rl next": lambda group: nemo_rl.get_next_token_logprobs_from_logits(LABELS, X, None, 0, group),
    "nemo_rl context": lambda group: nemo_rl.get_next_token_logprobs_from_logits(
        LABELS, X, context_parallel_group=group
    ),
    "nemo_rl parallel": lambda group: nemo_rl.from_parallel_logits_to_logprobs(X, LABELS, 0, 5, group),
    "nemo_rl cp": lambda group: nemo_rl.from_parallel_logits_to_logprobs(X, LABELS, 0, 5, None, cp_group=group),
    "nemo_rl class": lambda group: nemo_rl.DistributedLogprob.apply(X, LABELS, 0, 5, group),
    "nemo_rl chunked": lambda group: nemo_rl.ChunkedDistributedLogprob.apply(X, LABELS, 0, 5, 2, group),
    "nemo_rl entropy": lambda group: nemo_rl.ChunkedDistributedEntropy.apply(X, 2, group),
}


@pytest.mark.parametrize("call", GROUPED.values(), ids=GROUPED)
def test_more_than_one_rank_is_refused_and_one_is_served(call):
    call(None)
    call(SimpleNamespace(size=lambda: 1))
    with pytest.raises(InputError, match=r"of 2 ranks; None or a group of one rank is valid.*unpatch"):
        call(SimpleNamespace(size=lambda: 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda: nemo_rl.from_parallel_logits_to_logprobs(X, LABELS, 5, 10, None),
        lambda: nemo_rl.DistributedLogprob.apply(X, LABELS, 5, 10, None),
        lambda: nemo_rl.ChunkedDistributedLogprob.apply(X, LABELS, 5, 10, 2, None),
    ],
)
def test_a_part_of_the_vocabulary_is_refused(call):
    with pytest.raises(InputError, match="from 5 to 10 for logits with 5 columns; 0 to 5 is valid"):
        call()


def test_roll_asks_megatron_for_its_ranks(monkeypatch):
    ranks = 1
    group = SimpleNamespace(size=lambda: ranks)
    megatron = SimpleNamespace(
        model_parallel_is_initialized=lambda: True, get_tensor_model_parallel_group=lambda: group
    )
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", megatron)
    assert roll.vocab_parallel_logprobs(X, LABELS).shape == (2, 3)
    ranks = 4
    with pytest.raises(InputError, match="tensor_model_parallel_group of 4 ranks"):
        roll.vocab_parallel_logprobs(X, LABELS)


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(2), Shard(-1), Partial()], ids=str)
def test_torchtitan_takes_the_local_rows_of_a_dtensor(placement):
    logits = SimpleNamespace(
        ndim=3, placements=[placement], device_mesh=SimpleNamespace(shape=(2,)), to_local=lambda: X
    )
    if placement in (Replicate(), Shard(0)):
        assert torch.equal(torchtitan.compute_logprobs(logits, LABELS), torchtitan.compute_logprobs(X, LABELS))
    else:
        with pytest.raises(InputError, match="over 2 ranks; whole rows on each rank are valid"):
            torchtitan.compute_logprobs(logits, LABELS)


@pytest.mark.parametrize(
    ("backend", "ranks", "refused"), [("spmd_types", 2, True), ("spmd_types", 1, False), ("dtensor", 2, False)]
)
def test_torchtitan_refuses_a_plain_part_of_the_vocabulary(monkeypatch, backend, ranks, refused):
    """The part looks like any tensor, and normalising over it would give plausible wrong numbers."""
    distributed = "torchtitan.distributed"
    monkeypatch.setitem(sys.modules, f"{distributed}.utils", SimpleNamespace(get_spmd_backend=lambda: backend))
    sizes = {"tp": ranks}
    monkeypatch.setitem(sys.modules, f"{distributed}.spmd_types", SimpleNamespace(spmd_mesh_size=sizes.__getitem__))
    with pytest.raises(InputError, match="spmd_types") if refused else nullcontext():
        torchtitan.compute_logprobs(X, LABELS)


PROGRAM = """
import json, sys
import compiled_logprobs
before = set(sys.modules)
from compiled_logprobs.compat import {modules}
print(json.dumps(sorted(set(sys.modules) - before)))

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
mesh = init_device_mesh("cpu", (2,))
x, y = torch.randn(3, 7), torch.randint(7, (3,))
rows = DTensor.from_local(x, mesh, [Shard(0)])
assert torch.equal(torchtitan.compute_logprobs(rows, y), torchtitan.compute_logprobs(x, y))
import pytest
with pytest.raises(ValueError, match="2 ranks"):
    torchtitan.compute_logprobs(DTensor.from_local(x, mesh, [Shard(1)]), y)
with pytest.raises(ValueError, match="2 ranks"):
    areal.gather_logprobs(x, y, tp_group=distributed.group.WORLD)
"""


@pytest.mark.slow
def test_importing_brings_no_framework_and_real_groups_are_seen():
    program = PROGRAM.format(modules=", ".join(FRAMEWORKS))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    imported = json.loads(run.stdout)
    assert imported and all(name.startswith("compiled_logprobs.compat") for name in imported)
