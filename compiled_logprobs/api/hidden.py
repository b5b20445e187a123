"""The public functions over hidden states: check the arguments, choose a backend, call it."""

import numbers
from typing import Any, cast

import torch
from torch import Tensor

from compiled_logprobs.api.call import check_limit, named_backend, problem_from_hidden
from compiled_logprobs.api.hidden_graph import log_probs_in_graph
from compiled_logprobs.api.log_probs import LogProbs, log_probs_with
from compiled_logprobs.api.reduction import Reduction, check_reduction, cross_entropy_of
from compiled_logprobs.api.sharded import Part, part_of_weight
from compiled_logprobs.arguments import (
    check_labels,
    check_not_transformed,
    check_values,
    checked_out_dtype,
    checked_temperature,
    is_nan,
    is_temperature,
    is_traced,
)
from compiled_logprobs.backends import backends, get_backend
from compiled_logprobs.choose.auto import Auto, logits_backend_on
from compiled_logprobs.errors import InputError
from compiled_logprobs.operation.contract import Wanted, in_dtype
from compiled_logprobs.operation.hidden import compute_from_hidden
from compiled_logprobs.operation.shards import HiddenShard
from compiled_logprobs.problem import DTYPES, Problem, short_name


def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_logsumexp: bool = False,
    return_argmax: bool = False,
    memory_limit: int | None = None,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
    group: Any = None,
    vocab_start_index: int | None = None,
    vocab_size: int | None = None,
) -> Tensor | LogProbs:
    """Log-probability of each label, from hidden states and the output layer's weight: the logits need not fit.

    With x = cap(logit_scale * (hidden @ weight.T + bias)) / temperature:  out[...] = x[..., label] -
    logsumexp(x[..., :]), where cap(z) is z, or softcap * tanh(z / softcap). Products are in the dtype of `hidden`, as a
    model's output layer computes them; what comes after, and sums over chunks, in float32. Rows all of whose labels are
    ignored are left out before the product. Nothing is filtered: gradients are exact but for rounding.

    Args:
        hidden: [..., H] hidden states; float32, bfloat16 or float16 (float64 through eager).
        weight: [V, H], in the dtype of `hidden`; frozen, it costs no gradient. Under autocast all three are converted.
        labels: [...] or [..., K], int64 or int32, in [0, V) or `ignore_index`.
        bias: [V].
        temperature: as for `log_probs_from_logits`.
        logit_scale: > 0; what the logits are multiplied by, before the cap.
        softcap: > 0; the bound that the logits are softly kept below, before the temperature.
        ignore_index: as for `log_probs_from_logits`.
        return_entropy: also return the entropy of each row, from the same pass, as with the next two.
        return_logsumexp: also return the logsumexp of x.
        return_argmax: also return the first column that holds the maximum of the logits.
        memory_limit: bytes that the call and its backward may take beside their arguments, results and gradients.
        out_dtype: dtype of the results; None is that of `hidden`.
        backend: "auto", or the name of one of `backends(from_hidden=True)`, which then runs or raises.
        group, vocab_start_index, vocab_size: as for `log_probs_from_logits`, where `weight` and `bias` are the rows
            that this rank has. The gradient in `hidden` is summed over the ranks, so it must not be summed again.

    Returns:
        As `log_probs_from_logits`, differentiable in `hidden`, `weight` and `bias` once.

    Raises:
        InputError: shapes, dtypes, devices, labels or temperature do not fit together, or the limit is less than the
            least that is possible, which the message names.
        BackendUnavailable: the named backend is unknown or cannot run this problem.
    """
    hidden, weight, bias = _checked(hidden, weight, bias, least_columns=int(group is None))
    check_labels(hidden, labels, ignore_index, "hidden")
    given = temperature
    logit_scale, softcap = _checked_number("logit_scale", logit_scale), _checked_cap(softcap)
    temperature = checked_temperature(hidden, temperature, "hidden")
    if logit_scale != 1.0:
        temperature = checked_temperature(hidden, temperature / logit_scale, "hidden")
        softcap = None if softcap is None else softcap / logit_scale
    out_dtype = checked_out_dtype(hidden, out_dtype)
    wanted = Wanted(return_entropy, return_logsumexp, return_argmax)
    weight, bias, part = part_of_weight(weight, bias, group, vocab_start_index, vocab_size)
    options: dict[str, Any] = {"softcap": softcap, "ignore_index": int(ignore_index), "wanted": wanted}
    arguments = hidden, weight, bias, labels, temperature, memory_limit, out_dtype, backend, part
    if not is_traced(hidden):
        log_probs, *others = _computed(options, given, *arguments)
    elif part is not None:
        if not torch.compiler.is_dynamo_compiling():
            raise part.error_in_graph()
        from compiled_logprobs.api.apart import outside_of_the_graph

        log_probs, *others = outside_of_the_graph(_computed, options, given, *arguments)
    else:
        if backend != "auto" and backend not in backends(from_hidden=True):
            get_backend(backend, Problem("cpu", 0, 1, hidden.dtype, hidden=1))  # raises
        options |= {"per_token": isinstance(given, Tensor), "memory_limit": memory_limit, "out_dtype": out_dtype}
        log_probs, *others = log_probs_in_graph(hidden, weight, labels, bias, temperature, **options, backend=backend)
    log_probs = log_probs.to(out_dtype)
    if not others:
        return log_probs
    return log_probs_with(wanted, log_probs, *(in_dtype(result, out_dtype) for result in others))


