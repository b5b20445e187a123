"""Functions from hidden states to check: right ones of different build, and wrong ones, as easily made in chunks.

Each takes (hidden, weight, labels), and more of the check's options.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compiled_logprobs.check.hidden_function import with_all_from_hidden
from compiled_logprobs.problem import Problem

IGNORE_INDEX = -100
CHUNK = 64
PROBLEM = with_all_from_hidden(
    Problem("cpu", 12, 301, torch.float32, needs_grad=True, hidden=64, weight_grad=True)
)._replace(logsumexp=False, argmax=False)


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Any, logit_scale: float, softcap: float | None
) -> Tensor:
    """As they are commonly written, a bias added apart, and in float32 afterwards."""
    z = (hidden @ weight.mT if bias is None else hidden @ weight.mT + bias).float() * logit_scale
    x = z if softcap is None else softcap * torch.tanh(z / softcap)
    return x / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)


def whole(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Any:
    """All logits at once, in plain torch."""
    log_p = torch.log_softmax(logits_of(hidden, weight, bias, temperature, logit_scale, softcap), -1)
    ignored = labels == IGNORE_INDEX
    out = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(ignored, 0.0)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (out, entropy.masked_fill(ignored, 0.0)) if return_entropy else out


def checkpointed(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Chunks of rows, whose logits a checkpoint computes again; autograd adds up the weight's gradient in float32."""
    wide = weight.float()

    def of_chunk(h: Tensor, y: Tensor) -> Tensor:
        return whole(h, wide.to(h.dtype), y, None, temperature)

    chunks = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([checkpoint(of_chunk, h, y, use_reentrant=False) for h, y in chunks])


def of_torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own, which rounds its results where it is given half precision."""
    if not hasattr(functional, "linear_cross_entropy"):  # before 2.13
        return -functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    return -functional.linear_cross_entropy(hidden, weight, labels, reduction="none")


class _Chunked(torch.autograd.Function):
    """Chunks of rows, forward and backward, as TRL and Liger have them; wrong in one way, if one is named."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, t: Any, scale: float, cap: Any, wrong: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options, ctx.wrong = (t, scale, cap), wrong
        out, entropy = torch.zeros(2, len(labels))
        for n in _chunks(len(labels), wrong):
            y = labels[: n.stop - n.start] if wrong == "labels of the first chunk" else labels[n]
            log_p = _Chunked.log_probs(hidden[n], weight, bias, n, ctx.options, wrong)
            ignored = labels[n] == IGNORE_INDEX
            out[n] = log_p.gather(-1, y.clamp(min=0)[:, None]).squeeze(-1).masked_fill(ignored, 0.0)
            entropy[n] = -(log_p.exp() * log_p).sum(-1)
        if wrong == "entropy of the chunk before":
            entropy[CHUNK:] = entropy[:-CHUNK].clone()
        if wrong == "writes over hidden" and len(hidden):
            hidden.mul_(2.0).round_()
        if wrong == "writes over weight":
            weight.div_(1.5)
        return out, entropy.masked_fill(labels == IGNORE_INDEX, 0.0)

    @staticmethod
    def log_probs(hidden: Tensor, weight: Tensor, bias: Any, n: slice, options: Any, wrong: str) -> Tensor:
        t, scale, cap = options
        t = t[n] if isinstance(t, Tensor) else t
        bias = None if wrong == "no bias" else bias
        if wrong == "a last block without its mask":  # verl-project/verl#2899: what is not there is read as 0
            beyond = -len(weight) % 1024
            weight = functional.pad(weight, (0, 0, 0, beyond))
            bias = None if bias is None else functional.pad(bias, (0, beyond))
        if wrong == "cap after temperature" and cap is not None:
            return torch.log_softmax(cap * torch.tanh(logits_of(hidden, weight, bias, t, scale, None) / cap), -1)
        return torch.log_softmax(logits_of(hidden, weight, bias, t, scale, cap), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (hidden, weight, bias, labels), (t, scale, cap), wrong = ctx.saved_tensors, ctx.options, ctx.wrong
        of_hidden = torch.zeros_like(hidden)
        in_half = wrong == "weight added up in bfloat16"
        of_weight = torch.zeros_like(weight, dtype=torch.bfloat16 if in_half else torch.float32)
        of_bias = torch.zeros(len(weight))
        ignored = labels == IGNORE_INDEX
        beside = torch.zeros_like(ignored)
        beside[1:] |= ignored[:-1]
        beside[:-1] |= ignored[1:]
        for n in _chunks(len(labels), wrong):
            t_n = t[n, None] if isinstance(t, Tensor) else t
            log_p = _Chunked.log_probs(hidden[n], weight, bias, n, ctx.options, wrong)[:, : len(weight)]
            p = log_p.exp()
            g, h = (x[n, None].masked_fill(ignored[n, None], 0.0) for x in gradients)
            if wrong == "mean from above":
                g = gradients[0].mean() * (~ignored[n, None]).float()
            dx = -g * p - h * p * (log_p - (p * log_p).sum(-1, keepdim=True))
            y = labels[: n.stop - n.start] if wrong == "labels of the first chunk" else labels[n]
            dx.scatter_add_(-1, y.clamp(min=0)[:, None], g)
            if wrong == "filters":
                dx[dx.abs() < 2.0**-12] = 0.0
            dx = dx / t_n / (t_n if wrong == "temperature twice" else 1.0)
            slope = 1.0
            if cap is not None:
                z = functional.linear(hidden[n], weight, bias).float() * scale
                slope = 1.0 - torch.tanh(z / cap).square()
            if wrong == "cap after temperature" and cap is not None:
                slope = 1.0 - torch.tanh(z / t_n / cap).square()
            dz = (dx * slope * scale).to(hidden.dtype)
            to_hidden = dz
            if wrong == "no slope in hidden":
                to_hidden = (dx * scale).to(hidden.dtype)
            if wrong == "no scale in hidden":
                to_hidden = (dx * slope).to(hidden.dtype)
            if wrong == "hidden thrice":
                to_hidden = 3.0 * dz
            of_hidden[n] = to_hidden @ weight
            to_weight = dz.masked_fill(beside[n, None], 0.0) if wrong == "neighbours of ignored rows" else dz
            of_weight += (to_weight.T @ hidden[n]).to(of_weight.dtype)
            of_bias += dz.float().sum(0)
        if wrong == "frozen weight" and not ctx.needs_input_grad[1]:
            weight.grad = of_weight.to(weight.dtype)
        return of_hidden, of_weight.to(weight.dtype), None if bias is None else of_bias.to(bias.dtype), *[None] * 5


def _chunks(rows: int, wrong: str) -> list[slice]:
    if wrong == "chunks without the last":
        rows = rows // CHUNK * CHUNK if rows > CHUNK else rows
    longer = CHUNK + (wrong == "chunks that overlap")
    return [slice(start, min(start + longer, rows)) for start in range(0, rows, CHUNK)]


def chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    *,
    wrong: str = "",
) -> Any:
    results: Any = _Chunked.apply(hidden, weight, bias, labels, temperature, logit_scale, softcap, wrong)
    log_probs, entropy = results
    log_probs = -log_probs if wrong == "the loss" else log_probs
    return (log_probs, entropy) if return_entropy else log_probs


