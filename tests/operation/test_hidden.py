"""Log-probabilities from hidden states: values and gradients against float64, for every backend and option."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import compiled_logprobs as lp
from compiled_logprobs import InputError, LogProbsError, cross_entropy_from_hidden, log_probs_from_hidden
from compiled_logprobs.backends import why_not
from compiled_logprobs.machine.clock import why_no_peak
from compiled_logprobs.problem import Problem

NAMES = lp.backends(from_hidden=True)
ROWS, HIDDEN, VOCAB = 150, 48, 700
MIB = 2**20


def arguments(dtype=torch.float32, *, rows=ROWS, bias=True, ignored=0.25, seed=0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    labels = torch.randint(VOCAB, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    given = {"hidden": normal(rows, HIDDEN), "weight": normal(VOCAB, HIDDEN, scale=0.4), "labels": labels}
    return given | ({"bias": normal(VOCAB)} if bias else {})


def truth(
    hidden, weight, labels, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, ignore_index=-100
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropy and logsumexp, in the dtype of the arguments."""
    z = logit_scale * functional.linear(hidden, weight, bias)
    x = (z if softcap is None else softcap * torch.tanh(z / softcap)) / torch.as_tensor(temperature).unsqueeze(-1)
    log_p = torch.log_softmax(x, -1)
    ignored = labels == ignore_index
    results = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1), x.logsumexp(-1)
    return tuple(result.masked_fill(ignored, 0.0) for result in results)


def gradients(results, inputs, upstream):
    return torch.autograd.grad(list(results), inputs, [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)])


@pytest.mark.parametrize("name", NAMES)
@given(
    rows=st.sampled_from([1, 2, 65, 130, 300]),
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([1.0, 0.7, "per_token"]),
            "logit_scale": st.sampled_from([1.0, 0.25, 3.0]),
            "softcap": st.sampled_from([None, 4.0, 30.0]),
            "memory_limit": st.sampled_from([None, 17 * MIB]),
        }
    ),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_values_and_gradients_are_those_of_float64(name, rows, options, bias, ignored, seed):
    given = arguments(rows=rows, bias=bias, ignored=ignored, seed=seed)
    if options["temperature"] == "per_token":
        options = {**options, "temperature": torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 0.5}
    limit = options.pop("memory_limit")
    try:
        results = log_probs_from_hidden(
            **given, **options, memory_limit=limit, return_entropy=True, return_logsumexp=True, backend=name
        )
    except lp.BackendUnavailable:
        return
    wide = {key: x.detach().double() if x.is_floating_point() else x for key, x in given.items()}
    wide = {key: x.requires_grad_() if x.is_floating_point() else x for key, x in wide.items()}
    true = truth(**wide, **options)
    upstream = torch.randn(3, rows, generator=torch.Generator().manual_seed(seed))
    tensors = [key for key in ("hidden", "weight", "bias") if key in given]
    got = gradients(results, [given[key] for key in tensors], upstream)
    expected = gradients(true, [wide[key] for key in tensors], upstream)
    for mine, right in zip((*results, *got), (*true, *expected), strict=True):
        size = max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=3e-5 * size)
    assert bool((results.log_probs <= 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["whole", "chunked_vocab", "chunked_256", "chunked_64", "eager"])
def test_gradients_in_half_precision_are_as_exact_as_those_of_plain_torch(name, dtype):
    """At most 1.5 times as far from float64 as what plain torch makes of the same arguments."""
    rows = 300
    given = arguments(dtype, rows=rows, seed=3)
    tensors = [given[key] for key in ("hidden", "weight", "bias")]
    wide = {key: x.detach().double().requires_grad_() if x.is_floating_point() else x for key, x in given.items()}
    upstream = torch.randn(1, rows, generator=torch.Generator().manual_seed(4))
    exact = gradients(truth(**wide)[:1], [wide[key] for key in ("hidden", "weight", "bias")], upstream)
    z = functional.linear(given["hidden"], given["weight"], given["bias"]).float()
    log_p = torch.log_softmax(z, -1).gather(-1, given["labels"].clamp(min=0)[:, None])[:, 0]
    plain = gradients([log_p.masked_fill(given["labels"] == -100, 0.0)], tensors, upstream)
    got = gradients([log_probs_from_hidden(**given, backend=name)], tensors, upstream)
    for mine, theirs, right in zip(got, plain, exact, strict=True):
        assert (mine.double() - right).square().mean() <= 1.5**2 * (theirs.double() - right).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 100), (64, 100), (64, 1000), (64, 8000), (300, 1000)])
