"""Each function of `compat` beside an independent statement of its original: value, gradient, dtype, shape."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

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
    torchforge,
    torchtitan,
    torchtune,
    trl,
    verl,
)
from compiled_logprobs.compat.patching import _arguments
from tests.helpers import compat_originals as originals

EPS = torch.finfo(torch.float32).eps
HALVES = (torch.bfloat16, torch.float16)
RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

LOGITS = "the logits stand here"
TEMPERATURES = st.sampled_from([1.0, 0.7, 0.3, 2.5])


@dataclass
class Call:
    """One call, the same for both: `LOGITS` in the arguments is where the logits go."""

    logits: Tensor
    arguments: list[Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def may_overwrite(self) -> bool:
        """Whether it asks for the gradient to be written over the logits."""
        return bool(self.options.get("inplace_backward"))

    @property
    def temperature(self) -> float:
        return next((one for one in self.arguments if isinstance(one, float)), 1.0)

    def of(self, function: Callable[..., Any], logits: Tensor) -> tuple[Tensor, ...]:
        result = function(*(logits if one is LOGITS else one for one in self.arguments), **self.options)
        return tuple(one for one in (result if isinstance(result, tuple) else (result,)) if one is not None)


@dataclass
class Case:
    ours: Callable[..., Any]
    original: Callable[..., Any]
    call: Callable[..., Call]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)

    def __str__(self) -> str:
        return f"{self.ours.__module__.split('.')[-1]}.{self.ours.__qualname__}"


def random_logits(draw, rows: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    vocab = draw(st.integers(2, 40))
    scale, shift = draw(st.sampled_from([0.1, 1.0, 8.0])), draw(st.sampled_from([0.0, 0.0, 30.0]))
    return (torch.randn(*rows, vocab) * scale + shift).to(dtype)


def rows_of(draw, ndim: int | None) -> tuple[int, ...]:
    return tuple(draw(st.integers(0, 5)) for _ in range(ndim or draw(st.integers(1, 3))))


def random_labels(draw, logits: Tensor, ignored: int | None, *more: int) -> Tensor:
    labels = torch.randint(logits.shape[-1], (*logits.shape[:-1], *more))
    if ignored is not None:
        labels[torch.rand(labels.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = ignored
    return labels


def labelled(ndim: int | None = None, ignored: int | None = None, temperature: bool = False, **options: Any):
    """Calls of the form f(logits, labels[, temperature]) with options to draw."""

    def call(draw, dtype: torch.dtype) -> Call:
        logits = random_logits(draw, rows_of(draw, ndim), dtype)
        arguments = [LOGITS, random_labels(draw, logits, ignored), *([draw(TEMPERATURES)] if temperature else [])]
        return Call(logits, arguments, {name: draw(one) for name, one in options.items()})

    return call


def unlabelled(ndim: int | None = None, *arguments: Any, **options: Any):
    def call(draw, dtype: torch.dtype) -> Call:
        logits = random_logits(draw, rows_of(draw, ndim), dtype)
        return Call(logits, [LOGITS, *arguments], {name: draw(one) for name, one in options.items()})

    return call


def verl_response(draw, dtype: torch.dtype) -> Call:
    logits = random_logits(draw, (draw(st.integers(0, 3)), draw(st.integers(2, 6))), dtype)
    return Call(logits, [random_labels(draw, logits, None), LOGITS, draw(st.integers(1, logits.shape[1] - 1))])


def skyrl_entropy(draw, dtype: torch.dtype) -> Call:
    logits = random_logits(draw, rows_of(draw, 2), dtype)
    mask = draw(st.sampled_from([None, (torch.rand(logits.shape[:-1]) < 0.5).float()]))
    return Call(logits, [LOGITS, draw(st.booleans()), mask, draw(st.integers(1, 5))])


def trl_selected(draw, dtype: torch.dtype) -> Call:
    logits = random_logits(draw, rows_of(draw, None), dtype)
    labels = random_labels(draw, logits, None, *draw(st.sampled_from([(), (1,), (3,)])))
    mask = draw(st.sampled_from([None, torch.rand(labels.shape) < 0.5, torch.randint(2, labels.shape)]))
    return Call(logits, [LOGITS, labels, draw(TEMPERATURES)], {"row_mask": mask})


def trl_both(draw, dtype: torch.dtype) -> Call:
    logits = random_logits(draw, rows_of(draw, None), dtype)
    mask = draw(st.sampled_from([None, torch.rand(logits.shape[:-1]) < 0.5]))
    return Call(
        logits, [LOGITS, random_labels(draw, logits, None), draw(st.booleans()), draw(TEMPERATURES)], {"row_mask": mask}
    )


def slime_both(draw, dtype: torch.dtype) -> Call:
    logits = random_logits(draw, rows_of(draw, 1), dtype)
    keep = draw(st.sampled_from([None, torch.rand(logits.shape) < 0.4]))
    options = {"with_entropy": draw(st.booleans()), "with_entropy_grad": draw(st.booleans())}
    return Call(
        logits,
        [LOGITS, random_labels(draw, logits, None), None],
        {**options, "chunk_size": draw(st.integers(-1, 3)), "log_prob_keep_mask": keep},
    )


def torchforge_aligned(draw, dtype: torch.dtype) -> Call:
    logits = random_logits(draw, (draw(st.integers(0, 3)), draw(st.integers(1, 6))), dtype)
    align = draw(st.booleans())
    labels = random_labels(draw, logits, -100)
    return Call(
        logits, [LOGITS, labels[:, : draw(st.integers(0, logits.shape[1] - 1))] if align else labels, 0.7, align]
    )


def nemo_next(draw, dtype: torch.dtype) -> Call:
    logits = random_logits(draw, (draw(st.integers(0, 3)), draw(st.integers(1, 6))), dtype)
    tokens = random_labels(draw, logits, None)
    padding = torch.zeros(logits.shape[0], draw(st.integers(0, 2)), logits.shape[-1], dtype=dtype)
    return Call(torch.cat([logits, padding], 1), [tokens, LOGITS], {"chunk_size": draw(st.sampled_from([None, 2]))})


def nemo_sampled(draw, dtype: torch.dtype) -> Call:
    call = nemo_next(draw, dtype)
    top_k = draw(st.sampled_from([None, -1, 1, min(3, call.logits.shape[-1])]))
    call.options["sampling_params"] = SimpleNamespace(top_k=top_k, top_p=draw(st.sampled_from([1.0, 0.9, 0.4])))
    return call


def nemo_parallel(draw, dtype: torch.dtype) -> Call:
    call = nemo_next(draw, dtype)
    options = {"inference_only": draw(st.booleans()), "chunk_size": draw(st.sampled_from([None, 2]))}
    return Call(call.logits, [LOGITS, call.arguments[0], 0, call.logits.shape[-1], None], options)


def nemo_class(*middle: Any):
    def call(draw, dtype: torch.dtype) -> Call:
        logits = random_logits(draw, rows_of(draw, 2), dtype)
        vocab = logits.shape[-1]
        return Call(logits, [LOGITS, random_labels(draw, logits, None), 0, vocab, *middle, None, draw(st.booleans())])

    return call


CHUNKS = st.integers(1, 5)
CASES = [
    Case(easyr1.log_probs_from_logits, originals.easyr1_log_probs_from_logits, labelled(ignored=-100)),
    Case(
        verl.logprobs_from_logits,
        originals.verl_logprobs_from_logits,
        labelled(ignored=-100, inplace_backward=st.booleans()),
    ),
    Case(verl.logprobs_from_logits_v2, originals.verl_logprobs_from_logits_v2, labelled()),
    Case(verl.logprobs_from_logits_naive, originals.verl_logprobs_from_logits_naive, labelled()),
    Case(verl.gather_from_labels, originals.verl_gather_from_labels, labelled()),
    Case(verl.entropy_from_logits, originals.verl_entropy_from_logits, unlabelled()),
    Case(
        verl.entropy_from_logits_with_chunking,
        originals.verl_entropy_from_logits_with_chunking,
        unlabelled(1, chunk_size=CHUNKS),
    ),
    Case(verl.calculate_sum_pi_squared_from_logits, originals.verl_calculate_sum_pi_squared_from_logits, unlabelled()),
    Case(verl.log_probs_from_logits_response, originals.verl_log_probs_from_logits_response, verl_response),
    Case(
        skyrl.logprobs_from_logits,
        originals.skyrl_logprobs_from_logits,
        labelled(2, ignored=-100, inplace_backward=st.booleans()),
    ),
    Case(skyrl.chunked_entropy_from_logits, originals.skyrl_chunked_entropy_from_logits, skyrl_entropy),
    Case(trl.selective_log_softmax, originals.trl_selective_log_softmax, trl_selected),
    Case(trl.selective_log_softmax_and_entropy, originals.trl_selective_log_softmax_and_entropy, trl_both),
    Case(trl.entropy_from_logits, originals.trl_entropy_from_logits, unlabelled(chunk_size=CHUNKS)),
    Case(
        openrlhf.log_probs_from_logits,
        originals.openrlhf_log_probs_from_logits,
        labelled(ignored=-100, temperature=True),
    ),
    Case(openrlhf.compute_entropy, originals.openrlhf_compute_entropy, unlabelled()),
    Case(areal.gather_logprobs, originals.areal_gather_logprobs, labelled(temperature=True, chunk_size=CHUNKS)),
    Case(
        areal.gather_logprobs_entropy,
        originals.areal_gather_logprobs_entropy,
        labelled(temperature=True, chunk_size=CHUNKS),
    ),
    Case(slime.calculate_log_probs_and_entropy, originals.slime_calculate_log_probs_and_entropy, slime_both),
    Case(prime_rl.selective_log_softmax, originals.prime_rl_selective_log_softmax, labelled(2)),
    Case(prime_rl.compute_entropy, originals.prime_rl_compute_entropy, unlabelled(2)),
    Case(torchtune.logits_to_logprobs, originals.torchtune_logits_to_logprobs, labelled(2, temperature=True)),
    Case(
        torchtune.batched_logits_to_logprobs,
        originals.torchtune_batched_logits_to_logprobs,
        labelled(2, temperature=True, chunk_size=CHUNKS),
    ),
    Case(
        torchtune.get_batch_log_probs,
        originals.torchtune_get_batch_log_probs,
        labelled(2, ignored=-100, return_average_logprobs=st.booleans()),
    ),
    Case(
        torchtune.truncate_sequence_for_logprobs,
        originals.torchtune_truncate_sequence_for_logprobs,
        unlabelled(2, 1),
    ),
    Case(torchforge.compute_logprobs, originals.torchforge_compute_logprobs, torchforge_aligned),
    Case(
        torchtitan.compute_logprobs,
        originals.torchtitan_compute_logprobs,
        labelled(ignored=-100, return_entropy=st.booleans()),
    ),
    Case(roll.log_probs_from_logits, originals.roll_log_probs_from_logits, labelled()),
    Case(roll.entropy_from_logits, originals.roll_entropy_from_logits, unlabelled()),
    Case(
        roll.vocab_parallel_logprobs,
        originals.roll_vocab_parallel_logprobs,
        labelled(2, use_fused_kernel=st.booleans()),
    ),
    Case(
        rlinf.compute_logprobs_from_logits,
        originals.rlinf_compute_logprobs_from_logits,
        labelled(ignored=-100, op_type=st.sampled_from(["torch", "flash_attn", "liger_kernel"])),
    ),
    Case(
        rlinf.compute_entropy_from_logits,
        originals.rlinf_compute_entropy_from_logits,
        unlabelled(2, dim=st.sampled_from([-1, 2])),
    ),
    Case(
        nemo_rl.get_next_token_logprobs_from_logits,
        originals.nemo_rl_get_next_token_logprobs_from_logits,
        nemo_next,
    ),
    Case(
        nemo_rl.get_next_token_logprobs_from_logits,
        originals.nemo_rl_get_next_token_logprobs_from_logits,
        nemo_sampled,
        dtypes=(torch.float32,),  # whose random values have no ties, of which top-k and top-p may keep either
    ),
    Case(nemo_rl.from_parallel_logits_to_logprobs, originals.nemo_rl_from_parallel_logits_to_logprobs, nemo_parallel),
    Case(nemo_rl.DistributedLogprob.apply, originals.nemo_rl_distributed_logprob, nemo_class()),
    Case(nemo_rl.ChunkedDistributedLogprob.apply, originals.nemo_rl_chunked_distributed_logprob, nemo_class(2)),
    Case(
        nemo_rl.ChunkedDistributedEntropy.apply,
        originals.nemo_rl_chunked_distributed_entropy,
        unlabelled(2, 2, None, inference_only=st.booleans()),
    ),
]
MODULES = [
    easyr1,
    verl,
    skyrl,
    trl,
    openrlhf,
    areal,
    slime,
    prime_rl,
    torchtune,
    torchforge,
    torchtitan,
    roll,
    rlinf,
    nemo_rl,
]


def run(call: Call, function: Callable[..., Any], logits: Tensor, grads: list[Tensor] | None):
    """Results, and the gradient of their sum weighted with `grads` (fresh ones if None), or None where nothing needs one.

    The logits are no leaf, as a model's are not: over a leaf nothing would write its gradient.
    """
    leaf = logits.detach().clone().requires_grad_()
    x = leaf * 1
    results = call.of(function, x)
    assert torch.equal(x.detach(), logits)
    if grads is None:
        grads = [torch.randn(one.shape).to(one.dtype) for one in results]
    pairs = [(one, g.to(one.dtype)) for one, g in zip(results, grads, strict=True) if one.requires_grad]
    if not pairs:
        return results, None, grads
    torch.autograd.backward([one for one, _ in pairs], [g for _, g in pairs])
    if not call.may_overwrite:
        assert torch.equal(x.detach(), logits)
    return results, leaf.grad, grads


def error(got: Tensor, true: Tensor) -> Tensor:
    """0 where both are the same infinity, or NaN."""
    got, true = got.detach(), true.detach()
    beyond = true.to(got.dtype).double()  # the infinity that a number out of the dtype's range becomes
    same = (got.isnan() & true.isnan()) | (got.isinf() & (got.double() == beyond))
    return torch.where(same, 0.0, (got.double() - true).abs())


@pytest.mark.parametrize("case", CASES, ids=str)
@RELAXED
@given(data=st.data())
def test_each_agrees_with_its_original(case, data):
    """In float32 to rounding; in 16 bits never further from float64 than the original, in value and gradient."""
    torch.manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    dtype = data.draw(st.sampled_from(case.dtypes))
    call = case.call(data.draw, dtype)
    want, want_gradient, grads = run(call, case.original, call.logits, None)
    got, gradient, _ = run(call, case.ours, call.logits, grads)
    true, true_gradient, _ = run(call, case.original, call.logits.double(), grads)

    assert [(one.shape, one.dtype) for one in got] == [(one.shape, one.dtype) for one in want]
    empty = call.logits.numel() == 0
    assert empty or [one.requires_grad for one in got] == [one.requires_grad for one in want]
    scale = max(1.0, call.logits.double().abs().max().item() / call.temperature) if not empty else 1.0
    for ours, theirs, truth in zip(got, want, true, strict=True):
        # The first for what both round in float32, the second for 16 bits, rounded the other way next to a tie.
        summed = ours.ndim < call.logits.ndim - 1  # torchtune's, over the tokens of a sequence
        slack = 8 * EPS * scale * (max(1, call.logits.shape[-2]) if summed else 1)
        assert (error(ours, truth) <= error(theirs, truth) + slack).all()
        if dtype == torch.float32:
            assert (error(ours, theirs.double()) <= slack).all()
    if gradient is not None and want_gradient is not None:
        size = max([1.0, *(g.double().abs().max().item() for g in grads if g.numel())])
        slack = 16 * EPS * scale * size / call.temperature
        assert gradient.dtype == dtype
        theirs = error(want_gradient, true_gradient).nan_to_num(
            math.inf
        )  # torchtune's, of a mean of no label in float16
        assert (error(gradient, true_gradient) <= theirs + slack).all()
        if dtype == torch.float32:
            assert (error(gradient, want_gradient.double()) <= slack).all()


def public_functions(module) -> list[Callable[..., Any]]:
    return [
        one
        for name, one in vars(module).items()
        if name[0] != "_" and inspect.isfunction(one) and one.__module__ == module.__name__
    ]


def test_every_public_function_has_a_case():
    tried = {case.ours for case in CASES}
    assert [one for module in MODULES for one in public_functions(module) if one not in tried] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda one: one.__name__.split(".")[-1])
def test_arguments_are_those_of_the_newest_version_known(module):
    framework = FRAMEWORKS[module.__name__.split(".")[-1]]
    for original in framework.originals:
        assert _arguments(getattr(module, original.name)) == original.signatures[0]


@pytest.mark.parametrize("module", MODULES, ids=lambda one: one.__name__.split(".")[-1])
def test_docstrings_say_what_is_kept_and_what_is_not(module):
    assert "\nKept: " in module.__doc__ and "\nNot kept: " in module.__doc__
    assert all(one.__doc__ for one in public_functions(module))


def some_call(case: Case) -> Call:
    """The same each time, in float32, not empty and without filters, which look at values."""
    calls: list[Call] = []

    @settings(max_examples=30, deadline=None, database=None, derandomize=True)
    @given(st.composite(lambda draw: case.call(draw, torch.float32))())
    def collect(call):
        if call.logits.numel():
            calls.append(call)

    collect()
    calls[-1].options.pop("sampling_params", None)
    return calls[-1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_can_be_traced_whole(case):
    """EasyR1 and SkyRL compile what they get from these modules."""
    torch._dynamo.reset()
    call = some_call(case)
    plain, gradient, grads = run(call, case.ours, call.logits, None)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    traced, traced_gradient, _ = run(call, compiled, call.logits, grads)
    for one, other in zip(plain, traced, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    if gradient is not None:
        torch.testing.assert_close(traced_gradient, gradient, rtol=1e-5, atol=1e-5)


# exp keeps its result for the gradient, in the original as well.
WRITABLE = [case for case in CASES if case.ours is not verl.calculate_sum_pi_squared_from_logits]


@pytest.mark.parametrize("case", WRITABLE, ids=str)
def test_each_result_can_be_written_into(case):
    """Trainers do `log_probs[mask == 0] = 0`."""
    call = some_call(case)
    _, gradient, grads = run(call, case.ours, call.logits, None)
    leaf = call.logits.clone().requires_grad_()
    results = call.of(case.ours, leaf * 1)
    for one in results:
        one.mul_(2)
    pairs = [(one, g) for one, g in zip(results, grads, strict=True) if one.requires_grad]
    if pairs:
        torch.autograd.backward([one for one, _ in pairs], [g for _, g in pairs])
        torch.testing.assert_close(leaf.grad, 2 * gradient)
