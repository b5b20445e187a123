"""The edges of `compat`: what each original does with unusual input, options, labels and process groups; and its import."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from compiled_logprobs import InputError
from compiled_logprobs.compat import (
    FRAMEWORKS,
    areal,
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


def test_easyr1_takes_labels_of_any_shape_with_as_many_elements():
    flat = easyr1.log_probs_from_logits(X, LABELS.view(-1))
    assert torch.equal(flat, easyr1.log_probs_from_logits(X, LABELS)) and flat.shape == (2, 3)
    assert (flat < 0).all()


@pytest.mark.parametrize("function", [verl.logprobs_from_logits, skyrl.logprobs_from_logits])
def test_the_gradient_is_written_over_the_logits_where_the_option_asks_for_it(function):
    leaf = X.clone().requires_grad_()
    expected = torch.autograd.grad(verl.logprobs_from_logits_v2(leaf, LABELS).sum(), leaf)[0]

    logits = leaf * 1
    (gradient,) = torch.autograd.grad(function(logits, LABELS).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(logits.detach(), expected)  # overwritten

    logits = leaf * 1
    (gradient,) = torch.autograd.grad(function(logits, LABELS, inplace_backward=False).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(logits, X)

    function(leaf, LABELS).sum().backward()  # a leaf's value is kept
    assert torch.equal(leaf, X)


def test_something_else_that_needs_the_logits_is_told():
    logits = X.clone().requires_grad_() * 1
    both = logits.square().sum() + verl.logprobs_from_logits(logits, LABELS).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()


def test_openrlhf_leaves_the_logits_undivided():
    logits = X.clone()
    divided = openrlhf.log_probs_from_logits(X / 0.5, LABELS)
    torch.testing.assert_close(openrlhf.log_probs_from_logits(logits, LABELS, 0.5), divided)
    assert torch.equal(logits, X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_openrlhf_counts_minus_100_as_0_in_every_dtype(dtype):
    """Beside the formula, row by row, in Python's own numbers."""
    temperature, labels = 0.5, torch.tensor([[0, -100, 2], [-100, 4, 0]])
    logits = X.to(dtype, copy=True).requires_grad_()
    log_probs = openrlhf.log_probs_from_logits(logits, labels, temperature)
    log_probs.sum().backward()
    assert log_probs.dtype == dtype
    for row, label, log_prob, gradient in zip(
        X.to(dtype).view(-1, 5).tolist(),
        labels.flatten().tolist(),
        log_probs.flatten(),
        logits.grad.view(-1, 5),
        strict=True,
    ):
        if label == -100:
            assert log_prob == 0 and (gradient == 0).all()
            continue
        exps = [math.exp(x / temperature) for x in row]
        assert log_prob.item() == pytest.approx(math.log(exps[label] / sum(exps)), rel=torch.finfo(dtype).eps)
        expected = [((i == label) - one / sum(exps)) / temperature for i, one in enumerate(exps)]
        assert gradient.tolist() == pytest.approx(expected, rel=torch.finfo(dtype).eps, abs=1e-6)


def test_slime_has_a_column_of_log_probs_beside_a_row_of_entropies():
    log_probs, entropy = slime.calculate_log_probs_and_entropy(X[0], LABELS[0], None, True)
    assert log_probs.shape == (3, 1) and entropy.shape == (3,)
    log_probs, entropy = slime.calculate_log_probs_and_entropy(X[0], LABELS[0], None)
    assert log_probs.shape == (3, 1) and entropy is None
    log_probs, entropy = slime.calculate_log_probs_and_entropy(X[0, :0].half(), LABELS[0, :0], None, True)
    assert log_probs.shape == entropy.shape == (0,) and log_probs.dtype == torch.float16


def test_slime_keeps_the_label_and_the_whole_entropy_under_a_mask():
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    log_probs, entropy = slime.calculate_log_probs_and_entropy(X[0], LABELS[0], None, True, log_prob_keep_mask=nothing)
    assert torch.equal(log_probs, torch.zeros(3, 1))  # the label alone is left
    torch.testing.assert_close(entropy, slime.calculate_log_probs_and_entropy(X[0], LABELS[0], None, True)[1])