def test_the_least_that_an_error_names_can_be_had(rows, vocab, dtype):
    hidden, weight = torch.randn(rows, 64).to(dtype), torch.randn(vocab, 64).to(dtype)
    with pytest.raises(InputError) as refused:
        log_probs_from_hidden(hidden, weight, torch.zeros(rows, dtype=torch.int64), memory_limit=1)
    least = int(re.search(r"at least (\d+) bytes", str(refused.value))[1])
    problem = Problem("cpu", rows, vocab, dtype, hidden=64)
    assert [name for name in NAMES if why_not(name, problem._replace(memory_limit=least)) is None]
    assert not [name for name in NAMES if why_not(name, problem._replace(memory_limit=least - 1)) is None]


MEASURE = """
import json, sys, torch
from compiled_logprobs import Problem, log_probs_from_hidden
from compiled_logprobs.backends import get_backend
from compiled_logprobs.machine.clock import MIB, extra_peak_bytes

for name, rows, size, vocab in (("chunked_64", 512, 256, 32000), ("chunked_vocab", 2048, 2048, 2048)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, weight = (torch.randn(n, size).to(dtype).requires_grad_() for n in (rows, vocab))
        labels = torch.randint(vocab, (rows,))
        labels[::100] = -100
        problem = Problem("cpu", rows, vocab, dtype, hidden=size, needs_grad=True, weight_grad=True)
        limit = get_backend(name, problem).least_memory(problem) + 8 * MIB

        def call():
            results = log_probs_from_hidden(hidden, weight, labels, memory_limit=limit, backend=name)
            return results, torch.autograd.grad(results.sum(), (hidden, weight))

        call()
        returned = 4 * rows + dtype.itemsize * size * (rows + vocab)
        taken = extra_peak_bytes(call, "cpu") - returned
        print(json.dumps([name, str(dtype), taken / MIB, limit / MIB]))
"""