def _computed(
    options: dict[str, Any],
    given: float | Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float | Tensor,
    memory_limit: int | None,
    out_dtype: torch.dtype,
    backend: str,
    part: Part | None,
) -> tuple[Tensor, ...]:
    """What `compute_from_hidden` returns, by the backend of the call; of a part, together with the other ranks."""
    wanted, softcap = options["wanted"], options["softcap"]
    of_backend = wanted if part is None else part.wanted_of_backend(wanted)
    problem = problem_from_hidden(
        hidden, weight, bias, labels, temperature, of_backend, softcap, memory_limit, out_dtype
    )
    check_limit(problem)
    if part is not None:
        backend = part.backend_of(backend, problem)
    serving: Any = Auto(problem, hidden) if backend == "auto" else named_backend(backend, problem)
    serving = serving if part is None else HiddenShard(serving, *part)
    logits_backend = logits_backend_on(hidden.device)
    results = compute_from_hidden(
        serving, problem, hidden, weight, labels, bias, temperature, **options, logits_backend=logits_backend
    )
    if hidden.is_cpu and is_nan(results[0]):
        vocab = part.vocab if part else weight.shape[0]
        check_values(hidden, labels, given if isinstance(given, Tensor) else 1.0, options["ignore_index"], vocab)
    return results


def cross_entropy_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_limit: int | None = None,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
    group: Any = None,
    vocab_start_index: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Cross entropy of each label: minus `log_probs_from_hidden`, whose arguments and errors it shares.

    Args:
        reduction: as for `cross_entropy_from_logits`.

    Returns:
        Nats, never negative.
    """
    check_reduction(reduction)
    log_probs = log_probs_from_hidden(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        memory_limit=memory_limit,
        out_dtype=out_dtype if reduction == "none" else None if hidden.dtype == torch.float64 else torch.float32,
        backend=backend,
        group=group,
        vocab_start_index=vocab_start_index,
        vocab_size=vocab_size,
    )
    dtype = hidden.dtype if out_dtype is None else out_dtype
    return cross_entropy_of(cast(Tensor, log_probs), labels, reduction, ignore_index, dtype)


def _checked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, least_columns: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three, in the dtype of autocast where that is on. Raises InputError where they do not fit together."""
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            remedy = "its weight, e.g. lm_head.weight" if hasattr(tensor, "weight") else "a tensor"
            raise InputError(
                f"got {name} of type {type(tensor).__name__}; a torch.Tensor is valid. Pass {remedy}; of an adapter "
                "(LoRA) pass the merged weight, as its get_delta_weight added to that of the base layer."
            )
        if hasattr(tensor, "full_tensor"):
            raise InputError(
                f"got {name} that is a DTensor; a plain tensor is valid. Pass {name}.full_tensor(), which gathers it, "
                "and whose gradient goes back to the shards; or call inside the forward of a module under fully_shard, "
                f"where its parameters are gathered. Of a vocabulary that is split over ranks, {name}.to_local() and "
                "group=."
            )
        check_not_transformed(name, tensor)
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            raise InputError(
                f"got {name} of dtype {short_name(tensor.dtype)} and layout {tensor.layout}; "
                f"{', '.join(map(short_name, DTYPES))} in a strided layout are valid. Dequantise it, or convert it, "
                f"e.g. {name}.bfloat16()."
            )
        if tensor.device != hidden.device:
            raise InputError(
                f"got {name} on {tensor.device} and hidden on {hidden.device}; one device is valid. Use "
                f"{name}.to({str(hidden.device)!r})."
            )
    sizes = f"got hidden of shape {list(hidden.shape)} and weight of shape {list(weight.shape)}"
    is_right = hidden.ndim > 0 and weight.ndim == 2 and hidden.shape[-1] == weight.shape[-1] > 0
    if not is_right or weight.shape[0] < least_columns:
        raise InputError(
            f"{sizes}; [..., H] and [V, H] with the same H, and both at least 1, are valid. The weight is as "
            "torch.nn.Linear has it; transpose one that is [H, V]."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"{sizes}, and bias of shape {list(bias.shape)}; [{weight.shape[0]}] is valid.")
    device_type = hidden.device.type
    if (
        torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
        and hidden.dtype != torch.float64
    ):
        dtype = torch.get_autocast_dtype(device_type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if len(dtypes := {name: tensor.dtype for name, tensor in given.items()}) and len(set(dtypes.values())) > 1:
        got = ", ".join(f"{name} in {short_name(dtype)}" for name, dtype in dtypes.items())
        raise InputError(f"got {got}; one dtype is valid. Convert them, or call under torch.autocast.")
    return hidden, weight, bias


def _checked_number(name: str, number: Any) -> float:
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not is_number or not is_temperature(number):  # which it divides
        raise InputError(f"got {name}={number!r}; a positive number is valid, which is so in float32, and finite.")
    return float(number)


def _checked_cap(softcap: Any) -> float | None:
    if softcap == 0:
        raise InputError("got softcap=0; a positive number or None is valid. Where a model has none, pass None.")
    return None if softcap is None else _checked_number("softcap", softcap)
