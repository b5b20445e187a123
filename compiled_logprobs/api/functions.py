"""The public functions: check the arguments, choose a backend, call it."""

from typing import Any, cast

import torch
from torch import Tensor

from compiled_logprobs.api.call import named_backend, problem_of
from compiled_logprobs.api.graph import log_probs_in_graph
from compiled_logprobs.api.log_probs import LogProbs, log_probs_with
from compiled_logprobs.api.reduction import Reduction, check_reduction, cross_entropy_of
from compiled_logprobs.api.sharded import Part, of_all_rows, part_of
from compiled_logprobs.arguments import (
    check_labels,
    check_logits,
    check_not_leaf,
    check_values,
    checked_out_dtype,
    checked_temperature,
    is_dtensor,
    is_nan,
    is_traced,
)
from compiled_logprobs.backends import EAGER, backends, get_backend
from compiled_logprobs.choose.auto import Auto
from compiled_logprobs.operation.autograd import ForwardBackward, PlainFormula, compute
from compiled_logprobs.operation.contract import Wanted, in_dtype
from compiled_logprobs.operation.shards import Shard

_PLAIN = PlainFormula()


def log_probs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_logsumexp: bool = False,
    return_argmax: bool = False,
    return_sum_p_squared: bool = False,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
    group: Any = None,
    vocab_start_index: int | None = None,
    vocab_size: int | None = None,
) -> Tensor | LogProbs:
    """Log-probability of each label under softmax(logits / temperature).

    With x = logits / temperature:  out[...] = x[..., label] - logsumexp(x[..., :]), accumulated in float32.

    Args:
        logits: [..., V] unnormalised scores; float32, bfloat16 or float16 (float64 through eager). Not modified, and
            not copied as long as the last stride is 1: slices such as `logits[:, :-1]` are taken as they are.
        labels: [...] or [..., K], int64 or int32, in [0, V) or `ignore_index`, on the device of `logits`.
        temperature: dimensionless, > 0; a number, or a tensor broadcastable to [...] (one a token) that needs no
            gradient.
        ignore_index: a label that counts 0: result 0, gradient 0. Where all K labels of a row are ignored, its other
            results are 0 too, and its argmax is -1.
        return_entropy: also return the entropy of each row, from the same pass, as with the next three.
        return_logsumexp: also return the logsumexp of logits / temperature, as a z-loss takes it.
        return_argmax: also return the first column that holds the maximum: its equality with the label is the accuracy.
        return_sum_p_squared: also return the sum of all squared probabilities.
        masked_logits: whole regions of the vocabulary are -inf, as top-k and top-p filtering leave them.
        inplace_backward: write the gradient over `logits`, which saves its memory. Nothing else may need their values
            by then: whoever saved them for its own backward gets autograd's error (a second slice of the same tensor
            too), but a plain read afterwards finds the gradient and cannot be detected. Not for leaf tensors. Where
            memory overlaps (an expanded tensor), where the last stride is not 1, for a DTensor, and under hooks on
            saved tensors (as a checkpoint has), the gradient gets memory of its own. In a graph of torch.compile it is
            a permission, used by Inductor for logits that the graph computed, and that nothing needs any more.
        out_dtype: dtype of the results; None is the dtype of `logits`.
        backend: "auto", or the name of one of `backends()`, which then runs or raises. In the recomputation of a
            checkpoint "auto" is what the last forward took; in a CUDA graph's capture what is warm, or an error. In the
            graphs of torch.compile and torch.export too it is chosen or raises when the graph runs, and "auto" never
            measures; but "eager" there is the plain formula, for the compiler to fuse. Under dispatch modes (such as a
            counter of operations) "auto" is eager.
        group: a process group of torch.distributed whose ranks hold each some columns of the vocabulary, in the order
            of the ranks; labels are those of the whole, and all ranks get the same results, bit for bit. With a DTensor
            that is sharded over its last dimension there is no need of it. Not for argmax.
        vocab_start_index: with `group`: which column the first one here is; by default all ranks hold as many.
        vocab_size: columns of the vocabulary in all; those beyond it are padding, and count as -inf.

    Returns:
        [...] (or [..., K]) log-probabilities in nats, never positive, differentiable in `logits` once. With any
        `return_...=True` a `LogProbs`, which unpacks into what was asked for: the entropy, never negative, and the
        logsumexp are differentiable too; argmax, in int64, and the sum are not. Rows that are all -inf, or hold NaN or
        +inf, are NaN, their argmax -1. On an accelerator, and while tracing, no value is looked at: a label outside
        [0, V) or a temperature that is not > 0 makes its row so.

    Raises:
        InputError: shapes, dtypes, devices, labels or temperature do not fit together.
        BackendUnavailable: the named backend is unknown or cannot run this problem, or nothing is warm in a capture.
    """
    part = None
    if group is not None or vocab_size is not None or vocab_start_index is not None or is_dtensor(logits):
        if inplace_backward:
            check_not_leaf(logits)
            inplace_backward = not is_dtensor(logits)  # whose version no write to its local tensor changes
        logits, part = part_of(logits, group, vocab_start_index, vocab_size)
        labels = of_all_rows(labels)
        temperature = of_all_rows(temperature) if isinstance(temperature, Tensor) else temperature
    check_logits(logits)
    check_labels(logits, labels, ignore_index)
    per_token = isinstance(temperature, Tensor)
    temperature = checked_temperature(logits, temperature)
    out_dtype = checked_out_dtype(logits, out_dtype)
    wanted = Wanted(return_entropy, return_logsumexp, return_argmax, return_sum_p_squared)
    if not is_traced(logits):
        log_probs, *others = _computed(
            logits,
            labels,
            temperature,
            int(ignore_index),
            wanted,
            masked_logits,
            inplace_backward,
            out_dtype,
            backend,
            part,
        )
    elif part is not None:
        if not torch.compiler.is_dynamo_compiling():
            raise part.error_in_graph()
        from compiled_logprobs.api.apart import outside_of_the_graph

        log_probs, *others = outside_of_the_graph(
            _computed,
            logits,
            labels,
            temperature,
            int(ignore_index),
            wanted,
            masked_logits,
            inplace_backward,
            out_dtype,
            backend,
            part,
        )
    elif backend == EAGER:  # for the compiler to fuse
        log_probs, *others = compute(_PLAIN, logits, labels, temperature, ignore_index=int(ignore_index), wanted=wanted)
    else:
        if backend != "auto" and backend not in backends():
            get_backend(backend)  # raises
        log_probs, *others = log_probs_in_graph(
            logits,
            labels,
            temperature,
            ignore_index=ignore_index,
            wanted=wanted,
            per_token=per_token,
            masked_logits=masked_logits,
            inplace_backward=inplace_backward,
            out_dtype=out_dtype,
            backend=backend,
        )
    if log_probs.dtype != out_dtype:
        log_probs = log_probs.to(out_dtype)
    if not others:
        return log_probs
    return log_probs_with(wanted, log_probs, *(in_dtype(result, out_dtype) for result in others))


