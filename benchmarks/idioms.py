"""The log-probabilities of labels as people compute them today, each written anew from its description.

Each takes logits [N, V] and labels [N], and returns log_probs [N] and, where asked for, the entropy [N], in nats.

Shapes: N rows, V vocabulary, C rows of a chunk.
"""

from types import FunctionType
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows
from torch import Tensor

if TYPE_CHECKING:
    from compiled_logprobs.problem import Problem

CHUNK_ROWS = 1024
"""Of the chunked logsumexp; OpenRLHF's number."""


class Idiom(Protocol):
    def __call__(self, logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]: ...


def log_softmax_gather(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """log_softmax in float32, then gather: what most write first."""
    log_p_NV = torch.log_softmax(logits.float(), -1)
    log_probs = log_p_NV.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return log_probs, -(log_p_NV.exp() * log_p_NV).sum(-1) if entropy else None


def logsumexp_by_row(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """verl's and TRL's way without a kernel: gather minus logsumexp, row after row, so that forward makes no [N, V].

    16-bit logits, for which logsumexp rounds too much, take log_softmax by row instead; results stay in 16 bits.
    """
    at = labels.unsqueeze(-1)
    if logits.dtype == torch.float32:
        log_sum = torch.stack([row.logsumexp(-1) for row in logits])
        log_probs = logits.gather(-1, at).squeeze(-1) - log_sum
    else:
        rows = zip(logits, at, strict=True)
        log_probs = torch.stack([row.log_softmax(-1).gather(-1, label) for row, label in rows]).squeeze(-1)
    return log_probs, _entropy(logits) if entropy else None


def logsumexp_by_chunk(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """OpenRLHF's way without a kernel: all logits to float32, then gather minus a logsumexp of some rows at a time."""
    x_NV = logits.float()
    log_sum = torch.cat([x_CV.logsumexp(-1) for x_CV in torch.split(x_NV, CHUNK_ROWS)])
    log_probs = x_NV.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_sum
    return log_probs, _entropy(x_NV) if entropy else None


def cross_entropy(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Minus torch's cross entropy in float32."""
    x_NV = logits.float()
    log_probs = -F.cross_entropy(x_NV, labels, reduction="none")
    return log_probs, _entropy(x_NV) if entropy else None


def compiled_log_softmax(problem: "Problem") -> Idiom:
    """torch.compile of `log_softmax_gather`, with a code object and a name of its own for each problem.

    To a function shared by several shapes torch.compile would turn V into a dynamic size and, after some, give up
    compiling; in a program with one model it sees one V, and that is what is measured here.
    """
    name = f"log_softmax_gather {problem} {problem.details()}"
    plain = cast(FunctionType, log_softmax_gather)
    return torch.compile(FunctionType(plain.__code__.replace(co_name=name), plain.__globals__, name))


def liger(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Minus Liger's cross entropy, in the dtype of the logits. Forward writes the gradient, if any, over them."""
    assert not entropy
    from liger_kernel.transformers.functional import liger_cross_entropy

    return -liger_cross_entropy(logits, labels, reduction="none"), None


def quack(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Minus quack's cross entropy, in float32."""
    assert not entropy
    from quack.cross_entropy import cross_entropy

    return -cross_entropy(logits, labels, reduction="none"), None


def trl(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """TRL's own functions, which from 1.14 on take its Triton kernel on a GPU; that gives the entropy as well."""
    from trl.trainer import utils

    if entropy:
        log_probs, entropies = utils.selective_log_softmax_and_entropy(logits, labels)
        return log_probs, entropies
    return utils.selective_log_softmax(logits, labels), None


def cut_cross_entropy(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Minus cut-cross-entropy's loss. It takes hidden states and a head's weight, never logits: here these are the
    identity and the logits turned over, whose product are the same logits; the time of the product counts.
    """
    assert not entropy
    from cut_cross_entropy import linear_cross_entropy

    hidden_NN = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    return -linear_cross_entropy(hidden_NN, logits.T, labels, reduction="none"), None


def _entropy(logits_NV: Tensor) -> Tensor:
    """As verl and OpenRLHF compute it, in the dtype that it is given."""
    return logits_NV.logsumexp(-1) - (logits_NV.softmax(-1) * logits_NV).sum(-1)
