"""Functions that are wrong in ways that were seen in public, each made anew from what is said there.

`source` is an issue or a pull request, as repository#number, of which the description, a review or a question says it;
or a public file that does what a log-probability must not.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compiled_logprobs.problem import Problem
from tests.helpers.functions_to_check import (
    GRADIENT,
    IGNORE_INDEX,
    PROBLEM,
    Wrong,
    entropy_of,
    good,
    label_values,
    with_entropy,
    zero_ignored,
)

BFLOAT16 = PROBLEM._replace(dtype=torch.bfloat16)
REPORTED_FUNCTIONS: list[Wrong] = []


def reported(reason: str, cause: str, source: str, problem: Problem = PROBLEM) -> Callable[[Any], Any]:
    """Enter a function, or what `beside` makes of it, into the list."""

    def enter(function: Any) -> Any:
        REPORTED_FUNCTIONS.append(Wrong(reason, cause, function, problem, source))
        return function

    return enter


# --- values -----------------------------------------------------------------------------------------------------------


def with_total(logits: Tensor, labels: Tensor, total: Tensor) -> Tensor:
    return zero_ignored(label_values(logits.float(), labels) - total, labels)


@reported("log_prob_error", "masks columns that are not there with a finite number", "unslothai/unsloth#10616")
def padding_at_minus_the_softcap(logits: Tensor, labels: Tensor) -> Tensor:
    """Columns beyond the vocabulary are masked before the logits are capped softly, and so are -30 instead of -inf."""
    filled = functional.pad(logits.float(), (0, -logits.shape[-1] % 1024), value=-30.0)
    return with_total(logits, labels, filled.logsumexp(-1))


@reported("log_prob_error", "multiplies the logits by tanh(logit / 30)", "unslothai/unsloth-zoo#593")
def softcap_with_a_factor_too_many(logits: Tensor, labels: Tensor) -> Tensor:
    """logits * tanh(logits / cap), where cap * tanh(logits / cap) was meant."""
    return good(logits.float() * torch.tanh(logits.float() / 30), labels)


@reported("log_prob_error", "adds a z-loss, 0.0001 times", "linkedin/Liger-Kernel#239")
def z_loss_in_the_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss includes the z-loss, also where that is returned separately."""
    return zero_ignored(good(logits, labels) - 1e-4 * logits.float().logsumexp(-1).square(), labels)


@reported("log_prob_error", "is off by -0.69315 in every row, -log 2", "NVIDIA/Megatron-LM#7452")
def gathered_logits_as_shards(logits: Tensor, labels: Tensor) -> Tensor:
    """Each of two ranks holds all columns and takes them for its shard, so that all are counted twice."""
    return with_total(logits, labels, torch.cat([logits, logits], -1).float().logsumexp(-1))