RIGHT_FUNCTIONS: list[Callable[..., Any]] = [whole, checkpointed, of_torch, chunked]


class WrongFromHidden(NamedTuple):
    wrong: str
    """What `chunked` does then."""
    reason: str
    """The check that has to fail, one of the keys of `compiled_logprobs.check.report.MEANING`."""
    cause: str
    """How the first of the likely causes has to begin."""
    dtype: torch.dtype = torch.float32

    @property
    def function(self) -> Callable[..., Any]:
        return partial(chunked, wrong=self.wrong)


IN_WEIGHT, IN_HIDDEN = "the gradient in the weight ", "the gradient in the hidden states "
WRONG_FUNCTIONS = [
    WrongFromHidden("neighbours of ignored rows", "weight_gradient_error", IN_WEIGHT + "lacks the rows next to"),
    WrongFromHidden("cap after temperature", "log_prob_error", "caps the logits softly after the temperature"),
    WrongFromHidden("chunks that overlap", "weight_gradient_rmse", IN_WEIGHT + "counts 5 of 333 rows twice"),
    WrongFromHidden("chunks without the last", "log_prob_error", "gives 0 for the last rows, from row 320 of 333 on"),
    WrongFromHidden(
        "weight added up in bfloat16",
        "weight_gradient_rmse",
        "rounds the gradient of the weight more often than once",
        torch.bfloat16,
    ),
    WrongFromHidden("temperature twice", "gradient_error", "the values are right, and the gradient divides by the"),
    WrongFromHidden("a last block without its mask", "log_prob_error", "counts columns that are not there"),
    WrongFromHidden("no bias", "bias_gradient_error", "leaves the bias out"),
    WrongFromHidden("entropy of the chunk before", "entropy_error", "gives rows the entropy of the chunk before"),
    WrongFromHidden("filters", "gradient_error", "the values are right, and the gradient is 0 where it is small"),
    WrongFromHidden("no slope in hidden", "hidden_gradient_error", IN_HIDDEN + "lacks the slope of the soft cap"),
    WrongFromHidden("no scale in hidden", "hidden_gradient_error", IN_HIDDEN + "lacks the scale of the logits"),
    WrongFromHidden("hidden thrice", "hidden_gradient_error", IN_HIDDEN + "is 3 times what it should be"),
    WrongFromHidden("mean from above", "weight_gradient_error", "the values are right, and"),
    WrongFromHidden("frozen weight", "frozen_gradient", "writes a gradient into an output layer that requires none"),
    WrongFromHidden("labels of the first chunk", "log_prob_error", "takes the labels of the first chunk, of 64 rows"),
    WrongFromHidden("writes over hidden", "inputs_changed", "writes over the hidden states"),
    WrongFromHidden("writes over weight", "inputs_changed", "writes over the weight"),
    WrongFromHidden("the loss", "log_prob_sign", "returns the loss: positive"),
]