@pytest.mark.slow
@pytest.mark.skipif(why_no_peak("cpu") is not None, reason=str(why_no_peak("cpu")))
def test_the_memory_that_a_call_may_take_is_kept():
    """As measured, where all logits, a second gradient of the weight, or many copies of what counts are too much.

    In a process that returns what is freed: in another one it stays, in holes, as earlier calls have left them.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    ran = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    measured = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(measured) == 6
    assert [case for case in measured if not 4 < case[2] <= case[3]] == []


@pytest.mark.parametrize("name", NAMES)
def test_of_logits_that_are_exact_the_results_are_those_from_logits(name):
    """Small integers, whose products every dtype holds."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randint(-1, 2, (200, 64), generator=generator).bfloat16()
    weight = torch.randint(-1, 2, (VOCAB, 64), generator=generator).bfloat16()
    labels = torch.randint(VOCAB, (200, 3), generator=generator)
    options = {"return_entropy": True, "return_argmax": True, "temperature": 0.7}
    try:
        got = log_probs_from_hidden(hidden, weight, labels, **options, backend=name)
    except lp.BackendUnavailable:
        return
    expected = lp.log_probs_from_logits(hidden @ weight.T, labels, **options, backend="eager")
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-6, atol=3e-6)
    assert torch.equal(got.argmax, (hidden @ weight.T).argmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_weight_costs_no_gradient_and_gets_none(name):
    given = arguments()
    given["weight"].requires_grad_(False)
    given["bias"].requires_grad_(False)
    try:
        log_probs_from_hidden(**given, backend=name).sum().backward()
    except lp.BackendUnavailable:
        return
    assert given["weight"].grad is None
    assert given["hidden"].grad[given["labels"] == -100].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_count_is_never_read(name):
    given = arguments()
    ignored = given["labels"] == -100
    with torch.no_grad():
        given["hidden"][ignored] = torch.nan
    try:
        result = log_probs_from_hidden(**given, backend=name)
    except lp.BackendUnavailable:
        return
    result.sum().backward()
    assert bool((result[ignored] == 0).all())
    assert all(bool(given[key].grad.isfinite().all()) for key in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_second_backward_gives_the_same_gradient(softcap):
    given = arguments()
    result = log_probs_from_hidden(**given, softcap=softcap, backend="whole").sum()
    first = torch.autograd.grad(result, given["weight"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(result, given["weight"])[0])


def test_a_double_backward_is_refused():
    given = arguments()
    result = log_probs_from_hidden(**given).sum()
    with pytest.raises(LogProbsError, match="double backward .* got to log_probs_from_hidden"):
        torch.autograd.grad(result, given["hidden"], create_graph=True)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_transforms_and_forward_mode_are_refused(name):
    given = {key: x.detach() for key, x in arguments(bias=False).items()}
    with pytest.raises(InputError, match=f"got {name} inside torch.func.grad, vmap"):
        torch.func.grad(lambda x: log_probs_from_hidden(**{**given, name: x}).sum())(given[name])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(LogProbsError, match="forward-mode .* got to log_probs_from_hidden"):
            log_probs_from_hidden(**{**given, name: dual})


def test_meta_tensors_have_a_result_without_values():
    given = {key: x.detach().to("meta") for key, x in arguments(bias=False).items()}
    assert log_probs_from_hidden(**given).shape == given["labels"].shape


@pytest.mark.parametrize("name", ["whole", "chunked_vocab", "chunked_64"])
def test_a_checkpoint_gives_the_same_gradient_and_drops_what_forward_keeps(name):
    given = arguments()

    def run(hidden):
        return log_probs_from_hidden(**{**given, "hidden": hidden}, backend=name).sum()

    (plain,) = torch.autograd.grad(run(given["hidden"]), given["hidden"])
    (again,) = torch.autograd.grad(checkpoint(run, given["hidden"], use_reentrant=False), given["hidden"])
    torch.testing.assert_close(again, plain)


def test_autocast_converts_as_the_output_layer_does():
    given = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        result = log_probs_from_hidden(**given)
        expected = lp.log_probs_from_logits(
            functional.linear(given["hidden"], given["weight"], given["bias"]), given["labels"]
        )
    result.sum().backward()
    torch.testing.assert_close(result, expected, rtol=0, atol=0.06)  # a step of bfloat16
    assert given["weight"].grad.dtype == torch.float32


def test_leading_dimensions_slices_and_no_rows_are_taken():
    given = arguments(rows=24)
    hidden = given["hidden"].detach().view(4, 6, HIDDEN)[:, :-1].requires_grad_()
    labels = given["labels"].view(4, 6)[:, 1:]
    result = log_probs_from_hidden(hidden, given["weight"], labels, bias=given["bias"])
    assert result.shape == labels.shape
    result.sum().backward()
    assert hidden.grad.shape == hidden.shape
    empty = log_probs_from_hidden(given["hidden"][:0], given["weight"], given["labels"][:0])
    assert empty.shape == (0,)
    empty.sum().backward()
    assert given["weight"].grad.abs().max() >= 0


def test_the_cross_entropy_is_that_of_torch():
    given = arguments()
    losses = cross_entropy_from_hidden(**given)
    expected = functional.cross_entropy(
        functional.linear(given["hidden"], given["weight"], given["bias"]), given["labels"]
    )
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(HIDDEN, VOCAB)}, r"weight of shape \[48, 700\].* transpose one that is \[H, V\]"),
        ({"weight": torch.nn.Linear(HIDDEN, VOCAB)}, "type Linear.* Pass its weight, e.g. lm_head.weight"),
        ({"weight": torch.zeros(VOCAB, HIDDEN, dtype=torch.int8)}, "dtype int8.* Dequantise it"),
        ({"weight": torch.zeros(VOCAB, HIDDEN).half()}, "weight in float16.* one dtype is valid"),
        ({"bias": torch.zeros(3)}, r"bias of shape \[3\]; \[700\] is valid"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels of shape \[3\] for hidden of shape \[150, 48\]"),
        ({"labels": torch.full((ROWS,), VOCAB)}, r"labels\[0\] = 700; 0 to 699"),
        ({"softcap": 0.0}, "softcap=0; .* pass None"),
        ({"logit_scale": -1.0}, "logit_scale=-1.0; a positive"),
        ({"logit_scale": 1e-320}, "logit_scale=1e-320; a positive"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": torch.ones(3)}, r"temperature tensor of shape \[3\] for hidden of shape \[150, 48\]"),
        ({"memory_limit": 1000}, r"memory_limit=1000 for 150 x 48 x 700 float32 on cpu; .* at least \d+ bytes"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change, message):
    with pytest.raises(InputError, match=message):
        log_probs_from_hidden(**{**arguments(bias=False), **change})