@reported(
    "log_prob_error",
    "normalises over one of 8 shards of the columns",
    "bigscience-workshop/Megatron-DeepSpeed#394",
)
def normalised_over_the_own_shard(logits: Tensor, labels: Tensor) -> Tensor:
    """With 8 ranks, the sum goes over the columns of the rank that has the label."""
    width = -(-logits.shape[-1] // 8)
    shards = torch.stack([shard.logsumexp(-1) for shard in logits.float().split(width, -1)], -1)
    return with_total(logits, labels, label_values(shards, labels.clamp(min=0) // width))


@reported("log_prob_error", "normalises over the rows, not over the vocabulary", "MicrosoftDocs/pytorchfundamentals#21")
def softmax_over_the_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """log_softmax over the first dimension."""
    return zero_ignored(label_values(torch.log_softmax(logits.float(), 0), labels), labels)


@reported("log_prob_error", "takes the softmax twice", "Lightning-Universe/lightning-bolts#654")
def softmax_twice(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities are given to a cross entropy, which takes them for logits."""
    return good(logits.float().softmax(-1), labels)


@reported("log_prob_error", "takes the logarithm of the sum twice", "PaddlePaddle/Paddle#53654")
def one_logarithm_too_many(logits: Tensor, labels: Tensor) -> Tensor:
    """A kernel for large vocabularies has an unexpected logarithm of what is one already."""
    x, maximum = logits.float(), logits.float().amax(-1)
    return with_total(logits, labels, maximum + (x - maximum[:, None]).logsumexp(-1).log())


@reported(
    "log_prob_error", "cuts log-probabilities off below -6.9078, a probability of 0.001", "DigiRL-agent/digirl#22"
)
def clamped_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities are clamped to [0.001, 0.99], which takes the gradient of nearly all tokens away."""
    return zero_ignored(label_values(logits.float().softmax(-1), labels).clamp(0.001, 0.99).log(), labels)


@reported("log_prob_error", "adds 1e-06 to the probability before the logarithm", "tensorforce/tensorforce#96")
def epsilon_in_the_logarithm(logits: Tensor, labels: Tensor) -> Tensor:
    """log(probability + epsilon), for numerical stability."""
    return zero_ignored((label_values(logits.float().softmax(-1), labels) + 1e-6).log().clamp(max=0.0), labels)


@reported(
    "nan_pattern", "takes the logarithm of a probability that has rounded to 0", "tenstorrent/pytorch2.0_ttnn#1341"
)
def logarithm_of_the_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """log(softmax(x)): -inf for a logit far below the largest one."""
    return zero_ignored(label_values(logits.float().softmax(-1), labels).log(), labels)


@reported("nan_pattern", "subtracts the largest logit of the batch, not of each row", "manassharma07/crysx_nn#7")
def maximum_of_the_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """The maximum is that of the whole array; rows far below it have a sum of 0. Large batches are safe, small not."""
    x = logits.float()
    special = x.masked_fill(x.isnan(), -math.inf)
    shift = special.detach().amax().clamp(min=-3e38) if x.numel() else torch.zeros(())
    return with_total(logits, labels, (x - shift).exp().sum(-1).log() + shift)


@reported("nan_pattern", "takes the largest logit to be 0 or more", "FlagGems, fused cross_entropy_loss of 5.0.2")
def maximum_that_starts_at_0(logits: Tensor, labels: Tensor) -> Tensor:
    """The running maximum starts at 0 instead of -inf: rows that lie below -104 have a sum of 0."""
    x = logits.float()
    shift = x.amax(-1).clamp(min=0.0)
    return with_total(logits, labels, (x - shift[:, None]).exp().sum(-1).log() + shift)


@reported("log_prob_error", "gives each row the result of the row before", "huggingface/trl#2733")
def results_rolled(logits: Tensor, labels: Tensor) -> Tensor:
    """The labels are shifted already, and the results are rolled once more."""
    return good(logits, labels).roll(1)


@reported("log_prob_error", "divides the logits by 0.9", "linkedin/Liger-Kernel, src/liger_kernel/ops/grpo_loss.py")
def a_temperature_by_default(logits: Tensor, labels: Tensor) -> Tensor:
    """fused_selective_log_softmax has a temperature of 0.9, unless another is given."""
    return good(logits.float() / 0.9, labels)


@reported("log_prob_error", "rounds the logits divided by the temperature to bfloat16", "radixark/miles#1554", BFLOAT16)
def divides_in_bfloat16(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The quotient of logits and temperature is rounded to the model's dtype, and converted to float32 afterwards."""
    return good(logits / temperature, labels)


@reported("log_prob_error", "rounds its results to bfloat16", "genlm/genlm-backend#66", BFLOAT16)
def results_in_bfloat16(logits: Tensor, labels: Tensor) -> Tensor:
    """Exact inside, and stored in the dtype of the logits; converted when it is too late."""
    return good(logits, labels).bfloat16().float()


@reported("nan_pattern", "normalises over the 50 largest logits alone", "NVIDIA-NeMo/RL#4154")
def filtered_by_top_k(logits: Tensor, labels: Tensor) -> Tensor:
    """The sampler's top-k is applied in training: -inf for labels outside."""
    x = logits.float()
    smallest = x.topk(min(50, x.shape[-1]), -1).values[:, -1:]
    return good(x.masked_fill(x < smallest, -math.inf), labels)


@reported("log_prob_error", "normalises over the tokens that make up 0.9", "huggingface/trl#6789")
def filtered_by_top_p(logits: Tensor, labels: Tensor) -> Tensor:
    """The sampler's log-probabilities, renormalised over what top-p leaves, in the place of those of all tokens."""
    ordered, order = logits.float().sort(-1, descending=True)
    p = ordered.softmax(-1)
    dropped = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= 0.9)
    return good(logits.float().masked_fill(dropped, -math.inf), labels)


@reported(
    "log_prob_error", "returns 0.08333 times the log-probability: divided by the rows", "linkedin/Liger-Kernel#230"
)
def divided_by_the_number_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The kernel divides by the labels that count, as for a mean, where no reduction is asked for."""
    return good(logits, labels) / (labels != IGNORE_INDEX).sum().clamp(min=1)


@reported("log_prob_error", "is right where a gradient is needed, and gives 0", "linkedin/Liger-Kernel#507")
def nothing_without_a_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """0 for logits that do not require a gradient."""
    return good(logits, labels) if logits.requires_grad else torch.zeros(len(labels))


@reported("log_prob_error", "gives 0 for label 0: takes it for one to ignore", "wyf3/llm_related#33")
def the_padding_token_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    """Label 0 stands for padding, though it is a token as well."""
    return good(logits, labels.masked_fill(labels == 0, IGNORE_INDEX))


@reported("ignored_rows", "gives 1 for labels of -100, where 0 is expected", "allenai/open-instruct#1817")
def a_sentinel_for_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    """Ignored labels give 1.0, which is to be seen and masked later."""
    return good(logits, labels).masked_fill(labels == IGNORE_INDEX, 1.0)


@reported("nan_pattern", "makes a number of a label at -inf", "NVIDIA-NeMo/RL#2053")
def minus_infinity_as_zero(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels outside top-k have -inf, which becomes 0, as of a certain token, and counts on."""
    out = good(logits, labels)
    return torch.where(out.isneginf(), 0.0, out)


@reported(
    "nan_pattern",
    "gives NaN where a whole block of columns is -inf",
    "Dao-AILab/flash-attention#1930",
    PROBLEM._replace(masked_logits=True),
)
def blocks_of_minus_infinity(logits: Tensor, labels: Tensor, masked_logits: bool = False) -> Tensor:
    """A running maximum of -inf is subtracted from -inf."""
    x, maximum, total = logits.float(), torch.full((len(logits), 1), -math.inf), torch.zeros(len(logits), 1)
    for block in x.split(1024, -1):
        new = torch.maximum(maximum, block.amax(-1, keepdim=True))
        total = total * (maximum - new).exp() + (block - new).exp().sum(-1, keepdim=True)
        maximum = new
    return with_total(logits, labels, (total.log() + maximum).squeeze(-1))


@reported("runs", "raises for rows with memory between them (RuntimeError: view size", "allenai/open-instruct#1139")
def flattened_by_view(logits: Tensor, labels: Tensor) -> Tensor:
    """view instead of reshape, for logits that are a slice of the model's."""
    places = torch.arange(len(labels)) * logits.shape[-1] + labels.clamp(min=0)
    return zero_ignored(logits.view(-1)[places].float() - logits.float().logsumexp(-1), labels)


# --- what is returned beside ------------------------------------------------------------------------------------------


class _WithoutAGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return entropy_of(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros(1, 1).expand(len(gradients[0]), PROBLEM.vocab)


@reported("gradient_error", "the entropy's gradient is 0: what comes from above it is dropped", "huggingface/trl#6625")
@with_entropy
def entropy_whose_gradient_is_dropped(x: Tensor, temperature: float) -> Tensor:
    """backward takes the gradient of the entropy as an argument, and does not use it."""
    return _WithoutAGradient.apply(x / temperature)


@reported("nan_pattern", "the entropy's gradient is NaN where a logit is -inf", "huggingface/trl#7252")
@with_entropy
def entropy_mended_afterwards(x: Tensor, temperature: float) -> Tensor:
    """nan_to_num on 0 * -inf: the value is right, and backward still multiplies 0 with infinity."""
    log_p = torch.log_softmax(x / temperature, -1)
    special = log_p.isnan().any(-1)
    return (-(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(-1)).masked_fill(special, math.nan)


@reported("runs", "raises in the entropy's backward (RuntimeError: one of the variables", "huggingface/trl#7125")
@with_entropy
def entropy_that_overwrites_what_backward_needs(x: Tensor, temperature: float) -> Tensor:
    """exp(log p), whose result backward needs, multiplied in place."""
    log_p = torch.log_softmax(x / temperature, -1)
    special = (log_p == -math.inf) | log_p.isnan()
    return -log_p.exp().mul_(log_p.masked_fill(special, 0.0)).sum(-1)


@reported("entropy_error", "returns minus the log-probability of the label as the entropy", "huggingface/trl#2448")
def entropy_of_the_sampled_token(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, return_entropy: bool = False
) -> Any:
    """An estimate from one sample that is called the entropy."""
    out = good(logits / temperature, labels)
    return (out, -out) if return_entropy else out


@reported("entropy_error", "gives each row the entropy of the row after", "PrimeIntellect-ai/prime-rl#1525")
@with_entropy
def entropy_one_row_off(x: Tensor, temperature: float) -> Tensor:
    """Log-probabilities are shifted, and entropies are not."""
    return entropy_of(x / temperature).roll(-1)


@reported("entropy_error", "computes the entropy in half precision", "verl-project/verl, torch_functional.py", BFLOAT16)
def entropy_in_the_dtype_of_the_logits(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, return_entropy: bool = False
) -> Any:
    """entropy_from_logits as it is, without a conversion to float32."""
    out = good(logits.float() / temperature, labels)
    return (out, zero_ignored(entropy_of(logits / temperature).float(), labels)) if return_entropy else out


@reported("argmax", "returns an argmax beyond the vocabulary", "mirage-project/mirage#751")
def argmax_in_the_padding(logits: Tensor, labels: Tensor, temperature: float = 1.0, return_argmax: bool = False) -> Any:
    """Columns added for alignment have logits of 0, which win where all others are negative."""
    out = good(logits.float() / temperature, labels)
    argmax = functional.pad(logits.float(), (0, -logits.shape[-1] % 128)).argmax(-1)
    special = torch.log_softmax(logits.float(), -1).isnan().any(-1)
    return (out, argmax.masked_fill(special | (labels == IGNORE_INDEX), -1)) if return_argmax else out


# --- gradients --------------------------------------------------------------------------------------------------------


class _Differentiated(torch.autograd.Function):
    """Right values, with the gradient that `gradient(logits, labels, upstream)` gives."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, gradient: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.gradient = gradient
        return good(logits.detach(), labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        return ctx.gradient(logits, labels, upstream[0].unsqueeze(-1)).to(logits.dtype), None, None


def with_gradient(gradient: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def function(logits: Tensor, labels: Tensor) -> Tensor:
        return _Differentiated.apply(logits, labels, gradient)

    function.__name__ = function.__qualname__ = gradient.__name__
    function.__doc__ = gradient.__doc__
    return function


def kept(labels: Tensor) -> Tensor:
    return (labels != IGNORE_INDEX).unsqueeze(-1)


def one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros(logits.shape).scatter(-1, labels.clamp(min=0).unsqueeze(-1), 1.0)


def slope(logits: Tensor, labels: Tensor) -> Tensor:
    """The derivative of each log-probability; 0 for ignored ones."""
    return torch.where(kept(labels), one_hot(logits, labels) - logits.float().softmax(-1), 0.0)


@reported("gradient_error", GRADIENT + "takes the first row's upstream gradient for all", "linkedin/Liger-Kernel#968")
@with_gradient
def one_upstream_gradient_for_all(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """reduction='none' with a backward made for one number, which multiplies everything by its first one."""
    return slope(x, labels) * upstream[:1]


@reported("gradient_error", GRADIENT + "is 0 everywhere as soon as one label is ignored", "linkedin/Liger-Kernel#678")
@with_gradient
def no_gradient_beside_ignored_labels(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """Many ignored labels, and a norm of the gradient of 0."""
    return slope(x, labels) * upstream * kept(labels).all()


@reported("gradient_error", GRADIENT + "is 0 in a part of the columns", "modelscope/ms-swift#9947")
@with_gradient
def no_gradient_in_the_other_shard(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """An all-reduce that autograd does not know: of two shards, that without the label gets no gradient."""
    half = x.shape[-1] // 2
    own = (torch.arange(x.shape[-1]) >= half) == (labels >= half).unsqueeze(-1)
    return slope(x, labels) * upstream * own


@reported("gradient_error", GRADIENT + "is rounded to bfloat16", "NVIDIA/Megatron-LM, fusions/fused_cross_entropy.py")
@with_gradient
def gradient_in_bfloat16(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """The gradient is converted to bfloat16 whatever the logits are."""
    return (slope(x, labels) * upstream).bfloat16()


@reported("gradient_error", GRADIENT + "is 0 where it is small", "apple/ml-cross-entropy#14")
@with_gradient
def filtered_gradient(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """Small entries are left out to save time, and add up."""
    gradient = slope(x, labels) * upstream
    return gradient.masked_fill(gradient.abs() < 2**-12, 0.0)


@reported("gradient_error", GRADIENT + "is 2 times the right one", "apple/ml-cross-entropy#42")
@with_gradient
def gradient_summed_over_ranks(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """Of a tensor that each of two ranks has, the gradient is summed over both."""
    return 2 * slope(x, labels) * upstream


@reported("ignored_rows", "gives labels of -100 a gradient, though their result is 0", "PaddlePaddle/Paddle#28622")
@with_gradient
def gradient_of_ignored_labels(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """Ignored rows lack the label's share only."""
    return (one_hot(x, labels) * kept(labels) - x.float().softmax(-1)) * upstream


@reported("gradient_row_sum", GRADIENT + "smooths the labels, by 0.1", "NVIDIA/Megatron-LM#7464")
@with_gradient
def label_smoothing_over_the_own_shard(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """Labels are smoothed, and each of two shards spreads all that the label loses over its own columns."""
    spread = torch.cat([torch.full_like(shard, 0.1 / shard.shape[-1]) for shard in x.float().tensor_split(2, -1)], -1)
    return torch.where(kept(labels), slope(x, labels) - 0.1 * one_hot(x, labels) + spread, 0.0) * upstream


@reported("gradient_error", "loses labels that are nearly certain", "linkedin/Liger-Kernel#1329", BFLOAT16)
@with_gradient
def the_labels_share_added_afterwards(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """The gradient is stored in the logits' memory without the label's share, read from there, and completed."""
    stored = (-x.float().softmax(-1) * kept(labels) * upstream).to(x.dtype)
    return stored + one_hot(x, labels) * kept(labels) * upstream


@reported("gradient_error", GRADIENT + "is also that of a z-loss, 0.0001 times", "linkedin/Liger-Kernel#234")
@with_gradient
def z_loss_in_the_gradient(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """The gradient is that of the loss with the z-loss, and the value is without."""
    z = 2e-4 * x.float().logsumexp(-1, keepdim=True) * x.float().softmax(-1) * kept(labels)
    return (slope(x, labels) - z) * upstream


@reported("gradient_flows", "is detached from the logits where all labels are ignored", "huggingface/trl#7077")
def nothing_to_differentiate(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels that count are gathered and put into zeros; where none does, these belong to no graph."""
    counts = labels != IGNORE_INDEX
    if not counts.any():
        return torch.zeros(len(labels))
    return torch.zeros(len(labels)).masked_scatter(counts, good(logits[counts], labels[counts]))


# --- what else happens ------------------------------------------------------------------------------------------------


@reported("inputs_changed", "writes the exponentials over the logits", "NVIDIA/Megatron-LM#1594")
def softmax_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """float() copies nothing of float32 logits, from which the maximum is then subtracted in place, and exp taken."""
    out = good(logits.clone(), labels)
    x = logits.detach().float()
    x.sub_(x.amax(-1, keepdim=True)).exp_()
    return out


@reported("inputs_changed", "changes the logits and changes them back, which rounds them", "NovaSky-AI/SkyRL#1648")
@with_gradient
def changed_and_changed_back(x: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """Something is subtracted from the saved logits in place, to save memory, and added again."""
    gradient = slope(x, labels) * upstream
    shift = x.detach().logsumexp(-1, keepdim=True)
    x.detach().sub_(shift).add_(shift)
    return gradient


@reported(
    "inputs_changed",
    "writes 0 over the logits of ignored labels",
    "linkedin/Liger-Kernel, src/liger_kernel/ops/cross_entropy.py",
)
def ignored_rows_zeroed(logits: Tensor, labels: Tensor) -> Tensor:
    """The rows of ignored labels become their gradient, 0, in the logits' memory, with or without a gradient."""
    out = good(logits.clone(), labels)
    logits.detach()[labels == IGNORE_INDEX] = 0.0
    return out
