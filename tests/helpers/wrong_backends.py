"""Functions that are wrong on purpose, each in a way that has been seen in the wild or is easily made, and right ones.

Each takes (logits, labels) or more of the check's options.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compiled_logprobs.problem import Problem

IGNORE_INDEX = -100


@dataclass(frozen=True)
class WrongBackend:
    call: Callable[..., Any]
    reason: str
    """The check that has to fail, one of the keys of `compiled_logprobs.check.report.MEANING`."""
    cause: str
    """How the first of the likely causes has to begin."""
    problem: Problem
    """One that it is wrong for."""


PROBLEM = Problem("cpu", 12, 3001, torch.float32, needs_grad=True, entropy=True, temperature="number")
WRONG_BACKENDS: list[WrongBackend] = []
RIGHT_BACKENDS: list[Callable[..., Any]] = []


def wrong(reason: str, cause: str, **changes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function; `changes` are to `PROBLEM`, where that does not show the mistake."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        WRONG_BACKENDS.append(WrongBackend(function, reason, cause, PROBLEM._replace(**changes)))
        return function

    return register


def right(function: Callable[..., Any]) -> Callable[..., Any]:
    RIGHT_BACKENDS.append(function)
    return function


def good(logits: Tensor, labels: Tensor) -> Tensor:
    return -functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE_INDEX)


def entropy_of(x: Tensor) -> Tensor:
    log_p = torch.log_softmax(x, -1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)


def label_values(x: Tensor, labels: Tensor) -> Tensor:
    return x.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


# --- right ones, of different build -----------------------------------------------------------------------------------


@right
def negated_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """EasyR1's fallback since its correction."""
    return good(logits, labels)


@right
def label_logit_minus_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """verl's and TRL's idiom in float32."""
    x = logits.float()
    keep = labels != IGNORE_INDEX
    # Ignored rows go before the sum: a NaN in them would come back through a product with 0.
    return torch.where(
        keep, label_values(x, labels) - torch.logsumexp(x.masked_fill(~keep.unsqueeze(-1), 0.0), -1), 0.0
    )


@right
def log_softmax_and_gather(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    return label_values(log_p, labels).masked_fill(labels == IGNORE_INDEX, 0.0)


@right
def nll_loss_in_chunks_of_three_rows(logits: Tensor, labels: Tensor) -> Tensor:
    parts = [good(logits[i : i + 3], labels[i : i + 3]) for i in range(0, len(labels), 3)]
    return torch.cat(parts) if parts else good(logits, labels)


@right
def float64_throughout(logits: Tensor, labels: Tensor, temperature: float = 1.0, return_entropy: bool = False) -> Any:
    x = logits.double() / temperature
    ignored = labels == IGNORE_INDEX
    picked = label_values(torch.log_softmax(x, -1), labels).masked_fill(ignored, 0.0).float()
    if not return_entropy:
        return picked
    return picked, entropy_of(x).masked_fill(ignored, 0.0).float()


@right
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
    out = torch.where((maximum == -math.inf).squeeze(-1), torch.nan, out).masked_fill(labels == IGNORE_INDEX, 0.0)
    return _Replaced.apply(good(logits, labels), out.detach())


class _Replaced(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


# --- sign -------------------------------------------------------------------------------------------------------------


@wrong("log_prob_sign", "returns the loss: positive where a log-probability must be negative")
def easyr1_fallback_before_its_correction(logits: Tensor, labels: Tensor) -> Tensor:
    """hiyouga/EasyR1 until June 2025: the loss, where the flash-attn path returned minus the loss."""
    return functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE_INDEX)


@wrong("log_prob_sign", "returns the probability, not its logarithm")
def probability_not_its_logarithm(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels).exp().masked_fill(labels == IGNORE_INDEX, 0.0)


@wrong("log_prob_sign", "lets rounding carry a log-probability above 0")
def rounding_leaks_a_positive_value(logits: Tensor, labels: Tensor) -> Tensor:
    """The maximum left out of the sum and the sum rounded: certain tokens come out above 0."""
    return good(logits, labels) + torch.where(labels == IGNORE_INDEX, 0.0, 1e-7)


@wrong("entropy_sign", "returns the sum of p log p as the entropy")
def negative_entropy(logits: Tensor, labels: Tensor, return_entropy: bool = False) -> Any:
    """Sum of p log p, as one framework names its entropy."""
    return (good(logits, labels), -entropy_of(logits.float())) if return_entropy else good(logits, labels)


# --- value ------------------------------------------------------------------------------------------------------------


@wrong("log_prob_error", "takes the label of the next row")
def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels.roll(-1))


