"""The contract as a property, over whatever hypothesis can think of, against the float64 reference."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import compiled_logprobs as clp
from compiled_logprobs.backends import get_backend
from compiled_logprobs.operation.autograd import PlainFormula, compute
from compiled_logprobs.operation.contract import Wanted
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import RESULTS, Problem

EPS = torch.finfo(torch.float32).eps
RELAXED = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@dataclass
class Call:
    logits: Tensor
    labels: Tensor
    temperature: float | Tensor
    wanted: Wanted
    ignore_index: int
    upstream: dict[str, Tensor]
    """By the name of the result; at least one."""
    inplace: bool


def logits_with_strides(draw, rows: tuple[int, ...], vocab: int, dtype: torch.dtype) -> Tensor:
    """Contiguous, sliced in any dimension, expanded, transposed or offset by one element."""
    kinds = ["contiguous", "sliced rows", "padded columns", "every second", "transposed", "offset"]
    kind = draw(st.sampled_from(kinds))
    if kind == "sliced rows" and rows:
        return torch.empty(*rows[:-1], rows[-1] + 2, vocab, dtype=dtype)[..., 1:-1, :]
    if kind == "padded columns":
        return torch.empty(*rows, vocab + 3, dtype=dtype)[..., 1 : vocab + 1]
    if kind == "every second":
        return torch.empty(*rows, 2 * vocab, dtype=dtype)[..., ::2]
    if kind == "transposed" and len(rows) >= 2:
        return torch.empty(*rows[:-2], rows[-1], rows[-2], vocab, dtype=dtype).transpose(-2, -3)
    if kind == "offset":
        return torch.empty(math.prod(rows) * vocab + 1, dtype=dtype)[1:].view(*rows, vocab)
    return torch.empty(*rows, vocab, dtype=dtype)


@st.composite
def calls(
    draw,
    vocabs=st.integers(1, 70),  # noqa: B008 - strategies are immutable
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    max_dims=3,
    max_labels=3,
    temperatures=("number", "per token"),
    results=("entropy", "logsumexp", "argmax", "sum_p_squared"),
    inplaces=(False, True),
):
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    dtype = draw(st.sampled_from(dtypes))
    rows = tuple(draw(st.lists(st.integers(0, 4), max_size=max_dims)))
    vocab, k = draw(vocabs), draw(st.integers(1, max_labels))

    largest = 3e4 if dtype == torch.float16 else 1e30
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1e4, largest]))
    values = (torch.randn(*rows, vocab) * scale + draw(st.sampled_from([0.0, 1e4, -1e4]))).clamp(-largest, largest)
    mask = draw(st.sampled_from(["none", "none", "half", "all but one", "all"]))
    if mask != "none":
        values[..., {"half": vocab // 2, "all but one": 1, "all": 0}[mask] :] = -math.inf
    for value in draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=3)):
        values[..., int(torch.randint(vocab, ()))].masked_fill_(torch.rand(rows) < 0.3, value)
    logits = logits_with_strides(draw, rows, vocab, dtype).copy_(values)

    ignore_index = draw(st.sampled_from([-100, -1, 0, vocab + 5]))
    # As Megatron's [s, b] is seen as [b, s]: nothing is contiguous, and backends may go by pointers.
    labels = torch.randint(vocab, (k, *rows)).movedim(0, -1)
    labels[torch.rand(rows) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = ignore_index
    labels[torch.rand(*rows, k) < draw(st.sampled_from([0.0, 0.2]))] = ignore_index
    labels[torch.rand(*rows, k) < draw(st.sampled_from([0.0, 0.0, 0.1]))] = draw(st.sampled_from([-7, vocab, 2**40]))

    temperature: float | Tensor = draw(st.sampled_from([1.0, 0.7, 1e-2, 1e3]))
    if draw(st.sampled_from(temperatures)) == "per token":
        temperature = (torch.rand(rows[::-1]) * 2 + 0.1).permute(tuple(reversed(range(len(rows)))))
        bad = draw(st.sampled_from([0.0, -1.0, math.nan, math.inf, 1.0]))
        temperature = torch.where(torch.rand(rows) < 0.1, bad, temperature)
    wanted = Wanted(**{name: draw(st.booleans()) for name in results})
    differentiable = ["log_probs", *(name for name in ("entropy", "logsumexp") if getattr(wanted, name))]
    through = draw(st.sets(st.sampled_from(differentiable), min_size=1))
    upstream = {
        name: (torch.randn(k, *rows).movedim(0, -1) if name == "log_probs" else torch.randn(rows))
        * draw(st.sampled_from([0.0, 1.0, 10.0]))
        for name in differentiable
        if name in through
    }
    return Call(logits, labels, temperature, wanted, ignore_index, upstream, draw(st.sampled_from(inplaces)))


def bits(x: Tensor) -> Tensor:
    """All of them, but of a NaN only that it is one."""
    values = x.detach().masked_fill(x.isnan(), math.nan).contiguous()
    return values.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_close(got: Tensor, true: Tensor, tolerance: Tensor) -> None:
    """NaN and infinities where they are in float64, everything else within `tolerance`, which has one entry a row."""
    rounded = true.to(got.dtype)
    assert torch.equal(got.isnan(), rounded.isnan()), (got, true)
    assert torch.equal(got.isinf(), rounded.isinf()) and torch.equal(
        got.sign() * got.isinf(), rounded.sign() * got.isinf()
    )
    finite = rounded.isfinite()
    error = torch.where(finite, (got.double() - true).abs(), 0.0)
    assert (error <= tolerance.expand_as(error))[finite].all(), (error.max(), tolerance)


def hold_against_the_reference(backend, call: Call) -> None:
    logits = call.logits.detach().requires_grad_()
    before, labels, version = bits(logits), call.labels.clone(), logits._version
    log_probs, *_ = results = compute(
        backend,
        logits,
        call.labels,
        call.temperature,
        ignore_index=call.ignore_index,
        wanted=call.wanted,
        inplace_backward=call.inplace,
    )
    names = ["log_probs", *(name for name, is_wanted in call.wanted._asdict().items() if is_wanted)]
    got = dict(zip(names, results, strict=True))
    assert torch.equal(bits(logits), before)
    (gradient,) = torch.autograd.grad([got[name] for name in call.upstream], logits, [*call.upstream.values()])
    original = before.view(logits.dtype).view(logits.shape)
    if call.inplace:
        gradient = gradient.clone()  # which lies in the memory of the logits
        with torch.no_grad():
            logits.copy_(original)
    assert torch.equal(bits(logits), before) and torch.equal(call.labels, labels)
    assert call.inplace or logits._version == version
    with torch.no_grad():
        again, *_ = compute(backend, logits, call.labels, call.temperature, ignore_index=call.ignore_index)
    assert torch.equal(bits(again), bits(log_probs))  # with and without gradient, and whatever else is asked for

    options = {"ignore_index": call.ignore_index, **{f"grad_{name}": grad for name, grad in call.upstream.items()}}
    true = reference(original, call.labels, call.temperature, **options)
    assert not (log_probs > 0).any() and (log_probs[call.labels == call.ignore_index] == 0).all()
    t = torch.as_tensor(call.temperature, dtype=torch.float64).expand(logits.shape[:-1]).unsqueeze(-1)
    t = torch.where((t > 0) & t.isfinite(), t, 1.0)
    x_scale = (original.double().nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True) / t).clamp(min=1.0)
    assert_close(log_probs, true.log_probs, 8 * EPS * x_scale)
    for name in set(got).intersection(("entropy", "logsumexp", "sum_p_squared")):
        assert name == "logsumexp" or not (got[name] < 0).any()
        truth = getattr(true, name).unsqueeze(-1)
        size = 2 * truth.nan_to_num() if name == "sum_p_squared" else 1.0
        assert_close(got[name].unsqueeze(-1), truth, 8 * EPS * x_scale * size)
    assert torch.equal(got.get("argmax", true.argmax), true.argmax)
    size = torch.zeros(())
    # An entropy, and so log p + entropy where p counts, is under 6 nats here.
    for name, factor in (("log_probs", 1), ("entropy", 6), ("logsumexp", 1)):
        if name in call.upstream:
            grad = call.upstream[name].double().abs()
            size = size + factor * (grad.sum(-1, keepdim=True) if name == "log_probs" else grad.unsqueeze(-1))
    info = torch.finfo(gradient.dtype)
    rounding = info.eps * true.gradient.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True) + info.tiny * info.eps
    assert_close(gradient, true.gradient, rounding + 16 * EPS * x_scale * size / t)


@pytest.mark.parametrize("backend", ["eager", "cpp", "the formula"])
@RELAXED
@given(data=st.data())
def test_the_contract_is_kept(backend, data):
    """The formula is what `compiled` compiles and a user's graph inlines; here it runs operation by operation."""
    if backend == "the formula":
        hold_against_the_reference(PlainFormula(), data.draw(calls(inplaces=(False,))))
        return
    problem = Problem("cpu", 8, 67, torch.float32, needs_grad=True)
    able = [name for name in RESULTS if get_backend(backend).why_not(problem._replace(**{name: True})) is None]
    hold_against_the_reference(get_backend(backend), data.draw(calls(results=able)))


FEW = {"max_dims": 1, "max_labels": 1, "temperatures": ("per token",), "results": ("entropy",), "inplaces": (False,)}


@pytest.mark.slow
@RELAXED
@given(calls(vocabs=st.just(67), dtypes=(torch.bfloat16,), **FEW))
def test_compiled_keeps_the_contract(call):
    """Few options, since each combination is compiled; N, strides and values are free."""
    hold_against_the_reference(get_backend("compiled"), call)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_results_can_be_written_into_as_trainers_do(shape):
    """As in `log_probs[mask == 0] = 0`: autograd refuses that for a view which a custom function returns."""
    leaf, labels, gradients = torch.randn(4, 5, 50, requires_grad=True), torch.randint(50, shape), []
    for is_written in (True, False):
        log_probs, entropy = clp.log_probs_from_logits(leaf * 1, labels, return_entropy=True)
        if is_written:
            log_probs[0] = 0.0
            entropy[1] = 0.0
            loss = log_probs.mul_(2).sum() + entropy.mul_(3).sum()
        else:
            loss = 2 * log_probs[1:].sum() + 3 * (entropy.sum() - entropy[1].sum())
        gradients += torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(*gradients)
