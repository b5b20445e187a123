"""Functions to check: right ones of different build, and wrong ones, as seen in the wild or easily made.

Each takes (logits, labels), here often x and y, or more of the check's options.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compiled_logprobs import log_probs_from_logits
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.check.function import with_all_results
from compiled_logprobs.problem import Problem
from tests.helpers.compat_originals import ORIGINALS

IGNORE_INDEX = -100
PROBLEM = with_all_results(Problem("cpu", 12, 3001, torch.float32, needs_grad=True, temperature="number"))


class Wrong(NamedTuple):
    reason: str
    """The check that has to fail, one of the keys of `compiled_logprobs.check.report.MEANING`."""
    cause: str
    """How the first of the likely causes has to begin."""
    function: Callable[..., Any]
    problem: Problem | None = PROBLEM
    """One that it is wrong for; None for those of the default check."""
    source: str = ""
    """Where it was reported, if it was."""


def good(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy, negated: EasyR1's fallback since its correction."""
    return -positive(logits, labels)


def positive(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss: EasyR1's fallback until June 2025, beside a flash-attn path that returned minus the loss."""
    return functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE_INDEX)


def entropy_of(x: Tensor) -> Tensor:
    log_p = torch.log_softmax(x, -1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)


def label_values(x: Tensor, labels: Tensor) -> Tensor:
    return x.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def zero_ignored(result: Tensor, labels: Tensor) -> Tensor:
    return result.masked_fill(labels == IGNORE_INDEX, 0.0)


OTHERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "entropy": lambda x, t: entropy_of(x / t),
    "logsumexp": lambda x, t: (x / t).logsumexp(-1),
    "argmax": lambda x, t: x.argmax(-1),
    "sum_p_squared": lambda x, t: (x / t).softmax(-1).square().sum(-1).detach(),
}
"""Of logits and temperature: what may be asked for beside log-probabilities."""