@wrong("log_prob_error", "ignores the temperature")
def temperature_ignored(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return good(logits, labels)


@wrong("log_prob_error", "multiplies by the temperature instead of dividing")
def multiplied_by_temperature(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return good(logits.float() * temperature, labels)


@wrong("log_prob_error", "divides by the temperature twice")
def twice_tempered(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The caller divides, and so does the function."""
    return good(logits.float() / temperature / temperature, labels)


@wrong("log_prob_error", "divides the log-probabilities by the temperature, and not the logits")
def tempered_afterwards(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """PrimeIntellect-ai/prime-rl#697."""
    return good(logits, labels) / temperature


@wrong("log_prob_error", "computes in half precision")
def temperature_in_half_precision(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return good((logits.bfloat16() / temperature).float(), labels)


@wrong("log_prob_error", "computes in half precision")
def half_precision_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return -functional.cross_entropy(logits.bfloat16(), labels, reduction="none").float()


@wrong("log_prob_error", "leaves out the last columns, from 2048 on")
def last_block_forgotten(logits: Tensor, labels: Tensor) -> Tensor:
    """Columns beyond the last whole block of 1024 are left out of the sum."""
    vocab = logits.shape[-1]
    x = logits.float()
    keep = torch.arange(vocab) < max(1024, vocab // 1024 * 1024)
    total = x.masked_fill(~keep, -math.inf).logsumexp(-1)
    return (label_values(x, labels) - total).masked_fill(labels == IGNORE_INDEX, 0.0)


@wrong("log_prob_error", "right for ordinary inputs, and wrong for these: ", vocab=32771)
def first_token_wins(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels read as int16: those from 32768 on wrap around."""
    return good(logits, torch.where(labels > 32767, 0, labels))


@wrong("log_prob_error", "right for ordinary inputs, and wrong for these: ")
def last_row_forgotten(logits: Tensor, labels: Tensor) -> Tensor:
    """A grid one program short, where there are many rows."""
    out = good(logits, labels)
    return torch.cat([out[:-1], torch.zeros(1)]) if len(labels) > 7 else out


@wrong("log_prob_error", "returns logarithms to base 2")
def base_two_logarithm(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels) / math.log(2)


@wrong("log_prob_error", "smooths the labels, by 0.001")
def smoothed_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return -functional.cross_entropy(
        logits.float(), labels, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=1e-3
    )


@wrong("log_prob_error", "right for ordinary inputs, and wrong for these: one row")
def single_row_special_case(logits: Tensor, labels: Tensor) -> Tensor:
    """Wrong only where N is 1."""
    return good(logits, labels) * (0.9 if len(labels) == 1 else 1.0)


_calls = 0


@wrong("log_prob_error", "gives other numbers when it is called again")
def wrong_on_every_second_call(logits: Tensor, labels: Tensor) -> Tensor:
    global _calls
    _calls += 1
    return good(logits, labels) * (1.0 if _calls % 2 else 1.01)


_remembered: dict[tuple[int, torch.Size], Tensor] = {}


@wrong("log_prob_error", "gives the old result for new values in the same memory")
def remembered_by_address(logits: Tensor, labels: Tensor) -> Tensor:
    """A cached result is returned for other values in the same memory."""
    key = (logits.data_ptr(), logits.shape)
    value = good(logits, labels)
    if key not in _remembered:
        _remembered[key] = value.detach().clone()
    return _Replaced.apply(value, _remembered[key].clone())


@wrong("log_prob_rmse", "loses digits that float32 has")
def every_row_slightly_off(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-sum-exp kept in one float32 that had a large number added and subtracted."""
    return ((good(logits, labels) - 1e4) + 1e4).clamp(max=0.0)


@wrong("entropy_error", "the entropy is that of the logits before the temperature")
def entropy_without_temperature(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, return_entropy: bool = False
) -> Any:
    log_probs = good(logits.float() / temperature, labels)
    entropy = entropy_of(logits.float()).masked_fill(labels == IGNORE_INDEX, 0.0)
    return (log_probs, entropy) if return_entropy else log_probs


# --- gradient ---------------------------------------------------------------------------------------------------------


@wrong("gradient_flows", "is detached from the logits")
def detached(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits.detach(), labels)


@wrong("gradient_flows", "the entropy is detached")
def entropy_detached(logits: Tensor, labels: Tensor, return_entropy: bool = False) -> Any:
    if not return_entropy:
        return good(logits, labels)
    return good(logits, labels), entropy_of(logits.float().detach()).masked_fill(labels == IGNORE_INDEX, 0.0)


@wrong("gradient_sign", "the values are right, and the gradient is of the loss")
def gradient_of_the_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The value of the log-probability with the gradient of the cross entropy."""
    return _Replaced.apply(-good(logits, labels), good(logits, labels).detach())


@wrong("gradient_error", "the values are right, and the gradient lacks the division by the temperature")
def temperature_missing_in_the_gradient(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    scaled = logits.float() / temperature
    return good(scaled.detach() + (logits.float() - logits.float().detach()), labels)


@wrong("gradient_row_sum", "the values are right, and the gradient leaves out the softmax")
def gradient_of_the_label_alone(logits: Tensor, labels: Tensor) -> Tensor:
    """p - onehot with the softmax forgotten."""
    picked = label_values(logits.float(), labels)
    return _Replaced.apply(picked.masked_fill(labels == IGNORE_INDEX, 0.0), good(logits, labels).detach())


@wrong("gradient_error", "the values are right, and the gradient takes the upstream gradient for 1")
def upstream_gradient_taken_as_one(logits: Tensor, labels: Tensor) -> Tensor:
    """Right for a plain sum, and for nothing else."""

    class OnesInstead(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return torch.ones_like(gradients[0])

    return OnesInstead.apply(good(logits, labels))


# --- special rows ---------------------------------------------------------------------------------------------------


@wrong("ignored_rows", "does not know ignored labels: -100 counts as token 0")
def ignored_label_counted_as_token_0(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels.clamp(min=0))


@wrong("nan_pattern", "makes a number of a row that holds NaN")
def nan_turned_into_zero(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels).nan_to_num(nan=0.0)


@wrong("nan_pattern", "makes a number of a label at -inf")
def infinite_logits_clamped(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits.float().clamp(min=-1e4), labels)


# --- memory -----------------------------------------------------------------------------------------------------------


@wrong("inputs_changed", "divides the logits by the temperature in place")
def divides_the_logits_in_place(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """OpenRLHF's and TRL's callers: logits.div_(temperature)."""
    with torch.no_grad():
        logits.detach().div_(temperature)
    return good(logits, labels)


@wrong("inputs_changed", "writes over its arguments")
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


def _over_the_logits(logits: Tensor, gradient: Tensor) -> Tensor:
    return logits.data  # as a raw kernel writes: no version counter hears of it


@wrong("inputs_changed", "writes the gradient over the logits, unasked")
def gradient_over_the_logits_unasked(logits: Tensor, labels: Tensor) -> Tensor:
    return _GradientInto.apply(logits, labels, _over_the_logits)


@wrong("version_counter", "writes the gradient over the logits without telling autograd", inplace_backward=True)
def gradient_over_the_logits_unannounced(logits: Tensor, labels: Tensor, inplace_backward: bool = False) -> Tensor:
    """What flash-attn's and Liger's kernels do by themselves."""
    return _GradientInto.apply(logits, labels, _over_the_logits) if inplace_backward else good(logits, labels)


@wrong("outside_write", "writes beyond what it may")
def writes_past_the_end(logits: Tensor, labels: Tensor) -> Tensor:
    """A kernel whose last block has no mask."""
    if len(labels):
        end = logits.detach().as_strided(
            (1,), (1,), logits.storage_offset() + (len(labels) - 1) * logits.stride(0) + logits.shape[-1]
        )
        end.zero_()
    return good(logits, labels)


@wrong("nan_pattern", "right for ordinary inputs, and wrong for these: strided and misaligned")
def reads_rows_as_if_contiguous(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits.as_strided(logits.shape, (logits.shape[-1], 1)), labels)


_buffer = torch.empty(0)


@wrong("stale_result", "hands out memory that a later call writes again")
def one_buffer_for_all_results(logits: Tensor, labels: Tensor) -> Tensor:
    global _buffer
    out = good(logits, labels)
    if _buffer.shape != out.shape:
        _buffer = torch.empty_like(out)
    _buffer.copy_(out.detach())
    return _Replaced.apply(out, _buffer)


_gradient_buffer = torch.empty(0)


def _in_one_buffer(logits: Tensor, gradient: Tensor) -> Tensor:
    global _gradient_buffer
    if _gradient_buffer.shape != gradient.shape or _gradient_buffer.dtype != gradient.dtype:
        _gradient_buffer = torch.empty_like(gradient)
    return _gradient_buffer


@wrong("stale_result", "hands out memory that a later call writes again")
def one_buffer_for_all_gradients(logits: Tensor, labels: Tensor) -> Tensor:
    return _GradientInto.apply(logits, labels, _in_one_buffer)


@wrong("runs", "raises for an ordinary input: SystemExit: 0")
def leaves_the_program(logits: Tensor, labels: Tensor) -> Tensor:
    raise SystemExit(0)


# --- kind -------------------------------------------------------------------------------------------------------------


@wrong("dtype", "returns bfloat16, which has steps of 0.062 nats at -10", dtype=torch.bfloat16)
def result_in_the_dtype_of_the_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """verl's and TRL's bfloat16 path: log-probabilities in steps of 1/16."""
    return good(logits, labels).to(logits.dtype)


@wrong("shape", "returns the mean of the log-probabilities over the batch")
def mean_over_the_batch(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels).mean()


@wrong("shape", "keeps a trailing dimension of 1")
def trailing_dimension(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits, labels).unsqueeze(-1)


@wrong("shape", "shifts the labels itself, so that logits [N, V] and labels [N] give N - 1 results")
def shifts_itself(logits: Tensor, labels: Tensor) -> Tensor:
    return good(logits[:-1], labels[1:])


@wrong("runs", "has no ignored labels, and raises RuntimeError for those of -100")
def without_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None]).squeeze(-1)


@wrong("runs", 'takes logits and labels the other way round: say --call "f(labels, logits)"')
def labels_first(labels: Tensor, logits: Tensor) -> Tensor:
    return good(logits, labels)


@wrong("result_type", "returns 2 results")
def a_tuple_instead_of_a_tensor(logits: Tensor, labels: Tensor) -> Any:
    """flash-attn's cross_entropy_loss returns (losses, z_losses)."""
    return good(logits, labels), None


@wrong("runs", "raises for an empty batch (ValueError: need at least one row)")
def crashes_on_no_rows(logits: Tensor, labels: Tensor) -> Tensor:
    if not len(labels):
        raise ValueError("need at least one row")
    return good(logits, labels)


@wrong("grad_mode_bits", "takes another path where a gradient is needed")
def another_path_without_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Old log-probabilities from one kernel, new ones from another: PPO ratios that do not start at 1."""
    if torch.is_grad_enabled():
        return good(logits, labels)
    x = logits.float()
    return (label_values(x, labels) - x.logsumexp(-1)).masked_fill(labels == IGNORE_INDEX, 0.0).clamp(max=0.0)