def _computed(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    wanted: Wanted,
    masked_logits: bool,
    inplace_backward: bool,
    out_dtype: torch.dtype,
    backend: str,
    part: Part | None,
) -> tuple[Tensor, ...]:
    """What `compute` returns, by the backend of the call; where `logits` are a part, together with the other ranks."""
    if inplace_backward:
        check_not_leaf(logits)
    of_backend = wanted if part is None else part.wanted_of_backend(wanted)
    problem = problem_of(logits, labels, temperature, of_backend, masked_logits, inplace_backward, out_dtype)
    if part is not None:
        backend = part.backend_of(backend, problem)
    serving: ForwardBackward = Auto(problem, logits) if backend == "auto" else named_backend(backend, problem)
    results = compute(
        serving if part is None else Shard(serving, *part),
        logits,
        labels,
        temperature,
        ignore_index=ignore_index,
        wanted=wanted,
        inplace_backward=inplace_backward,
    )
    if logits.is_cpu and is_nan(results[0]):
        check_values(logits, labels, temperature, ignore_index, None if part is None else part.vocab)
    return results


def cross_entropy_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: Reduction = "mean",
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
    group: Any = None,
    vocab_start_index: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Cross entropy of each label: minus `log_probs_from_logits`, whose arguments and errors it shares.

    Args:
        reduction: "none" returns [...] (or [..., K]); "sum" and "mean" a scalar. The mean is over the labels that are
            not ignored, and NaN where all are, as in torch.nn.functional.cross_entropy.

    Returns:
        Nats, never negative.
    """
    check_reduction(reduction)
    log_probs = log_probs_from_logits(
        logits,
        labels,
        temperature=temperature,
        ignore_index=ignore_index,
        masked_logits=masked_logits,
        inplace_backward=inplace_backward,
        out_dtype=out_dtype if reduction == "none" else None if logits.dtype == torch.float64 else torch.float32,
        backend=backend,
        group=group,
        vocab_start_index=vocab_start_index,
        vocab_size=vocab_size,
    )
    dtype = logits.dtype if out_dtype is None else out_dtype
    return cross_entropy_of(cast(Tensor, log_probs), of_all_rows(labels), reduction, ignore_index, dtype)


def entropy_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
    group: Any = None,
    vocab_start_index: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Entropy of softmax(logits / temperature): [...] nats, never negative, differentiable in `logits`.

    Arguments and errors are those of `log_probs_from_logits`. A token of probability 0 counts 0.
    """
    if not is_dtensor(logits):
        check_logits(logits, least_columns=int(group is None))
    _, entropy = log_probs_from_logits(
        logits,
        torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device),
        temperature=temperature,
        return_entropy=True,
        masked_logits=masked_logits,
        inplace_backward=inplace_backward,
        out_dtype=out_dtype,
        backend=backend,
        group=group,
        vocab_start_index=vocab_start_index,
        vocab_size=vocab_size,
    )
    return entropy