@pytest.mark.parametrize("keep", [None, torch.ones(3, 5, dtype=torch.bool)], ids=["no mask", "mask"])
@pytest.mark.parametrize("bad", [-100, -1, 5, 2**40])
def test_slime_refuses_a_token_outside_the_vocabulary(keep, bad):
    tokens = torch.tensor([1, bad, 2])
    with pytest.raises(InputError, match=rf"labels\[1\] = {bad}"):
        slime.calculate_log_probs_and_entropy(X[0], tokens, None, True, log_prob_keep_mask=keep)
    # Where no value can be looked at, as on an accelerator, it is NaN, and the other rows are as they are without it.
    logits = X[0].clone().requires_grad_()
    traced = torch.compile(slime.calculate_log_probs_and_entropy, fullgraph=True, backend="aot_eager")
    log_probs, entropy = traced(logits, tokens, None, False, log_prob_keep_mask=keep)
    log_probs.sum().backward()
    good, _ = slime.calculate_log_probs_and_entropy(X[0], tokens.clamp(0, 4), None, log_prob_keep_mask=keep)
    assert entropy is None and log_probs[1].isnan().all() and logits.grad[1].isnan().all()
    torch.testing.assert_close(log_probs[[0, 2]], good[[0, 2]])
    assert logits.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "keep", "message"),
    [
        (torch.tensor([1, 2]), torch.ones(3, 5, dtype=torch.bool), r"labels of shape \[2\]"),
        (torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 5, dtype=torch.bool), "labels of dtype float32"),
        (torch.tensor([1, 2, 3]), torch.ones(3, 4, dtype=torch.bool), r"log_prob_keep_mask of shape \[3, 4\]"),
        (torch.tensor([1, 2, 3]), torch.ones(3, 5), "torch.float32 for logits .* torch.bool are valid"),
    ],
    ids=["too few tokens", "tokens of floats", "mask of another shape", "mask of floats"],
)
def test_slime_says_what_does_not_fit_beside_a_mask(tokens, keep, message):
    with pytest.raises(InputError, match=message):
        slime.calculate_log_probs_and_entropy(X[0], tokens, None, log_prob_keep_mask=keep)


def test_trl_has_a_label_a_row_or_k_of_them():
    one = trl.selective_log_softmax(X, LABELS)
    column = trl.selective_log_softmax(X, LABELS.unsqueeze(-1))
    several = trl.selective_log_softmax(X, LABELS.unsqueeze(-1).expand(2, 3, 4))
    assert one.shape == (2, 3) and column.shape == (2, 3, 1) and several.shape == (2, 3, 4)
    assert torch.equal(column.squeeze(-1), one) and torch.equal(several[..., 3], one)


def test_trl_does_not_look_at_masked_rows():
    logits = X.clone()
    logits[0, 0] = math.nan
    labels = LABELS.clone()
    labels[0, 0] = -100
    logits.requires_grad_()
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    log_probs, entropy = trl.selective_log_softmax_and_entropy(logits, labels, row_mask=mask)
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs[0, 0] == 0 and entropy[0, 0] == 0 and (logits.grad[0, 0] == 0).all()
    assert log_probs.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_trl_returns_float32_where_trl_has_a_kernel(monkeypatch, device, dtype):
    asked = []
    monkeypatch.setattr(trl, "_log_probs", lambda logits, labels, *, out_dtype, **_: asked.append(out_dtype))
    monkeypatch.setattr(trl, "_both", lambda logits, labels, *, out_dtype, **_: asked.append(out_dtype) or (0, 0))
    monkeypatch.setattr(trl, "_entropy", lambda logits, *, out_dtype: asked.append(out_dtype))
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(2, 3, 5, dtype=torch.bfloat16, device=device)
        trl.selective_log_softmax(logits, LABELS)
        trl.selective_log_softmax_and_entropy(logits, LABELS)
        trl.entropy_from_logits(logits)
    assert asked == [dtype] * 3


