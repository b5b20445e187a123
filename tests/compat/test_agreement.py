"""Each function of `compat` beside an independent statement of its original: value, gradient, dtype, shape."""

import inspect
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from compiled_logprobs import InputError
from compiled_logprobs.compat import FRAMEWORKS, nemo_rl, prime_rl, rlinf, skyrl, verl
from compiled_logprobs.compat.patching import _arguments
from tests.helpers.compat_originals import ORIGINALS, prime_rl_gemma_head, prime_rl_head, verl_head

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = 30


class Draw:
    """Draws random logits `x`, and what goes with them; where they have two dimensions of rows, the last is 2 or more.

    The same seed gives the same, as long as the same is asked for in the same order.
    """

    temperature = 1.0

    def __init__(self, seed: int, dtype: torch.dtype, ndim: int | None) -> None:
        self.rng, self.torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
        rows = [self.rng.randint(0, 5) for _ in range(ndim or self.rng.randint(1, 3))]
        if ndim == 2:
            rows[-1] += 2
        scale, shift = self.pick(0.1, 1.0, 8.0), self.pick(0.0, 0.0, 30.0)
        self.x = (self.random(torch.randn, *rows, self.pick(*range(2, 41))) * scale + shift).to(dtype)
        *self.rows, self.vocab = self.x.shape

    def random(self, distribution: Callable[..., Tensor], *shape: int) -> Tensor:
        return distribution(shape, generator=self.torch_rng)

    def pick(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def flag(self) -> bool:
        return self.pick(False, True)

    def draw_temperature(self) -> float:
        self.temperature = self.pick(1.0, 0.7, 0.3, 2.5)
        return self.temperature

    def labels(self, ignored: int | None = None, *more: int) -> Tensor:
        labels = torch.randint(self.vocab, (*self.rows, *more), generator=self.torch_rng)
        if ignored is not None:
            labels[self.random(torch.rand, *labels.shape) < self.pick(0.0, 0.3, 1.0)] = ignored
        return labels

    def fewer_labels(self, *fewer: int) -> Tensor:
        """For the first positions, of which there are so many fewer than logits."""
        return self.labels()[:, : self.rows[1] - self.pick(*fewer)]

    def mask(self, shape: Sequence[int]) -> Tensor | None:
        return self.pick(None, self.random(torch.rand, *shape) < 0.5)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Two rows of 5 tokens, and a mask that has as many as there are logits."""
        mask = torch.zeros(10, dtype=torch.int64)
        mask[torch.randperm(10, generator=self.torch_rng)[: self.rows[0]]] = 1
        return torch.randint(self.vocab, (2, 5), generator=self.torch_rng), mask.view(2, 5)

    def cuts(self) -> list[int]:
        """Where three sequences begin, of all rows one after another, and where the last one ends."""
        total = math.prod(self.rows)
        return [0, *sorted(self.rng.randint(0, total) for _ in range(2)), total]

    def sampling(self) -> SimpleNamespace:
        top_k = self.pick(None, -1, 1, min(3, self.vocab))
        return SimpleNamespace(top_k=top_k, top_p=self.pick(1.0, 0.9, 0.4, 0.0))


@dataclass
class Pair:
    """Our function and the original, by `module.name`, and a call of either that both are to answer alike."""

    name: str
    call: Callable[[Callable[..., Any], Tensor, Draw], Any]
    ndim: int | None = None
    """Dimensions of the logits before the last; None for 1 to 3."""
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return self.name

    def draw(self, seed: int) -> Draw:
        return Draw(seed, self.dtypes[seed % len(self.dtypes)], self.ndim)


def find_ours(name: str) -> Callable[..., Any]:
    module, *names = name.split(".")
    return reduce(getattr, names, import_module(f"compiled_logprobs.compat.{module}"))


def call_packed(f: Callable[..., Tensor], x: Tensor, d: Draw) -> Tensor:
    """NeMo-RL's, whose labels are shifted already or not."""
    cuts, rolled = torch.tensor(d.cuts()), d.flag()
    packed = (x.flatten(0, 1)[None], d.labels().view(1, -1), cuts, d.pick(2, 4, 9), 0, d.vocab, None)
    return f(*packed, d.flag(), chunk_size=2, target_is_pre_rolled=rolled)


def call_unpacked(f: Callable[..., Tensor], x: Tensor, d: Draw) -> Tensor:
    """SkyRL's, whose sequences go to the columns of a mask, or several of them to a row."""
    cuts, columns, how = d.cuts(), d.pick(2, 4, 9), d.pick("rows", "mask", "shared")
    options: dict[str, Any] = {}
    lengths = [b - a - (d.flag() and b > a) for a, b in pairwise(cuts)]  # in part with padding at the end
    if how == "mask":
        mask = torch.zeros(3, columns, dtype=torch.int64)
        for row, length in zip(mask, lengths, strict=True):
            row[torch.randperm(columns, generator=d.torch_rng)[:length]] = 1
        options["attention_mask"] = mask
    if how == "shared":
        options["sub_seq_lengths"] = [lengths[:2], lengths[2:]]
    packed = (x.flatten(0, 1)[None], d.labels().view(1, -1), torch.tensor(cuts), columns, 0, d.vocab, None)
    return f(*packed, d.flag(), chunk_size=2, **options)


def call_without_padding(f: Callable[..., Tensor], x: Tensor, d: Draw) -> Tensor:
    tokens, mask = d.padded()
    return f(tokens[mask > 0].unsqueeze(0), x, mask.flatten().nonzero().squeeze(-1), 2, 5, 3)


PAIRS = [
    Pair("easyr1.log_probs_from_logits", lambda f, x, d: f(x, d.labels(-100).flatten())),
    Pair("verl.logprobs_from_logits", lambda f, x, d: f(x, d.labels(-100).flatten(), inplace_backward=d.flag())),
    Pair("verl.logprobs_from_logits_v2", lambda f, x, d: f(x, d.labels())),
    Pair("verl.logprobs_from_logits_naive", lambda f, x, d: f(x, d.labels())),
    Pair("verl.gather_from_labels", lambda f, x, d: f(x, d.labels())),
    Pair("verl.entropy_from_logits", lambda f, x, d: f(x)),
    Pair("verl.entropy_from_logits_with_chunking", lambda f, x, d: f(x, chunk_size=2), 1),
    Pair("verl.log_probs_from_logits_response", lambda f, x, d: f(d.labels(), x, d.pick(*range(1, d.rows[1]))), 2),
    Pair("verl.log_probs_from_logits_response_rmpad", lambda f, x, d: f(*d.padded(), x, 3), 1),
    Pair("verl.log_probs_from_logits_all_rmpad", call_without_padding, 1),
    Pair("verl.calculate_sum_pi_squared_from_logits", lambda f, x, d: f(x)),
    Pair("verl.vocab_parallel_log_probs_from_logits", lambda f, x, d: f(x, d.labels(-100))),
    Pair("verl.vocab_parallel_log_probs_from_logits_response_rmpad", lambda f, x, d: f(*d.padded(), x, 3), 1),
    Pair("verl.vocab_parallel_entropy", lambda f, x, d: f(x)),
    Pair("verl.vocab_parallel_entropy_with_chunking", lambda f, x, d: f(x, chunk_size=2), 2),
    Pair("verl.vocab_parallel_sum_pi_squared", lambda f, x, d: f(x)),
    Pair(
        "skyrl.from_parallel_logits_to_logprobs",
        lambda f, x, d: f(x, d.fewer_labels(0, 1), 0, d.vocab, None, d.flag(), chunk_size=2),
        2,
    ),
    Pair("skyrl.from_parallel_logits_to_logprobs_packed_sequences", call_unpacked, 2),
    Pair("skyrl.vocab_parallel_entropy", lambda f, x, d: f(x, 2)),
    Pair("skyrl.chunked_entropy_from_logits", lambda f, x, d: f(x, d.flag(), d.mask(d.rows), 2), 2),
    Pair("skyrl.logprobs_from_logits", lambda f, x, d: f(x, d.labels(-100).flatten(), inplace_backward=d.flag())),
    Pair("trl.selective_log_softmax", lambda f, x, d: f(x, d.labels(None, 3), d.draw_temperature())),
    Pair("trl.selective_log_softmax", lambda f, x, d: f(x, d.labels(), row_mask=d.mask(d.rows))),
    Pair("trl.entropy_from_logits", lambda f, x, d: f(x, chunk_size=2)),
    Pair(
        "trl.selective_log_softmax_and_entropy",
        lambda f, x, d: f(x, d.labels(), d.flag(), d.draw_temperature(), d.mask(d.rows)),
    ),
    Pair("openrlhf.compute_entropy", lambda f, x, d: f(x)),
    Pair("openrlhf.log_probs_from_logits", lambda f, x, d: f(x, d.labels(-100), d.draw_temperature())),
    Pair("areal.gather_logprobs", lambda f, x, d: f(x, d.labels(), d.draw_temperature(), chunk_size=2)),
    Pair("areal.gather_logprobs_entropy", lambda f, x, d: f(x, d.labels(), d.draw_temperature(), chunk_size=2)),
    Pair(
        "slime.calculate_log_probs_and_entropy",
        lambda f, x, d: f(x, d.labels(), None, d.flag(), 2, d.mask(x.shape), with_entropy_grad=d.flag()),
        1,
    ),
    Pair("prime_rl.selective_log_softmax", lambda f, x, d: f(x, d.labels()), 2),
    Pair("prime_rl.compute_entropy", lambda f, x, d: f(x), 2),
    Pair("torchtune.logits_to_logprobs", lambda f, x, d: f(x, d.labels(), d.draw_temperature()), 2),
    Pair(
        "torchtune.batched_logits_to_logprobs", lambda f, x, d: f(x, d.labels(), d.draw_temperature(), chunk_size=2), 2
    ),
    Pair("torchtune.truncate_sequence_for_logprobs", lambda f, x, d: f(x, 1), 2),
    Pair("torchtune.get_batch_log_probs", lambda f, x, d: f(x, d.labels(-100), return_average_logprobs=d.flag()), 2),
    Pair("torchforge.compute_logprobs", lambda f, x, d: f(x, d.labels(-100), 0.7, False), 2),
    Pair("torchforge.compute_logprobs", lambda f, x, d: f(x, d.fewer_labels(1, 2), 0.7), 2),
    Pair("torchtitan.cross_entropy_loss", lambda f, x, d: f(x, d.labels(-100)), 1),
    Pair("torchtitan.compute_logprobs", lambda f, x, d: f(x, d.labels(-100), return_entropy=d.flag())),
    Pair("megatron.fused_vocab_parallel_cross_entropy", lambda f, x, d: f(x, d.labels(-100), None), 2),
    Pair("megatron.vocab_parallel_cross_entropy", lambda f, x, d: f(x, d.labels(-100)), 2),
    Pair("roll.vocab_parallel_entropy", lambda f, x, d: f(x, d.flag(), d.flag())),
    Pair("roll.log_probs_from_logits", lambda f, x, d: f(x, d.labels())),
    Pair("roll.entropy_from_logits", lambda f, x, d: f(x)),
    Pair("roll.vocab_parallel_logprobs", lambda f, x, d: f(x, d.labels(), use_fused_kernel=d.flag()), 2),
    Pair(
        "rlinf.compute_logprobs_from_logits",
        lambda f, x, d: f(x, d.labels(-100).flatten(), d.pick(*get_args(rlinf.OpType))),
    ),
    Pair("rlinf.compute_entropy_from_logits", lambda f, x, d: f(x, dim=d.pick(-1, 1)), 2),
    Pair("nemo_rl.get_next_token_logprobs_from_logits", lambda f, x, d: f(d.fewer_labels(0, 1), x, chunk_size=2), 2),
    Pair("nemo_rl.from_parallel_logits_to_logprobs_packed_sequences", call_packed, 2),
    Pair("nemo_rl.DistributedLogprob.apply", lambda f, x, d: f(x, d.labels(), 0, d.vocab, None, d.flag()), 2),
    Pair("nemo_rl.ChunkedDistributedLogprob.apply", lambda f, x, d: f(x, d.labels(), 0, d.vocab, 2, None, d.flag()), 2),
    Pair("nemo_rl.ChunkedDistributedEntropy.apply", lambda f, x, d: f(x, 2, None, inference_only=d.flag()), 2),
    Pair(
        "nemo_rl.from_parallel_logits_to_logprobs",
        lambda f, x, d: f(x, d.fewer_labels(0, 1), 0, d.vocab, None, d.flag(), chunk_size=2),
        2,
    ),
]
SAMPLED = Pair(
    "nemo_rl.get_next_token_logprobs_from_logits",
    lambda f, x, d: f(d.fewer_labels(0, 1), x, sampling_params=d.sampling()),
    2,
    dtypes=(torch.float32,),  # random float32 numbers have no ties, of which top-k and top-p may keep either
)


def run(pair: Pair, function: Callable[..., Any], draw: Draw, grads: list[Tensor] | None = None, factor: int = 1):
    """Results, the gradient of their sum weighted with `grads` (fresh if None), or None without one, and the `grads`.

    The results are multiplied in place by a `factor` other than 1. The logits are no leaf, as a model's are not: over a
    leaf nothing would write its gradient.
    """
    leaf = draw.x.clone().requires_grad_()
    x = leaf * 1
    results = pair.call(function, x, draw)
    results = [result for result in (results if isinstance(results, tuple) else (results,)) if result is not None]
    assert torch.equal(x, draw.x)
    if factor != 1:
        results = [result.mul_(factor) for result in results]
    if grads is None:
        grads = [draw.random(torch.randn, *result.shape).to(result.dtype) for result in results]
    pairs = [(result, g.to(result.dtype)) for result, g in zip(results, grads, strict=True) if result.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
        may_overwrite = ".logprobs_from_logits" in pair.name or factor != 1
        assert may_overwrite or torch.equal(x, draw.x)
    return results, leaf.grad, grads


def error(got: Tensor, true: Tensor) -> Tensor:
    """0 where both are the same infinity, or NaN."""
    got, true = got.detach(), true.detach()
    beyond = true.to(got.dtype).double()  # the infinity that a number out of the dtype's range becomes
    same = (got.isnan() & true.isnan()) | (got.isinf() & (got.double() == beyond))
    return torch.where(same, 0.0, (got.double() - true).abs())


def compare(pair: Pair, seed: int) -> None:
    exact, draw = pair.draw(seed), pair.draw(seed)
    exact.x = exact.x.double()
    want, want_gradient, grads = run(pair, ORIGINALS[pair.name], pair.draw(seed))
    got, gradient, _ = run(pair, find_ours(pair.name), draw, grads)
    true, true_gradient, _ = run(pair, ORIGINALS[pair.name], exact, grads)

    assert [(result.shape, result.dtype) for result in got] == [(result.shape, result.dtype) for result in want]
    if draw.x.numel() == 0:
        return
    assert [result.requires_grad for result in got] == [result.requires_grad for result in want]
    scale = max(1.0, draw.x.double().abs().max().item() / draw.temperature)
    for ours, theirs, truth in zip(got, want, true, strict=True):
        # The first for what both round in float32, the second for 16 bits, rounded the other way next to a tie.
        summed = ours.ndim < draw.x.ndim - 1  # torchtune's, over the tokens of a sequence
        slack = 8 * EPS * scale * (draw.x.shape[-2] if summed else 1)
        assert (error(ours, truth) <= error(theirs, truth) + slack).all()
    if gradient is not None and want_gradient is not None:
        size = max([1.0, *(g.double().abs().max().item() for g in grads if g.numel())])
        slack = 16 * EPS * scale * size / draw.temperature
        assert gradient.dtype == draw.x.dtype
        theirs = error(want_gradient, true_gradient)
        # NaN is torchtune's, of a mean of no label in float16.
        assert (error(gradient, true_gradient) <= theirs.nan_to_num(math.inf) + slack).all()


@pytest.mark.parametrize("pair", [*PAIRS, SAMPLED], ids=str)
def test_each_agrees_with_its_original(pair):
    """In float32 to rounding; in 16 bits never further from float64 than the original, in value and gradient."""
    for seed in range(SEEDS):
        compare(pair, seed)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_function_has_a_case_and_the_arguments_and_docstring_that_are_promised(framework):
    module = import_module(f"compiled_logprobs.compat.{framework}")
    public = [value for value in vars(module).values() if inspect.isfunction(value) and value.__name__[0] != "_"]
    public = [function for function in public if function.__module__ == module.__name__]
    cases = {pair.name for pair in PAIRS} | HEADS.keys()
    assert {f"{framework}.{function.__name__}" for function in public} <= cases
    assert all(function.__doc__ for function in public)
    assert "\nKept: " in module.__doc__ and "\nNot kept: " in module.__doc__
    for _, name in FRAMEWORKS[framework].functions:
        assert _arguments(getattr(module, name)) == _arguments(ORIGINALS[f"{framework}.{name}"])


HEADS: dict[str, Callable[[Callable[..., Any], Tensor, Tensor, Draw], Any]] = {
    "verl.FusedLinearForPPOFunction": lambda f, h, w, d: f(h, w, d.labels(), d.draw_temperature(), 2),
    "verl.linear_cross_entropy": lambda f, h, w, d: f(h, w, d.labels(), d.draw_temperature()),
    "prime_rl._SequenceChunkedLogProbEntropyFn": lambda f, h, w, d: f(
        h.flatten(0, 1), w, d.labels().flatten(), d.random(torch.rand, math.prod(d.rows)) + 0.5, 2
    ),
    "prime_rl._GemmaChunkedLogProbEntropyFn": lambda f, h, w, d: f(
        h.flatten(0, 1), w, d.labels().flatten(), d.random(torch.rand, math.prod(d.rows)) + 0.5, 2, 3.0
    ),
    "nemo_rl.from_parallel_hidden_states_to_logprobs": lambda f, h, w, d: f(
        h.transpose(0, 1), w, False, d.labels(), 0, len(w), None, d.flag(), chunk_size=2
    ),
    "skyrl.from_parallel_hidden_to_logprobs": lambda f, h, w, d: f(
        h, w, d.fewer_labels(0, 1), 0, len(w), None, d.flag(), temperature=d.draw_temperature()
    ),
    "trl._ChunkedLogProbFunction": lambda f, h, w, d: f(
        h.flatten(0, 1),
        w,
        d.pick(None, d.random(torch.randn, len(w)).to(w.dtype)),
        d.labels().flatten(),
        d.draw_temperature(),
        4,
        d.pick(None, 3.0),
        d.pick(1.0, 0.25),
        d.pick((), ("log_probs", "entropy"), ("log_sum_sq_probs", "mean_logits"), ("entropy", "is_top1")),
    ),
    "unsloth.chunked_hidden_states_selective_log_softmax": lambda f, h, w, d: f(
        h, w, d.labels(), 2, d.pick(0.0, 0.5), d.pick(0.0, 2.0), d.pick(0.0, 3.0), d.draw_temperature()
    ),
}
"""By name, a call with hidden states [B, S, H] and a weight [V, H]."""


def run_head(name: str, function: Callable[..., Any], seed: int, dtype: torch.dtype, numbers: torch.dtype):
    """Results, as far as there are some, and the gradients in hidden states and weight of their sum; of `numbers` of
    the precision of `dtype`."""
    draw = Draw(seed, dtype, 2)
    hidden = (0.5 * draw.random(torch.randn, *draw.rows, 12)).to(dtype).to(numbers).requires_grad_()
    weight = draw.random(torch.randn, draw.vocab, 12).to(dtype).to(numbers).requires_grad_()
    results = HEADS[name](function, hidden, weight, draw)
    results = [result for result in (results if isinstance(results, tuple) else (results,)) if result is not None]
    through = [result for result in results if result.requires_grad]
    grads = [torch.linspace(-1, 2, result.numel()).view(result.shape).to(result.dtype) for result in through]
    gradients = torch.autograd.grad(through, [hidden, weight], grads) if through else ()
    return results, gradients


def mean_error(got: Tensor, true: Tensor) -> float:
    return (got.double() - true).square().mean().sqrt().item() if got.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_each_head_agrees_with_its_original(name, dtype):
    """In float32 to rounding; in bfloat16 no further from float64 than the original, but for chance."""
    ours = find_ours(name)
    ours = getattr(ours, "apply", ours)
    for seed in range(12):
        got, want = (run_head(name, function, seed, dtype, dtype) for function in (ours, ORIGINALS[name]))
        true = run_head(name, ORIGINALS[name], seed, dtype, torch.float64)
        assert [(a.shape, a.dtype, a.requires_grad) for a in got[0]] == [
            (b.shape, b.dtype, b.requires_grad) for b in want[0]
        ]
        for mine, theirs, exact in zip(
            *((*results, *gradients) for results, gradients in (got, want, true)), strict=True
        ):
            size = max([1.0, *exact.detach().double().abs().flatten().tolist()])
            if mine.dtype == torch.bool:
                continue  # in bfloat16 two may be the most likely
            rounding = 8 * EPS if dtype == torch.float32 else torch.finfo(dtype).eps / 2
            allowed = 2 * mean_error(theirs.detach(), exact.detach()) + rounding * size
            assert mean_error(mine.detach(), exact.detach()) <= allowed


def test_the_heads_as_modules_are_their_functions():
    hidden, weight, labels = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randint(11, (2, 3))
    temperature = torch.rand(2, 3) + 0.5
    flat = hidden.flatten(0, 1), weight, labels.flatten(), 1 / temperature.flatten(), 2
    for head, expected in (
        (prime_rl.FusedOutputLinear(8, 11, 2), prime_rl_head(*flat)),
        (prime_rl.GemmaFusedOutputLinear(8, 11, 2, 3.0), prime_rl_gemma_head(*flat, 3.0)),
    ):
        head.weight.data = weight
        out = head(hidden, labels, temperature)
        got = out["logprobs"].flatten(), out["entropy"].flatten()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(InputError, match="got no temperature"):
            head(hidden, labels)
    got = verl.FusedLinearForPPO()(hidden, weight, labels, 0.7)
    torch.testing.assert_close(got, verl_head(hidden, weight, labels, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda h, w, y: verl.linear_cross_entropy(h, w, y, 1.0, "mean"), "reduction='mean'; 'none' is valid"),
        (
            lambda h, w, y: skyrl.from_parallel_hidden_to_logprobs(h, w, y, 0, 9, None),
            "from 0 to 9 for logits of 11",
        ),
        (
            lambda h, w, y: nemo_rl.from_parallel_hidden_states_to_logprobs(h, w, False, y, 0, 9, None),
            "from 0 to 9 for logits of 11",
        ),
    ],
)
def test_what_heads_do_not_take_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call(torch.randn(2, 3, 8), torch.randn(11, 8), torch.randint(11, (2, 3)))


def find_seed(pair: Pair) -> int:
    """The first that gives float32 numbers."""
    seeds = range(0, SEEDS, len(DTYPES))
    return next(seed for seed in seeds if run(pair, ORIGINALS[pair.name], pair.draw(seed))[0][0].numel())


TRACED = {pair.name.partition(".")[0]: pair for pair in PAIRS}
"""The last one of each framework, which does most of its own."""


@pytest.mark.slow
@pytest.mark.parametrize("pair", TRACED.values(), ids=str)
def test_each_framework_can_be_traced_whole(pair):
    """EasyR1 and SkyRL compile what they get from these modules."""
    torch._dynamo.reset()
    seed = find_seed(pair)
    plain, gradient, grads = run(pair, find_ours(pair.name), pair.draw(seed))
    compiled = torch.compile(find_ours(pair.name), fullgraph=True, backend="aot_eager")
    traced, traced_gradient, _ = run(pair, compiled, pair.draw(seed), grads)
    torch.testing.assert_close((traced, traced_gradient), (plain, gradient), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "sum_pi_squared" not in pair.name], ids=str)
def test_each_result_can_be_written_into(pair):
    """Trainers do `log_probs[mask == 0] = 0`. Of a sum of squares, exp keeps its result, in the original as well."""
    seed = find_seed(pair)
    _, gradient, grads = run(pair, find_ours(pair.name), pair.draw(seed))
    _, doubled, _ = run(pair, find_ours(pair.name), pair.draw(seed), grads, factor=2)
    torch.testing.assert_close(doubled, None if gradient is None else 2 * gradient)


@pytest.mark.parametrize("name", [name for name in ORIGINALS if re.search("compute_entropy$|entropy_from", name)])
def test_a_token_of_probability_0_counts_0_in_an_entropy(name):
    x = torch.linspace(-2, 2, 30).view(2, 3, 5)
    x[..., :2] = -math.inf
    torch.testing.assert_close(find_ours(name)(x), ORIGINALS[name](x[..., 2:]))
