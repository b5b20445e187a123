"""Each function of `compat` beside an independent statement of its original: value, gradient, dtype, shape."""

import inspect
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_logprobs.compat import FRAMEWORKS
from compiled_logprobs.compat.patching import _arguments
from tests.helpers import compat_originals

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = 30

LOGITS = "the logits stand here"
TEMPERATURES = [1.0, 0.7, 0.3, 2.5]
BOOLEANS = [False, True]
CHUNKS = range(1, 6)


@dataclass
class Inputs:
    """What both are called with: `LOGITS` in the arguments is where the logits go."""

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


Draw = Callable[[random.Random, torch.dtype], Inputs]


@dataclass
class Pair:
    """Our function and the original, by `module.name`, and how to draw inputs that both are to answer alike."""

    name: str
    draw: Draw
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return self.name

    @property
    def ours(self) -> Callable[..., Any]:
        module, *names = self.name.split(".")
        found = import_module(f"compiled_logprobs.compat.{module}")
        for name in names:
            found = getattr(found, name)
        return found

    @property
    def original(self) -> Callable[..., Any]:
        snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.name.removesuffix(".apply").replace(".", "_")).lower()
        return getattr(compat_originals, snake_case)


def random_logits(rng: random.Random, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
    scale, shift = rng.choice([0.1, 1.0, 8.0]), rng.choice([0.0, 0.0, 30.0])
    return (torch.randn(*rows, rng.randint(2, 40)) * scale + shift).to(dtype)


def random_rows(rng: random.Random, ndim: int | None) -> list[int]:
    return [rng.randint(0, 5) for _ in range(ndim or rng.randint(1, 3))]


def random_labels(rng: random.Random, logits: Tensor, ignored: int | None = None, *more: int) -> Tensor:
    labels = torch.randint(logits.shape[-1], (*logits.shape[:-1], *more))
    if ignored is not None:
        labels[torch.rand(labels.shape) < rng.choice([0.0, 0.3, 1.0])] = ignored
    return labels


def drawn(
    ndim: int | None = None,
    ignored: int | None = None,
    *,
    labels: bool = True,
    temperature: bool = False,
    more: tuple[Any, ...] = (),
    **options: Sequence[Any],
) -> Draw:
    """Draw for f(logits[, labels][, temperature], *more) with options to choose from."""

    def draw(rng: random.Random, dtype: torch.dtype) -> Inputs:
        logits = random_logits(rng, random_rows(rng, ndim), dtype)
        arguments = [LOGITS, *([random_labels(rng, logits, ignored)] if labels else [])]
        arguments += [*([rng.choice(TEMPERATURES)] if temperature else []), *more]
        return Inputs(logits, arguments, {name: rng.choice(values) for name, values in options.items()})

    return draw


unlabelled = partial(drawn, labels=False)


def verl_response(rng: random.Random, dtype: torch.dtype) -> Inputs:
    logits = random_logits(rng, (rng.randint(0, 3), rng.randint(2, 6)), dtype)
    return Inputs(logits, [random_labels(rng, logits), LOGITS, rng.randint(1, logits.shape[1] - 1)])


def skyrl_entropy(rng: random.Random, dtype: torch.dtype) -> Inputs:
    logits = random_logits(rng, random_rows(rng, 2), dtype)
    mask = rng.choice([None, (torch.rand(logits.shape[:-1]) < 0.5).float()])
    return Inputs(logits, [LOGITS, rng.choice(BOOLEANS), mask, rng.randint(1, 5)])


def trl_selected(rng: random.Random, dtype: torch.dtype) -> Inputs:
    logits = random_logits(rng, random_rows(rng, None), dtype)
    labels = random_labels(rng, logits, None, *rng.choice([(), (1,), (3,)]))
    mask = rng.choice([None, torch.rand(labels.shape) < 0.5, torch.randint(2, labels.shape)])
    return Inputs(logits, [LOGITS, labels, rng.choice(TEMPERATURES)], {"row_mask": mask})


def trl_both(rng: random.Random, dtype: torch.dtype) -> Inputs:
    logits = random_logits(rng, random_rows(rng, None), dtype)
    mask = rng.choice([None, torch.rand(logits.shape[:-1]) < 0.5])
    arguments = [LOGITS, random_labels(rng, logits), rng.choice(BOOLEANS), rng.choice(TEMPERATURES)]
    return Inputs(logits, arguments, {"row_mask": mask})


def slime_both(rng: random.Random, dtype: torch.dtype) -> Inputs:
    logits = random_logits(rng, random_rows(rng, 1), dtype)
    keep = rng.choice([None, torch.rand(logits.shape) < 0.4])
    options = {"with_entropy": rng.choice(BOOLEANS), "with_entropy_grad": rng.choice(BOOLEANS)}
    options |= {"chunk_size": rng.randint(-1, 3), "log_prob_keep_mask": keep}
    return Inputs(logits, [LOGITS, random_labels(rng, logits), None], options)


def torchforge_aligned(rng: random.Random, dtype: torch.dtype) -> Inputs:
    logits = random_logits(rng, (rng.randint(0, 3), rng.randint(1, 6)), dtype)
    align, labels = rng.choice(BOOLEANS), random_labels(rng, logits, -100)
    tokens = labels[:, : rng.randint(0, logits.shape[1] - 1)] if align else labels
    return Inputs(logits, [LOGITS, tokens, 0.7, align])


def nemo_next(rng: random.Random, dtype: torch.dtype) -> Inputs:
    logits = random_logits(rng, (rng.randint(0, 3), rng.randint(1, 6)), dtype)
    padding = torch.zeros(logits.shape[0], rng.randint(0, 2), logits.shape[-1], dtype=dtype)
    tokens = random_labels(rng, logits)
    return Inputs(torch.cat([logits, padding], 1), [tokens, LOGITS], {"chunk_size": rng.choice([None, 2])})


def nemo_sampled(rng: random.Random, dtype: torch.dtype) -> Inputs:
    inputs = nemo_next(rng, dtype)
    top_k = rng.choice([None, -1, 1, min(3, inputs.logits.shape[-1])])
    inputs.options["sampling_params"] = SimpleNamespace(top_k=top_k, top_p=rng.choice([1.0, 0.9, 0.4, 0.0]))
    return inputs


def nemo_parallel(rng: random.Random, dtype: torch.dtype) -> Inputs:
    inputs = nemo_next(rng, dtype)
    options = {"inference_only": rng.choice(BOOLEANS), "chunk_size": rng.choice([None, 2])}
    return Inputs(inputs.logits, [LOGITS, inputs.arguments[0], 0, inputs.logits.shape[-1], None], options)


def nemo_class(*middle: Any) -> Draw:
    def draw(rng: random.Random, dtype: torch.dtype) -> Inputs:
        logits = random_logits(rng, random_rows(rng, 2), dtype)
        bounds = (0, logits.shape[-1])
        return Inputs(logits, [LOGITS, random_labels(rng, logits), *bounds, *middle, None, rng.choice(BOOLEANS)])

    return draw


PAIRS = [
    Pair("easyr1.log_probs_from_logits", drawn(ignored=-100)),
    Pair("verl.logprobs_from_logits", drawn(ignored=-100, inplace_backward=BOOLEANS)),
    Pair("verl.logprobs_from_logits_v2", drawn()),
    Pair("verl.logprobs_from_logits_naive", drawn()),
    Pair("verl.gather_from_labels", drawn()),
    Pair("verl.entropy_from_logits", unlabelled()),
    Pair("verl.entropy_from_logits_with_chunking", unlabelled(1, chunk_size=CHUNKS)),
    Pair("verl.log_probs_from_logits_response", verl_response),
    Pair("verl.calculate_sum_pi_squared_from_logits", unlabelled()),
    Pair("skyrl.chunked_entropy_from_logits", skyrl_entropy),
    Pair("skyrl.logprobs_from_logits", drawn(2, ignored=-100, inplace_backward=BOOLEANS)),
    Pair("trl.selective_log_softmax", trl_selected),
    Pair("trl.entropy_from_logits", unlabelled(chunk_size=CHUNKS)),
    Pair("trl.selective_log_softmax_and_entropy", trl_both),
    Pair("openrlhf.compute_entropy", unlabelled()),
    Pair("openrlhf.log_probs_from_logits", drawn(ignored=-100, temperature=True)),
    Pair("areal.gather_logprobs", drawn(temperature=True, chunk_size=CHUNKS)),
    Pair("areal.gather_logprobs_entropy", drawn(temperature=True, chunk_size=CHUNKS)),
    Pair("slime.calculate_log_probs_and_entropy", slime_both),
    Pair("prime_rl.selective_log_softmax", drawn(2)),
    Pair("prime_rl.compute_entropy", unlabelled(2)),
    Pair("torchtune.logits_to_logprobs", drawn(2, temperature=True)),
    Pair("torchtune.batched_logits_to_logprobs", drawn(2, temperature=True, chunk_size=CHUNKS)),
    Pair("torchtune.truncate_sequence_for_logprobs", unlabelled(2, more=(1,))),
    Pair("torchtune.get_batch_log_probs", drawn(2, ignored=-100, return_average_logprobs=BOOLEANS)),
    Pair("torchforge.compute_logprobs", torchforge_aligned),
    Pair("torchtitan.compute_logprobs", drawn(ignored=-100, return_entropy=BOOLEANS)),
    Pair("roll.log_probs_from_logits", drawn()),
    Pair("roll.entropy_from_logits", unlabelled()),
    Pair("roll.vocab_parallel_logprobs", drawn(2, use_fused_kernel=BOOLEANS)),
    Pair("rlinf.compute_logprobs_from_logits", drawn(ignored=-100, op_type=["torch", "flash_attn", "liger_kernel"])),
    Pair("rlinf.compute_entropy_from_logits", unlabelled(2, dim=[-1, 2])),
    Pair("nemo_rl.get_next_token_logprobs_from_logits", nemo_next),
    # Random float32 numbers have no ties, of which top-k and top-p may keep either.
    Pair("nemo_rl.get_next_token_logprobs_from_logits", nemo_sampled, dtypes=(torch.float32,)),
    Pair("nemo_rl.DistributedLogprob.apply", nemo_class()),
    Pair("nemo_rl.ChunkedDistributedLogprob.apply", nemo_class(2)),
    Pair("nemo_rl.ChunkedDistributedEntropy.apply", unlabelled(2, more=(2, None), inference_only=BOOLEANS)),
    Pair("nemo_rl.from_parallel_logits_to_logprobs", nemo_parallel),
]


def run(inputs: Inputs, function: Callable[..., Any], logits: Tensor, grads: list[Tensor] | None):
    """Results, the gradient of their sum weighted with `grads` (fresh if None), or None without one, and the `grads`.

    The logits are no leaf, as a model's are not: over a leaf nothing would write its gradient.
    """
    leaf = logits.detach().clone().requires_grad_()
    x = leaf * 1
    results = inputs.of(function, x)
    assert torch.equal(x.detach(), logits)
    if grads is None:
        grads = [torch.randn(one.shape).to(one.dtype) for one in results]
    pairs = [(one, g.to(one.dtype)) for one, g in zip(results, grads, strict=True) if one.requires_grad]
    if not pairs:
        return results, None, grads
    torch.autograd.backward([one for one, _ in pairs], [g for _, g in pairs])
    if not inputs.may_overwrite:
        assert torch.equal(x.detach(), logits)
    return results, leaf.grad, grads


def error(got: Tensor, true: Tensor) -> Tensor:
    """0 where both are the same infinity, or NaN."""
    got, true = got.detach(), true.detach()
    beyond = true.to(got.dtype).double()  # the infinity that a number out of the dtype's range becomes
    same = (got.isnan() & true.isnan()) | (got.isinf() & (got.double() == beyond))
    return torch.where(same, 0.0, (got.double() - true).abs())


def compare(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = pair.dtypes[seed % len(pair.dtypes)]
    inputs = pair.draw(rng, dtype)
    want, want_gradient, grads = run(inputs, pair.original, inputs.logits, None)
    got, gradient, _ = run(inputs, pair.ours, inputs.logits, grads)
    true, true_gradient, _ = run(inputs, pair.original, inputs.logits.double(), grads)

    assert [(one.shape, one.dtype) for one in got] == [(one.shape, one.dtype) for one in want]
    empty = inputs.logits.numel() == 0
    assert empty or [one.requires_grad for one in got] == [one.requires_grad for one in want]
    scale = max(1.0, inputs.logits.double().abs().max().item() / inputs.temperature) if not empty else 1.0
    for ours, theirs, truth in zip(got, want, true, strict=True):
        # The first for what both round in float32, the second for 16 bits, rounded the other way next to a tie.
        summed = ours.ndim < inputs.logits.ndim - 1  # torchtune's, over the tokens of a sequence
        slack = 8 * EPS * scale * (max(1, inputs.logits.shape[-2]) if summed else 1)
        assert (error(ours, truth) <= error(theirs, truth) + slack).all()
        if dtype == torch.float32:
            assert (error(ours, theirs.double()) <= slack).all()
    if gradient is not None and want_gradient is not None:
        size = max([1.0, *(g.double().abs().max().item() for g in grads if g.numel())])
        slack = 16 * EPS * scale * size / inputs.temperature
        assert gradient.dtype == dtype
        theirs = error(want_gradient, true_gradient)
        # NaN is torchtune's, of a mean of no label in float16.
        assert (error(gradient, true_gradient) <= theirs.nan_to_num(math.inf) + slack).all()
        if dtype == torch.float32:
            assert (error(gradient, want_gradient.double()) <= slack).all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_each_agrees_with_its_original(pair):
    """In float32 to rounding; in 16 bits never further from float64 than the original, in value and gradient."""
    for seed in range(SEEDS):
        compare(pair, seed)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_function_has_a_case_and_the_arguments_and_docstring_that_are_promised(framework):
    module = import_module(f"compiled_logprobs.compat.{framework}")
    public = [one for one in vars(module).values() if inspect.isfunction(one) and one.__module__ == module.__name__]
    public = [one for one in public if one.__name__[0] != "_"]
    assert {f"{framework}.{one.__name__}" for one in public} <= {pair.name for pair in PAIRS}
    assert all(one.__doc__ for one in public)
    assert "\nKept: " in module.__doc__ and "\nNot kept: " in module.__doc__
    for names in FRAMEWORKS[framework].functions.values():
        for name in names:
            pair = Pair(f"{framework}.{name}", unlabelled())
            assert _arguments(pair.ours) == _arguments(pair.original)


def some_inputs(pair: Pair) -> Inputs:
    """The same each time, in float32, not empty and without filters, which look at values."""
    torch.manual_seed(0)
    drawn = (pair.draw(random.Random(seed), torch.float32) for seed in range(SEEDS))
    inputs = next(
        inputs for inputs in drawn if inputs.logits.numel() and inputs.of(pair.original, inputs.logits)[0].numel()
    )
    inputs.options.pop("sampling_params", None)
    return inputs


TRACED = {pair.name.partition(".")[0]: pair for pair in PAIRS}
"""The last one of each framework, which does most of its own."""


@pytest.mark.slow
@pytest.mark.parametrize("pair", TRACED.values(), ids=str)
def test_each_framework_can_be_traced_whole(pair):
    """EasyR1 and SkyRL compile what they get from these modules."""
    torch._dynamo.reset()
    inputs = some_inputs(pair)
    plain, gradient, grads = run(inputs, pair.ours, inputs.logits, None)
    compiled = torch.compile(pair.ours, fullgraph=True, backend="aot_eager")
    traced, traced_gradient, _ = run(inputs, compiled, inputs.logits, grads)
    for one, other in zip(plain, traced, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    if gradient is not None:
        torch.testing.assert_close(traced_gradient, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "sum_pi_squared" not in pair.name], ids=str)
def test_each_result_can_be_written_into(pair):
    """Trainers do `log_probs[mask == 0] = 0`. Of a sum of squares, exp keeps its result, in the original as well."""
    inputs = some_inputs(pair)
    _, gradient, grads = run(inputs, pair.ours, inputs.logits, None)
    leaf = inputs.logits.clone().requires_grad_()
    results = inputs.of(pair.ours, leaf * 1)
    for one in results:
        one.mul_(2)
    pairs = [(one, g) for one, g in zip(results, grads, strict=True) if one.requires_grad]
    if pairs:
        torch.autograd.backward([one for one, _ in pairs], [g for _, g in pairs])
        torch.testing.assert_close(leaf.grad, 2 * gradient)