@pytest.mark.parametrize(
    ("rows", "labels", "mask"),
    [
        ((2, 3), LABELS.unsqueeze(-1).expand(2, 3, 4), None),
        ((2, 3), LABELS, torch.ones(2, 3)),
        ((2, 3), LABELS.to(torch.int16), None),
        ((1, 2, 3), LABELS.unsqueeze(0), None),
    ],
    ids=["K labels", "mask of floats", "int16", "4 dimensions"],
)
def test_trl_returns_the_dtype_of_the_logits_where_its_kernel_does_not_run(monkeypatch, rows, labels, mask):
    asked = []
    monkeypatch.setattr(trl, "_log_probs", lambda logits, labels, *, out_dtype, **_: asked.append(out_dtype))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(*rows, 5, dtype=torch.bfloat16, device="cuda")
        monkeypatch.setattr(trl, "_where_it_counts", lambda index, row_mask: index)  # which would mix devices here
        trl.selective_log_softmax(logits, labels, row_mask=mask)
    assert asked == [torch.bfloat16]


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_trl_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        trl.selective_log_softmax(X, LABELS, temperature)


def test_nemo_rl_returns_a_column_less():
    ours = nemo_rl.get_next_token_logprobs_from_logits(LABELS, X)
    assert ours.shape == (2, 2)
    shifted = torch.log_softmax(X, -1)[:, :-1].gather(-1, LABELS[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(ours, shifted)
    torch.testing.assert_close(nemo_rl.from_parallel_logits_to_logprobs(X, LABELS, 0, 5, None), shifted)


def test_nemo_rl_names_minus_the_entropy_entropy():
    sums = nemo_rl.ChunkedDistributedEntropy.apply(X, 2, None)
    assert (sums < 0).all()
    torch.testing.assert_close(-sums, verl.entropy_from_logits(X))


def test_nemo_rl_gives_minus_infinity_to_what_was_filtered_out():
    top_1 = SimpleNamespace(top_k=1, top_p=1.0, temperature=0.5)
    best = torch.full((2, 3), 4)  # each row ascends
    assert (nemo_rl.get_next_token_logprobs_from_logits(best - 1, X, sampling_params=top_1) == -math.inf).all()
    assert (nemo_rl.get_next_token_logprobs_from_logits(best, X, sampling_params=top_1) == 0).all()


def test_torchtitan_gives_ignored_rows_an_entropy():
    labels = torch.tensor([1, -100, 2])
    log_probs, entropy = torchtitan.compute_logprobs(X[0].clone().requires_grad_(), labels, return_entropy=True)
    assert log_probs[1] == 0 and (entropy > 0).all() and not entropy.requires_grad and log_probs.requires_grad


@pytest.mark.parametrize("return_entropy", [False, True])
def test_torchtitan_takes_a_batch_as_its_rows(return_entropy):
    """The original has logits [T, V] alone; [B, S, V] are B times S of them."""
    labels = torch.tensor([[0, -100, 2], [3, 4, -100]])
    batch, rows = X.clone().requires_grad_(), X.view(6, 5).clone().requires_grad_()
    ours = torchtitan.compute_logprobs(batch, labels, return_entropy=return_entropy)
    theirs = originals.torchtitan_compute_logprobs(rows, labels.view(6), return_entropy=return_entropy)
    for one, other in zip(*((it if return_entropy else (it,)) for it in (ours, theirs)), strict=True):
        assert one.shape == (2, 3)
        torch.testing.assert_close(one, other.view(2, 3))
    for one in (ours, theirs):
        (one[0] if return_entropy else one).sum().backward()
    torch.testing.assert_close(batch.grad.view(6, 5), rows.grad)


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


ENTROPIES = [
    verl.entropy_from_logits,
    verl.entropy_from_logits_with_chunking,
    skyrl.chunked_entropy_from_logits,
    trl.entropy_from_logits,
    openrlhf.compute_entropy,
    prime_rl.compute_entropy,
    roll.entropy_from_logits,
    rlinf.compute_entropy_from_logits,
]


@pytest.mark.parametrize("entropy", ENTROPIES, ids=lambda one: f"{one.__module__.split('.')[-1]}.{one.__name__}")
def test_a_token_of_probability_0_counts_0_in_an_entropy(entropy):
    logits = X.clone()
    logits[..., :2] = -math.inf
    torch.testing.assert_close(entropy(logits), originals.rlinf_compute_entropy_from_logits(X[..., 2:]))


RANKS = """
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
two, one = distributed.group.WORLD, distributed.new_group([0])
x, y = torch.randn(3, 4, 7), torch.randint(7, (3, 4))

from compiled_logprobs.compat import areal, nemo_rl, slime, torchtitan
calls = {
    "areal": lambda group: areal.gather_logprobs(x, y, tp_group=group),
    "areal entropy": lambda group: areal.gather_logprobs_entropy(x, y, 1.0, group),
    "slime": lambda group: slime.calculate_log_probs_and_entropy(x[0], y[0], group),
    "nemo_rl next": lambda group: nemo_rl.get_next_token_logprobs_from_logits(y, x, None, 0, group),
    "nemo_rl context": lambda group: nemo_rl.get_next_token_logprobs_from_logits(y, x, context_parallel_group=group),
    "nemo_rl parallel": lambda group: nemo_rl.from_parallel_logits_to_logprobs(x, y, 0, 7, group),
    "nemo_rl cp": lambda group: nemo_rl.from_parallel_logits_to_logprobs(x, y, 0, 7, None, cp_group=group),
    "nemo_rl class": lambda group: nemo_rl.DistributedLogprob.apply(x, y, 0, 7, group),
    "nemo_rl chunked": lambda group: nemo_rl.ChunkedDistributedLogprob.apply(x, y, 0, 7, 2, group),
    "nemo_rl entropy": lambda group: nemo_rl.ChunkedDistributedEntropy.apply(x, 2, group),
}
for name, call in calls.items():
    call(None), call(one)
    try:
        call(two)
    except ValueError as error:
        assert "of 2 ranks; None or a group of one rank is valid" in str(error), error
        assert "unpatch" in str(error)
    else:
        raise AssertionError(f"{name} took two ranks")
try:
    nemo_rl.from_parallel_logits_to_logprobs(x, y, 7, 14, None)
except ValueError as error:
    assert "from 7 to 14 for logits with 7 columns; 0 to 7 is valid" in str(error), error
else:
    raise AssertionError("a part of the vocabulary was taken")

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
mesh = init_device_mesh("cpu", (2,))
whole = torchtitan.compute_logprobs(x[0], y[0])
for placement in (Replicate(), Shard(0)):
    assert torch.equal(torchtitan.compute_logprobs(DTensor.from_local(x[0], mesh, [placement]), y[0]), whole)
for placement in (Shard(1), Shard(-1), Partial()):
    try:
        torchtitan.compute_logprobs(DTensor.from_local(x[0], mesh, [placement]), y[0])
    except ValueError as error:
        assert "over 2 ranks; whole rows on each rank are valid" in str(error), error
    else:
        raise AssertionError(f"{placement} was taken")
print("refused")
"""


def test_more_than_one_rank_is_refused_and_one_is_served():
    run = subprocess.run([sys.executable, "-c", RANKS], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "refused\n", run.stderr


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


PROGRAM = """
import json, sys, time
import compiled_logprobs
before, start = set(sys.modules), time.perf_counter()
from compiled_logprobs.compat import {modules}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def test_importing_brings_no_framework_and_takes_milliseconds():
    program = PROGRAM.format(modules=", ".join(FRAMEWORKS))
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    print(runs)
    assert {name for _, names in runs for name in names if not name.startswith("compiled_logprobs.compat")} == set()
    # The best of three, of all modules together. Measured: 0.02 s, and 0.08 s where no bytecode is cached.
    assert min(seconds for seconds, _ in runs) < 0.01 * len(FRAMEWORKS)


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