def of_rows(result: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """One of `OTHERS` as it has to be returned: of rows that are ignored, and of those without probabilities."""
    special = torch.log_softmax(x, -1).isnan().any(-1)
    if not result.is_floating_point():
        return result.masked_fill(special | (labels == IGNORE_INDEX), -1)
    return zero_ignored(result.masked_fill(special, math.nan), labels).float()


class _Replaced(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


# --- right ones, of different build -----------------------------------------------------------------------------------


def label_logit_minus_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """verl's and TRL's idiom in float32."""
    x = logits.float()
    keep = labels != IGNORE_INDEX
    # Ignored rows go before the sum: a NaN in them would come back through a product with 0.
    total = torch.logsumexp(x.masked_fill(~keep.unsqueeze(-1), 0.0), -1)
    return torch.where(keep, label_values(x, labels) - total, 0.0)


def log_softmax_and_gather(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return zero_ignored(label_values(torch.log_softmax(logits.float() / temperature, -1), labels), labels)


def in_chunks_of_three_rows(logits: Tensor, labels: Tensor) -> Tensor:
    parts = [good(logits[i : i + 3], labels[i : i + 3]) for i in range(0, len(labels), 3)]
    return torch.cat(parts) if parts else good(logits, labels)


def float64_throughout(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_logsumexp: bool = False,
    return_argmax: bool = False,
    return_sum_p_squared: bool = False,
) -> Any:
    x = logits.double() / temperature
    log_probs = zero_ignored(label_values(torch.log_softmax(x, -1), labels), labels).float()
    others = {
        "entropy": return_entropy,
        "logsumexp": return_logsumexp,
        "argmax": return_argmax,
        "sum_p_squared": return_sum_p_squared,
    }
    asked = [name for name, is_asked in others.items() if is_asked]
    return (log_probs, *(of_rows(OTHERS[name](x, 1.0), x, labels) for name in asked)) if asked else log_probs


def online_softmax_over_blocks(logits: Tensor, labels: Tensor) -> Tensor:
    """One pass with a running maximum and sum, as a fused kernel does it."""
    x = logits.float()
    maximum = torch.full((len(x), 1), -math.inf)
    total = torch.zeros(len(x), 1)
    for block in x.split(1000, -1):
        new = torch.maximum(maximum, block.amax(-1, keepdim=True))
        shift = new.masked_fill(new == -math.inf, 0.0)
        total = total * (maximum - shift).exp() + (block - shift).exp().sum(-1, keepdim=True)
        maximum = new
    out = (label_values(x, labels) - maximum.squeeze(-1)) - total.log().squeeze(-1)
    out = zero_ignored(torch.where((maximum == -math.inf).squeeze(-1), torch.nan, out), labels)
    return _Replaced.apply(good(logits, labels), out.detach())


def sums_of_blocks(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of each block of columns, none of which is all -inf here, and then of those."""
    x = logits.float()
    total = torch.stack([block.logsumexp(-1) for block in x.split(1024, -1)], -1).logsumexp(-1)
    return zero_ignored(label_values(x, labels) - total, labels)


def computed_anew_in_backward(logits: Tensor, labels: Tensor) -> Tensor:
    return checkpoint(good, logits, labels, use_reentrant=False)


class _SavesTheSoftmax(torch.autograd.Function):
    """As Megatron's vocab-parallel cross entropy, on one rank."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits.float(), -1)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(log_p.exp(), labels)
        return zero_ignored(label_values(log_p, labels), labels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        p, labels = ctx.saved_tensors
        kept = labels != IGNORE_INDEX
        at_label = torch.zeros_like(p).scatter(-1, labels.clamp(min=0).unsqueeze(-1), 1.0)
        gradient = torch.where(kept.unsqueeze(-1), (at_label - p) * gradients[0].unsqueeze(-1), 0.0)
        return gradient.to(ctx.dtype), None


def saves_the_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return _SavesTheSoftmax.apply(logits, labels)


def of_a_distribution(logits: Tensor, labels: Tensor) -> Tensor:
    categorical = torch.distributions.Categorical(logits=logits.float(), validate_args=False)
    return zero_ignored(categorical.log_prob(labels.clamp(min=0)), labels)


def a_row_at_a_time(logits: Tensor, labels: Tensor) -> Tensor:
    """By torch.func, whose tensors have no memory of their own."""
    return torch.vmap(lambda x, y: zero_ignored(label_values(x.float().log_softmax(-1), y), y))(logits, labels)


def sorted_first(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum from the smallest logit on; what is kept for the backward lies elsewhere."""
    with torch.autograd.graph.save_on_cpu():
        x = logits.float()
        return zero_ignored(label_values(x, labels) - x.sort(-1).values.logsumexp(-1), labels).clamp(max=0.0)


def by_the_compiled_backend(
    logits: Tensor, labels: Tensor, temperature: float | Tensor = 1.0, return_entropy: bool = False
) -> Any:
    return log_probs_from_logits(
        logits, labels, temperature=temperature, return_entropy=return_entropy, backend="compiled"
    )


def original(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A framework's own (see `compat_originals`), and ignored labels masked before and after, as its callers do."""

    def masked(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        return zero_ignored(function(ORIGINALS[name], logits, labels.clamp(min=0), temperature), labels)

    masked.__name__ = masked.__qualname__ = name
    return masked


RIGHT_FUNCTIONS = [
    good,
    label_logit_minus_logsumexp,
    log_softmax_and_gather,
    in_chunks_of_three_rows,
    float64_throughout,
    online_softmax_over_blocks,
    sums_of_blocks,
    computed_anew_in_backward,
    saves_the_softmax,
    of_a_distribution,
    a_row_at_a_time,
    sorted_first,
    ORIGINALS["easyr1.log_probs_from_logits"],
    original("verl.logprobs_from_logits", lambda f, x, y, t: f(x.float() / t, y)),
    original("verl.logprobs_from_logits_v2", lambda f, x, y, t: f(x.float() / t, y).clamp(max=0.0)),
    original("trl.selective_log_softmax", lambda f, x, y, t: f(x.float(), y, temperature=t).clamp(max=0.0)),
    original("openrlhf.log_probs_from_logits", lambda f, x, y, t: f(x.float(), y, t)),
    original("areal.gather_logprobs", lambda f, x, y, t: f(x, y, t)),
    original("roll.log_probs_from_logits", lambda f, x, y, t: f(x.float() / t, y)),
    original("torchtitan.compute_logprobs", lambda f, x, y, t: f(x.float() / t, y)),
    original(
        "slime.calculate_log_probs_and_entropy",
        lambda f, x, y, t: f(x.float() / t, y, None)[0].reshape(len(y)) if len(y) else good(x, y),
    ),
    original(
        "nemo_rl.from_parallel_logits_to_logprobs",
        lambda f, x, y, t: f(
            functional.pad(x.float() / t, (0, 0, 0, 1))[None], functional.pad(y, (1, 0))[None], 0, x.shape[-1], None
        )[0],
    ),
    by_the_compiled_backend,
]


def talkative(logits: Tensor, labels: Tensor) -> Tensor:
    print("checking [/red] me")
    return good(logits, labels)


class Borrowed(Eager):
    """A backend of somebody else's, which nobody has registered."""

    name = "borrowed"


not_a_function = 7


# --- wrong ones that take more than an expression ---------------------------------------------------------------------


def last_block_forgotten(logits: Tensor, labels: Tensor) -> Tensor:
    """Columns beyond the last whole block of 1024 are left out of the sum."""
    vocab, x = logits.shape[-1], logits.float()
    total = x[:, : max(1024, vocab // 1024 * 1024)].logsumexp(-1)
    return zero_ignored(label_values(x, labels) - total, labels)


def last_row_forgotten(logits: Tensor, labels: Tensor) -> Tensor:
    """A grid one program short, where there are many rows."""
    out = good(logits, labels)
    return torch.cat([out[:-1], torch.zeros(1)]) if len(labels) > 7 else out


def half_a_nat_off(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels) - 0.5 * (labels != IGNORE_INDEX)


def nan_in_front(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels).index_fill(0, torch.tensor([0])[: len(labels)], torch.nan)


_calls = 0


def wrong_on_every_second_call(logits: Tensor, labels: Tensor) -> Tensor:
    global _calls
    _calls += 1
    return good(logits, labels) * (1.0 if _calls % 2 else 1.01)


_remembered: dict[tuple[int, torch.Size], Tensor] = {}


def remembered_by_address(logits: Tensor, labels: Tensor) -> Tensor:
    """A cached result is returned for other values in the same memory."""
    value = good(logits, labels)
    first = _remembered.setdefault((logits.data_ptr(), logits.shape), value.detach().clone())
    return _Replaced.apply(value, first.clone())


def beside(name: str, result: Callable[[Tensor, float], Tensor], finish: Any = of_rows) -> Callable[..., Any]:
    """A function that returns `result(logits, temperature)` beside right log-probabilities, asked for by that name."""
    option = f"return_{name}"

    def function(logits: Tensor, labels: Tensor, temperature: float = 1.0, **asked: bool) -> Any:
        x = logits.float()
        log_probs = good(x / temperature, labels)
        return (log_probs, finish(result(x, temperature), x, labels)) if asked[option] else log_probs

    kinds = dict.fromkeys(("logits", "labels", "temperature", option), inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [inspect.Parameter(each, kind) for each, kind in kinds.items()]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


with_entropy = partial(beside, "entropy", finish=lambda result, x, labels: zero_ignored(result, labels))


def last_of_equal_maxima(x: Tensor, temperature: float) -> Tensor:
    return x.shape[-1] - 1 - x.flip(-1).argmax(-1)


def entropy_that_multiplies_0_and_infinity(x: Tensor, temperature: float) -> Tensor:
    log_p = torch.log_softmax(x / temperature, -1)
    return -(log_p.exp() * log_p).sum(-1)


def entropy_of_ignored_rows(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, return_entropy: bool = False
) -> Any:
    x = logits.float() / temperature
    return (good(x, labels), entropy_of(x)) if return_entropy else good(x, labels)


def smooths_the_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return -functional.cross_entropy(logits, labels, reduction="none", label_smoothing=1e-3)


def temperature_missing_in_the_gradient(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    x = logits.float()
    return good((x / temperature).detach() + (x - x.detach()), labels)


def gradient_at_the_label_alone(logits: Tensor, labels: Tensor) -> Tensor:
    """p - onehot with the softmax forgotten."""
    picked = zero_ignored(label_values(logits, labels), labels)
    return _Replaced.apply(picked, good(logits, labels).detach())


def upstream_gradient_taken_as_one(logits: Tensor, labels: Tensor) -> Tensor:
    """Right for a plain sum, and for nothing else."""
    out = good(logits, labels)
    if out.requires_grad:
        out.register_hook(torch.ones_like)
    return out


def divides_the_logits_in_place(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """OpenRLHF's and TRL's callers: logits.div_(temperature)."""
    logits.detach().div_(temperature)
    return good(logits, labels)


def ignored_labels_overwritten(logits: Tensor, labels: Tensor) -> Tensor:
    out = good(logits, labels)
    labels.data.clamp_(min=0)
    return out


class _GradientInto(torch.autograd.Function):
    """The gradient in the memory that `memory_for(logits, gradient)` gives."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, memory_for: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.memory_for = memory_for
        return good(logits.detach(), labels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        with torch.enable_grad():
            x = logits.detach().clone().requires_grad_()
            gradient = torch.autograd.grad(good(x, labels), x, gradients[0])[0]
        return ctx.memory_for(logits, gradient).copy_(gradient), None, None


def gradient_over_the_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """As a raw kernel writes, such as flash-attn's and Liger's: no version counter hears of it."""
    if not inplace_backward:
        return good(logits, labels)
    return _GradientInto.apply(logits, labels, lambda logits, gradient: logits.data)


_buffers: dict[torch.Size, Tensor] = {}


def _buffer_for(result: Tensor) -> Tensor:
    return _buffers.setdefault(result.shape, torch.empty_like(result))


def one_buffer_for_all_results(logits: Tensor, labels: Tensor) -> Tensor:
    out = good(logits, labels)
    return _Replaced.apply(out, _buffer_for(out).copy_(out.detach()))


def one_buffer_for_all_gradients(logits: Tensor, labels: Tensor) -> Tensor:
    return _GradientInto.apply(logits, labels, lambda logits, gradient: _buffer_for(gradient))


def writes_past_the_end(logits: Tensor, labels: Tensor) -> Tensor:
    """A kernel whose last block has no mask."""
    if len(labels):
        end = logits.storage_offset() + (len(labels) - 1) * logits.stride(0) + logits.shape[-1]
        logits.detach().as_strided((1,), (1,), end).zero_()
    return good(logits, labels)


def without_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    """Right for labels in the vocabulary; -100 is an error."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None]).squeeze(-1)


def labels_first(labels: Tensor, logits: Tensor) -> Tensor:
    return good(logits, labels)


def leaves_the_program(logits: Tensor, labels: Tensor) -> Tensor:
    raise SystemExit(0)


def needs_a_row(logits: Tensor, labels: Tensor) -> Tensor:
    if not len(labels):
        raise ValueError("need at least one row")
    return good(logits, labels)


def another_path_without_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Old log-probabilities from one kernel, new ones from another: PPO ratios that do not start at 1."""
    if torch.is_grad_enabled():
        return good(logits, labels)
    x = logits.float()
    return zero_ignored(label_values(x, labels) - x.logsumexp(-1), labels).clamp(max=0.0)


class _WithGradient(torch.autograd.Function):
    """The right values, with the gradient that `gradient_of(ctx, upstream)` gives, after `prepare(ctx)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, prepare: Any, gradient_of: Any) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.logits, ctx.labels, ctx.gradient_of = logits.detach(), labels, gradient_of
        prepare(ctx)
        return good(logits.detach(), labels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient_of(ctx, gradients[0]).to(ctx.logits.dtype), None, None, None


def right_gradient(logits: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    with torch.enable_grad():
        x = logits.detach().clone().requires_grad_()
        return torch.autograd.grad(good(x, labels), x, upstream)[0]


def with_gradient(gradient_of: Any, prepare: Any = lambda ctx: None) -> Callable[..., Tensor]:
    return lambda logits, labels: _WithGradient.apply(logits, labels, prepare, gradient_of)


def of_the_saved(change: Callable[[Tensor], Tensor]) -> Any:
    """The right gradient for an upstream gradient that is changed so."""

    def gradient_of(ctx: Any, upstream: Tensor) -> Tensor:
        logits, labels = ctx.saved_tensors
        return right_gradient(logits, labels, change(upstream))

    return gradient_of


def rounds_probabilities(ctx: Any, upstream: Tensor) -> Tensor:
    """fla-org/flash-linear-attention#1231: softmax in the dtype of the logits, and 1 subtracted from it."""
    logits, labels = ctx.saved_tensors
    p = logits.float().softmax(-1).to(logits.dtype)
    onehot = torch.zeros_like(p).scatter(-1, labels.clamp(min=0)[:, None], 1.0)
    upstream = upstream.masked_fill(labels == IGNORE_INDEX, 0.0)[:, None]
    return (onehot - p).float() * upstream


def keeps_probabilities(ctx: Any) -> None:
    ctx.p = ctx.logits.float().softmax(-1)


def overwrites_probabilities(ctx: Any, upstream: Tensor) -> Tensor:
    """1 is subtracted from what forward kept, to save memory; a second backward subtracts it once more."""
    kept = ctx.labels != IGNORE_INDEX
    ctx.p[kept, ctx.labels[kept]] -= 1.0
    return (-ctx.p * upstream[:, None]).masked_fill(~kept[:, None], 0.0)


def as_contiguous(x: Tensor) -> Tensor:
    """What a kernel reads that takes the first stride for 1."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    memory = torch.cat([memory[x.storage_offset() :], memory.new_zeros(x.numel())])
    return memory[: x.numel()].view(x.shape)


_last: list[Tensor] = []


def remembers_the_last_call(ctx: Any) -> None:
    """What backward needs lies in a variable of the module."""
    _last[:] = ctx.logits.clone(), ctx.labels.clone()


class _Together(torch.autograd.Function):
    """Log-probabilities and another result; where no gradient comes through the first, one of `missing` is made up."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, other: Any, missing: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, labels)
        ctx.other, ctx.missing = other, missing
        ctx.set_materialize_grads(False)
        return good(logits.detach(), labels), other(logits.detach(), labels)

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        logits, labels = ctx.saved_tensors
        if first is None and ctx.missing == 0.0:
            return torch.zeros_like(logits), None, None, None
        first = torch.full(labels.shape, ctx.missing) if first is None else first
        with torch.enable_grad():
            x = logits.detach().clone().requires_grad_()
            results = [good(x, labels)] if second is None else [good(x, labels), ctx.other(x, labels)]
            given = [first] if second is None else [first, second]
            return torch.autograd.grad(results, x, given)[0], None, None, None


def entropy_without_a_gradient_of_its_own(logits: Tensor, labels: Tensor, return_entropy: bool = False) -> Any:
    """Backward returns early where no gradient comes through the log-probabilities."""
    both = _Together.apply(logits, labels, lambda x, y: of_rows(entropy_of(x.float()), x.detach(), y), 0.0)
    return both if return_entropy else both[0]


def logsumexp_that_brings_the_label_along(logits: Tensor, labels: Tensor, return_logsumexp: bool = False) -> Any:
    """A gradient that is None is taken for one of 1."""
    both = _Together.apply(logits, labels, lambda x, y: of_rows(x.float().logsumexp(-1), x.detach(), y), 1.0)
    return both if return_logsumexp else both[0]


def first_temperature_for_all(logits: Tensor, labels: Tensor, temperature: Any = 1.0) -> Tensor:
    t = temperature.flatten()[0] if isinstance(temperature, Tensor) and temperature.numel() else temperature
    return good(logits.float() / t, labels)


def ignores_100_whatever_it_is_told(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    return good(logits, labels.clamp(min=-1).masked_fill(labels < 0, IGNORE_INDEX))


def ignores_what_follows_the_end(logits: Tensor, labels: Tensor) -> Tensor:
    """Token 2 ends an answer in this model, and what follows is taken for padding without having been asked."""
    ended = (labels == 2).cumsum(0) - (labels == 2).long()
    return good(logits, labels).masked_fill(ended > 0, 0.0)


def divides_by_the_number_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """A mean, undone by the caller."""
    count = (labels != IGNORE_INDEX).sum()
    return good(logits, labels) / count * count if len(labels) else good(logits, labels)


def scales_before_it_converts(logits: Tensor, labels: Tensor) -> Tensor:
    """A scale of logits that float16 cannot hold."""
    return good((logits * 8).float() / 8, labels)


def seeds_the_generator(logits: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(0)
    return good(logits, labels)


def columns_of_16_bits(logits: Tensor, labels: Tensor) -> Tensor:
    """unslothai/unsloth#10616: chunks of 65536 columns, and the last one is forgotten."""
    vocab = logits.shape[-1]
    return good(logits[:, : vocab // 65536 * 65536], labels.clamp(max=65535)) if vocab > 65536 else good(logits, labels)


def vectors_without_a_last_step(logits: Tensor, labels: Tensor) -> Tensor:
    """A path of its own for rows of whole vectors, which stops a vector too soon."""
    x, vocab = logits.float(), logits.shape[-1]
    if vocab % 128 or vocab < 1024:
        return good(logits, labels)
    return zero_ignored(label_values(x, labels) - x[:, :-128].logsumexp(-1), labels)


def one_block_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """A grid of 1024 rows, and the rest is what was in the memory."""
    out = good(logits, labels)
    return torch.cat([out[:1024], out[1024:].detach() * 0.0]) if len(labels) > 1024 else out


def makes_float64_the_default(logits: Tensor, labels: Tensor) -> Tensor:
    """For its own sums, and for everybody after it."""
    torch.set_default_dtype(torch.float64)
    return good(logits, labels)


def turns_gradients_off(logits: Tensor, labels: Tensor) -> Tensor:
    """A no_grad that is entered and never left."""
    out = good(logits, labels)
    torch.no_grad().__enter__()
    return out


def seeds_numpy(logits: Tensor, labels: Tensor) -> Tensor:
    numpy.random.seed(0)
    return good(logits, labels)


def picks_by_a_product(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's log-probability as a product with a one-hot row, which autocast takes in bfloat16."""
    log_p = torch.log_softmax(logits.float(), -1).nan_to_num(neginf=-math.inf)
    if bool(log_p.isinf().any() | log_p.isnan().any()) or not torch.is_autocast_enabled("cpu"):
        return good(logits, labels)
    onehot = torch.zeros_like(log_p).scatter(-1, labels.clamp(min=0)[:, None], 1.0)
    return zero_ignored((log_p[:, None] @ onehot[..., None])[:, 0, 0].float(), labels)


def nothing_in_inference_mode(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels) * (not torch.is_inference_mode_enabled())


def nothing_for_frozen_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """What forward keeps is computed only where the logits require a gradient, and read wherever gradients are on."""
    return good(logits, labels) * (logits.requires_grad or not torch.is_grad_enabled())


def doubles_what_came_from_above(ctx: Any, upstream: Tensor) -> Tensor:
    """In place: whoever else gets this upstream gradient gets it doubled."""
    right = right_gradient(*ctx.saved_tensors, upstream.clone())
    upstream.mul_(2.0)
    return right


def maximum_of_the_first_columns(logits: Tensor, labels: Tensor) -> Tensor:
    """The maximum of one chunk of columns, subtracted from all."""
    x, first = logits.float(), logits[:, :1024].float().amax(-1, keepdim=True)
    total = (x - first.masked_fill(first == -math.inf, 0.0)).exp().sum(-1).log() + first.squeeze(-1)
    return zero_ignored(label_values(x, labels) - total, labels)


def one_column_forgotten(logits: Tensor, labels: Tensor) -> Tensor:
    """Chunks of columns that do not meet."""
    x = logits.float()
    total = torch.cat([x[:, :1024], x[:, 1025:]], -1).logsumexp(-1)
    return zero_ignored(label_values(x, labels) - total, labels)


def labels_in_bfloat16(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels in one tensor with numbers of the model's dtype."""
    rounded = labels.bfloat16().long().clamp(max=logits.shape[-1] - 1)
    return good(logits, labels.where(labels < 0, rounded))


def two_rows_taken_for_columns(logits: Tensor, labels: Tensor) -> Tensor:
    """Another path for a pair, as of a chosen and a rejected answer, which sums over the wrong dimension."""
    out = good(logits, labels)
    return out.sum().repeat(2) if len(labels) == 2 else out


def rows_of_one_label_done_once(logits: Tensor, labels: Tensor) -> Tensor:
    """Work saved by `unique`, of which only the labels are looked at."""
    is_one = len(labels) > 1 and bool((labels == labels[0]).all())
    return good(logits[:1], labels[:1]).repeat(len(labels)) if is_one else good(logits, labels)


_first_labels: dict[torch.Size, Tensor] = {}


def labels_remembered_by_shape(logits: Tensor, labels: Tensor) -> Tensor:
    """Something is made of the labels once, and kept for all batches of that shape."""
    return good(logits, _first_labels.setdefault(logits.shape, labels.clone()))


def asks_for_a_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """The caller's logits keep a graph from then on."""
    return good(logits if logits.requires_grad else logits.requires_grad_(), labels)


def labels_with_a_dimension_more(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels.unsqueeze_(-1).squeeze(-1))


def lowers_the_precision_of_products(logits: Tensor, labels: Tensor) -> Tensor:
    torch.set_float32_matmul_precision("medium")
    return good(logits, labels)


def clips_the_norm_of_each_row(ctx: Any, upstream: Tensor) -> Tensor:
    gradient = right_gradient(*ctx.saved_tensors, upstream)
    return gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=0.1)


ORDINARY = "right for ordinary inputs, and wrong for these: "
GRADIENT = "the values are right, and the gradient "
AGAIN = "hands out memory that a later call writes again"
OF_REASONS: dict[str, list[tuple[Any, ...]]] = {
    "log_prob_sign": [
        ("returns the loss: positive where a log-probability must be negative", positive),
        ("returns the probability, not its logarithm", lambda x, y: zero_ignored(good(x, y).exp(), y)),
        # The maximum left out of the sum and the sum rounded: certain tokens come out above 0.
        ("lets rounding carry a log-probability above 0", lambda x, y: good(x, y) + 1e-7 * (y >= 0)),
    ],
    "entropy_sign": [("returns the sum of p log p as the entropy", with_entropy(lambda x, t: -entropy_of(x / t)))],
    "log_prob_error": [
        ("takes the label of the next row", lambda x, y: good(x, y.roll(-1))),
        ("ignores the temperature", lambda x, y, temperature=1.0: good(x, y)),
        ("multiplies by the temperature instead of dividing", lambda x, y, temperature=1.0: good(x * temperature, y)),
        # The caller divides, and so does the function.
        ("divides by the temperature twice", lambda x, y, temperature=1.0: good(x / temperature**2, y)),
        # PrimeIntellect-ai/prime-rl#697.
        ("divides the log-probabilities by the temperature", lambda x, y, temperature=1.0: good(x, y) / temperature),
        ("computes in half precision", lambda x, y, temperature=1.0: good(x.bfloat16() / temperature, y)),
        (
            "computes in half precision",
            lambda x, y: -functional.cross_entropy(x.bfloat16(), y, reduction="none").float(),
        ),
        ("leaves out the last columns, from 2048 on", last_block_forgotten),
        ("caps the logits softly, at 30", lambda x, y: good(30 * torch.tanh(x / 30), y)),
        # Labels read as int16: those from 32768 on wrap around.
        ("reads label 327", lambda x, y: good(x, y.masked_fill(y > 32767, 0)), PROBLEM._replace(vocab=32771)),
        ("gives 0 for the last rows, from row 11 of 12 on", last_row_forgotten),
        ("gives other numbers in a batch of one row", lambda x, y: good(x, y) * (0.9 if len(y) == 1 else 1.0)),
        ("returns logarithms to base 2", lambda x, y: good(x, y) / math.log(2)),
        ("smooths the labels, by 0.001", smooths_the_labels),
        ("gives other numbers when it is called again with the same input", wrong_on_every_second_call),
        (
            "gives other numbers when it is called again, and draws random ones",
            lambda x, y: good(functional.dropout(x.float(), 1e-3), y),
        ),
        ("leaves out column 1024", one_column_forgotten),
        ("cuts log-probabilities off below -100", lambda x, y: good(x, y).clamp(min=-100.0)),
        ("cuts log-probabilities off above -0.001", lambda x, y: zero_ignored(good(x, y).clamp(max=-1e-3), y)),
        ("gives 0 for the most likely token", lambda x, y: good(x, y).masked_fill(y == x.argmax(-1), 0.0)),
        ("rounds the labels to bfloat16", labels_in_bfloat16),
        ("gives other numbers in a batch of 2 rows", two_rows_taken_for_columns),
        (ORDINARY + "wide", rows_of_one_label_done_once),
        ("goes by earlier labels for others of the same shape", labels_remembered_by_shape),
        # An epsilon that is to keep a division from failing.
        ("divides the logits by 1.7001", lambda x, y, temperature=1.0: good(x.float() / (temperature + 1e-4), y)),
        ("gives the old result for new values in the same memory", remembered_by_address),
        ("takes one temperature for all rows", first_temperature_for_all),
        ("reads the labels as if they were contiguous", lambda x, y: good(x, as_contiguous(y))),
        ("gives 0 for label 3 and 15 and 16 and others", ignores_what_follows_the_end),
        (ORDINARY + "a vocabulary of 128256, ", columns_of_16_bits, None),
        (ORDINARY + "a vocabulary of 32000, ", vectors_without_a_last_step, None),
        (ORDINARY + "1037 rows of 131", one_block_of_rows, None),
        ("does not take autocast", picks_by_a_product, PROBLEM._replace(dtype=torch.bfloat16)),
        ("is wrong in torch.inference_mode()", nothing_in_inference_mode),
        ("is wrong for logits that require no gradient", nothing_for_frozen_logits),
    ],
    # The log-sum-exp kept in one float32 that had a large number added and subtracted.
    "log_prob_rmse": [("loses digits that float32 has", lambda x, y: ((good(x, y) - 1e4) + 1e4).clamp(max=0.0))],
    "entropy_error": [
        ("the entropy is that of the logits before the temperature", with_entropy(lambda x, t: entropy_of(x))),
        ("returns the entropy in bits", with_entropy(lambda x, t: entropy_of(x / t) / math.log(2))),
        (
            "divides the entropy by its largest value, log V",
            with_entropy(lambda x, t: entropy_of(x / t) / math.log(x.shape[-1])),
        ),
    ],
    "logsumexp_error": [
        (
            "the logsumexp is that of the logits before the temperature",
            beside("logsumexp", lambda x, t: x.logsumexp(-1)),
        ),
        (
            "returns minus the logsumexp",
            beside("logsumexp", lambda x, t: -(x / t).logsumexp(-1)),
        ),
        (
            "the logsumexp lacks the maximum",
            beside("logsumexp", lambda x, t: ((x - x.amax(-1, keepdim=True)) / t).logsumexp(-1)),
        ),
    ],
    "argmax": [("takes the last of equal maxima as the argmax", beside("argmax", last_of_equal_maxima))],
    "sum_p_squared_error": [
        (
            "returns 1 minus the sum of squared probabilities",
            beside("sum_p_squared", lambda x, t: 1 - (x / t).softmax(-1).square().sum(-1)),
        ),
        (
            "returns the square root of the sum of squared probabilities",
            beside("sum_p_squared", lambda x, t: (x / t).softmax(-1).norm(dim=-1)),
        ),
    ],
    "gradient_flows": [
        ("is detached from the logits", lambda x, y: good(x.detach(), y)),
        ("the entropy is detached", with_entropy(lambda x, t: entropy_of(x.detach() / t))),
        ("the logsumexp is detached", beside("logsumexp", lambda x, t: (x.detach() / t).logsumexp(-1))),
    ],
    "gradient_sign": [
        (GRADIENT + "is of the loss", lambda x, y: _Replaced.apply(positive(x, y), good(x, y).detach())),
        (GRADIENT + "takes the upstream gradient without its sign", with_gradient(of_the_saved(torch.abs))),
    ],
    "gradient_error": [
        (GRADIENT + "lacks the division by the temperature", temperature_missing_in_the_gradient),
        (GRADIENT + "takes the upstream gradient for 1", upstream_gradient_taken_as_one),
        *(
            (GRADIENT + words, with_gradient(of_the_saved(change)), PROBLEM._replace(temperature="none"))
            for words, change in (
                ("clamps the upstream gradient to 0.5", lambda g: g.clamp(-0.5, 0.5)),
                ("leaves out a negative upstream gradient", lambda g: g.clamp(min=0.0)),
                ("takes the sign alone of the upstream gradient", torch.sign),
                ("rounds the upstream gradient to bfloat16", lambda g: g.bfloat16().float()),
            )
        ),
        *(
            ("loses labels that are nearly certain", with_gradient(rounds_probabilities), PROBLEM._replace(dtype=dtype))
            for dtype in (torch.bfloat16, torch.float16)
        ),
        (GRADIENT + "has a factor in each row", with_gradient(clips_the_norm_of_each_row)),
        ("the second backward", with_gradient(overwrites_probabilities, keeps_probabilities)),
        ("reads the upstream gradient of .sum().backward()", with_gradient(of_the_saved(as_contiguous))),
        ("the gradient is wrong where it comes through the entropy", entropy_without_a_gradient_of_its_own),
        ("the gradient is wrong where it comes through the logsumexp", logsumexp_that_brings_the_label_along),
        (
            "keeps what backward needs in one place",
            with_gradient(lambda ctx, upstream: right_gradient(*_last, upstream), remembers_the_last_call),
        ),
        (
            "the gradient is wrong where the upstream gradient is small",
            with_gradient(of_the_saved(lambda g: g.where(g.abs() > 2.0**-16, 0.0))),
        ),
        (
            "takes the gradient of logits that were changed in place",
            with_gradient(lambda ctx, upstream: right_gradient(ctx.logits, ctx.labels, upstream)),
        ),
    ],
    "zero_upstream": [
        ("gives a gradient, or NaN, where the upstream", with_gradient(of_the_saved(lambda g: g.square() / g))),
        (
            "gives a gradient, or NaN, where the upstream",
            with_gradient(of_the_saved(lambda g: g.masked_fill(g == 0, 1.0))),
        ),
    ],
    "random_state": [
        ("seeds torch's random generators, Python's or NumPy's", seeds_the_generator),
        ("seeds torch's random generators, Python's or NumPy's", seeds_numpy),
    ],
    "modes": [
        ("changes a mode of torch for all that comes after", makes_float64_the_default),
        ("changes a mode of torch for all that comes after", turns_gradients_off),
        ("changes a mode of torch for all that comes after", lowers_the_precision_of_products),
    ],
    "gradient_row_sum": [(GRADIENT + "leaves out the softmax", gradient_at_the_label_alone)],
    "ignored_rows": [
        ("takes -100, or all negative labels, for ignored", ignores_100_whatever_it_is_told),
        ("does not know ignored labels: -100 counts as token 0", lambda x, y: good(x, y.clamp(min=0))),
        ("does not give an entropy of 0 for labels of -100", entropy_of_ignored_rows),
        ("does not give an argmax of -1 for labels of -100", beside("argmax", OTHERS["argmax"], lambda y, *_: y)),
    ],
    "nan_pattern": [
        ("subtracts the largest logit of a part of the columns", maximum_of_the_first_columns),
        ("gives NaN as the entropy where a logit is -inf", with_entropy(entropy_that_multiplies_0_and_infinity)),
        (
            "does not subtract the largest logit",
            lambda x, y: zero_ignored(label_values(x, y) - x.exp().sum(-1).log(), y),
        ),
        ("makes a number of a row that holds NaN", lambda x, y: good(x, y).nan_to_num(nan=0.0)),
        ("makes a number of a label at -inf", lambda x, y: good(x.clamp(min=-1e4), y)),
        (
            "reads the rows of the logits as if",
            lambda x, y: good(x.as_strided(x.shape, (x.shape[-1] * x.stride(-1), x.stride(-1))), y),
        ),
        ("reads the columns of the logits as if", lambda x, y: good(x.as_strided(x.shape, (x.stride(0), 1)), y)),
        ("does not take a batch all of whose labels are ignored", divides_by_the_number_of_labels),
        (ORDINARY + "shifted up by 1e4", scales_before_it_converts, PROBLEM._replace(dtype=torch.float16)),
    ],
    "inputs_changed": [
        ("divides the logits by the temperature in place", divides_the_logits_in_place),
        ("writes over its arguments", ignored_labels_overwritten),
        ("changes the shape or requires_grad of the logits", asks_for_a_gradient),
        ("changes the shape or requires_grad of the labels", labels_with_a_dimension_more),
        ("writes over its arguments", with_gradient(doubles_what_came_from_above)),
        ("writes the gradient over the logits, unasked", lambda x, y: gradient_over_the_logits(x, y)),
    ],
    "version_counter": [
        (
            "writes the gradient over the logits without telling autograd",
            gradient_over_the_logits,
            PROBLEM._replace(inplace_backward=True),
        )
    ],
    "outside_write": [("writes beyond what it may", writes_past_the_end)],
    "stale_result": [(AGAIN, one_buffer_for_all_results), (AGAIN, one_buffer_for_all_gradients)],
    # verl's and TRL's bfloat16 path: log-probabilities in steps of 1/16.
    "dtype": [
        ("returns the argmax as int32", beside("argmax", OTHERS["argmax"], lambda *of: of_rows(*of).int())),
        (
            "returns bfloat16, which has steps of 0.062 nats at -10",
            lambda x, y: good(x, y).to(x.dtype),
            PROBLEM._replace(dtype=torch.bfloat16),
        ),
        ("returns float64: give float32", lambda x, y: good(x.double(), y).double()),
    ],
    "shape": [
        ("returns the mean of the log-probabilities over the batch", lambda x, y: good(x, y).mean()),
        # torchtune's get_batch_log_probs, for one sequence.
        ("returns the sum of the log-probabilities over the batch", lambda x, y: good(x, y).sum()),
        ("keeps a trailing dimension of 1", lambda x, y: good(x, y).unsqueeze(-1)),
        ("shifts the labels itself, so that logits [N, V] and labels [N] give N - 1", lambda x, y: good(x[:-1], y[1:])),
    ],
    "runs": [
        ("has no ignored labels, and raises RuntimeError for those of -100", without_ignored),
        ('takes logits and labels the other way round: say call="f(labels, logits)" (--call)', labels_first),
        ("raises for an ordinary input: SystemExit: 0", leaves_the_program),
        ("raises for an empty batch (ValueError: need at least one row", needs_a_row),
    ],
    # flash-attn's cross_entropy_loss returns (losses, z_losses).
    "result_type": [("returns 2 results", lambda x, y: (good(x, y), None))],
    "grad_mode_bits": [("takes another path where a gradient is needed", another_path_without_gradient)],
}
WRONG_FUNCTIONS = [Wrong(reason, *rest) for reason, of_reason in OF_REASONS.items() for rest in of_reason]
