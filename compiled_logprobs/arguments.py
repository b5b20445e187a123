"""Which arguments are valid: every message says what was got, what is valid and what to do.

Values of labels and temperatures are looked at on the CPU alone: on an accelerator that would wait for it, and while
tracing there are none. Even there it is done afterwards, and only where a result is NaN, as the contract has it for
every bad value that counts: looking first would take as long as the rest of a small call.
"""

import math
import numbers
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed

from compiled_logprobs.errors import BackendUnavailable, InputError, ProfileError
from compiled_logprobs.problem import (
    DTYPES,
    Problem,
    accumulation_dtype,
    problem_from_dict,
    problem_to_dict,
    short_name,
    why_not_posed,
)

NO_LABEL = -(2**63)
"""An `ignore_index` that no label has, for functions that ignore none."""

_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""Of temperatures."""


def find_private(name: str, otherwise: Any) -> Any:
    """What torch has under a private name; `otherwise` in a release that has no such name."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (AttributeError, ImportError):
        return otherwise


dispatch_modes: Callable[[], list[Any]] = find_private(
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack", list
)
"""The modes that see each operation of this thread, such as a fake mode, or a profiler of operations."""
count_dispatch_modes: Callable[[], int] = find_private(
    "torch._C._len_torch_dispatch_stack", lambda: len(dispatch_modes())
)
"""How many these are, which is 0 in nearly every call: cheaper to ask for."""
peek_transform: Callable[[], Any] = find_private("torch._C._functorch.peek_interpreter_stack", lambda: None)
"""The innermost transform of torch.func that is at work; None outside of them. Within, new tensors have no memory."""
_is_transformed = find_private("torch._C._functorch.is_functorch_wrapped_tensor", lambda tensor: False)
_top_hooks: Callable[[bool], Any] | None = find_private("torch._C._autograd._top_saved_tensors_default_hooks", None)
_WITHOUT_VALUES = (
    find_private("torch._subclasses.fake_tensor.FakeTensor", type(None)),
    find_private("torch._subclasses.functional_tensor.FunctionalTensor", type(None)),
)


def is_traced(logits: Tensor) -> bool:
    """Whether a compiler, an exporter or a fake mode records the operations, so that values may not exist."""
    if torch.compiler.is_compiling() or logits.is_meta:
        return True
    if type(logits) is not Tensor and isinstance(logits, _WITHOUT_VALUES):
        return True
    return count_dispatch_modes() > 0 and any(mode.is_infra_mode() for mode in dispatch_modes())


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor, whose module need not be imported for this."""
    return isinstance(tensor, Tensor) and type(tensor) is not Tensor and hasattr(tensor, "placements")


def has_saved_tensor_hooks(otherwise: bool) -> bool:
    """Whether hooks on saved tensors are in force, such as those of a checkpoint; `otherwise` where torch cannot tell,
    as before 2.7."""
    return otherwise if _top_hooks is None else _top_hooks(True) is not None


def check_logits(logits: Tensor, *, least_columns: int = 1) -> None:
    """Raise InputError for what are no logits. Of a vocabulary that is split over ranks one may have no columns."""
    if not isinstance(logits, Tensor):
        raise InputError(f"got logits of type {type(logits).__name__}; a torch.Tensor [..., V] is valid.")
    if is_dtensor(logits):
        raise InputError(
            "got logits that are a DTensor; a plain tensor is valid. "
            "Pass logits.full_tensor(), or logits.to_local() where the vocabulary is not sharded."
        )
    check_not_transformed("logits", logits)
    if logits.layout is not torch.strided:
        raise InputError(f"got logits of layout {logits.layout}; torch.strided is valid. Use logits.to_dense().")
    if logits.dtype not in DTYPES:
        raise InputError(
            f"got logits of dtype {short_name(logits.dtype)}; {', '.join(map(short_name, DTYPES))} are valid. "
            "Convert them, e.g. logits.float()."
        )
    if logits.ndim == 0 or logits.shape[-1] < least_columns:
        raise InputError(
            f"got logits of shape {list(logits.shape)}; [..., V] with a vocabulary V of at least 1 is valid. "
            "The last dimension is the vocabulary."
        )


def check_not_transformed(name: str, tensor: Tensor) -> None:
    if not torch.compiler.is_compiling() and _is_transformed(tensor):
        raise InputError(
            f"got {name} inside torch.func.grad, vmap or another of its transforms; plain tensors are valid. "
            "Use torch.autograd.grad, or torch.log_softmax and gather."
        )


def check_no_transform(backend: str) -> None:
    """Raise BackendUnavailable inside a transform of torch.func, where what kernels write to has no memory."""
    if peek_transform() is not None:
        raise BackendUnavailable(
            f"backend {backend!r} cannot run inside torch.func.grad, vmap or another of its transforms, where new "
            "tensors have no memory. Name 'eager' or 'auto', or call it outside of the transform."
        )


def check_labels(logits: Tensor, labels: Tensor, ignore_index: int, what: str = "logits") -> None:
    if not isinstance(labels, Tensor):
        raise InputError(f"got labels of type {type(labels).__name__}; a torch.Tensor of integers is valid.")
    if is_dtensor(labels):
        raise InputError("got labels that are a DTensor; a plain tensor is valid. Pass labels.full_tensor().")
    check_not_transformed("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"got labels of dtype {short_name(labels.dtype)}; int64 and int32 are valid. Use labels.long()."
        )
    rows = logits.shape[:-1]
    if labels.shape != rows and not (labels.ndim == logits.ndim and labels.shape[:-1] == rows and labels.shape[-1] > 0):
        shape = ", ".join(map(str, rows))
        raise InputError(
            f"got labels of shape {list(labels.shape)} for {what} of shape {list(logits.shape)}; [{shape}] and "
            f"[{f'{shape}, ' if shape else ''}K] are valid. Shift or slice one of them so that the leading dimensions "
            "agree."
        )
    if labels.device != logits.device:
        raise InputError(
            f"got labels on {labels.device} and {what} on {logits.device}; one device is valid. "
            f"Use labels.to({str(logits.device)!r})."
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise InputError(f"got ignore_index={ignore_index!r}; an integer of 64 bits is valid, e.g. -100.")


def is_nan(log_probs: Tensor) -> bool:
    """Whether one of them is NaN: as none is positive, their sum is NaN then, and only then."""
    return math.isnan((log_probs.detach() if log_probs.requires_grad else log_probs).sum().item())


def check_values(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, ignore_index: int, vocab: int | None = None
) -> None:
    """Raise InputError for a label outside of the vocabulary, by default that of `logits`, or a temperature of a row
    that counts."""
    vocab = vocab or logits.shape[-1]
    counts = labels.long() != ignore_index  # torch cuts it off for an int32: -2**63 would be 0
    bad = ((labels < 0) | (labels >= vocab)) & counts
    if bad.any():
        got, valid = _first("labels", labels, bad), f"0 to {vocab - 1} (the vocabulary has {vocab})"
        if ignore_index == NO_LABEL:
            raise InputError(
                f"got {got}; {valid} are valid. Correct it, or put any token where a position does not count, and "
                "mask the result."
            )
        raise InputError(
            f"got {got}; {valid} and ignore_index={ignore_index} are valid. Correct it, or mark positions that do "
            "not count with ignore_index."
        )
    if isinstance(temperature, Tensor):
        rows_count = counts.any(-1) if labels.ndim == logits.ndim else counts
        bad = ~((temperature >= _LEAST) & (temperature <= _MOST)) & rows_count
        if bad.any():
            raise InputError(
                f"got {_first('temperature', temperature, bad)}; "
                f"numbers from {_LEAST:.3g} to {_MOST:.3g} are valid. "
                "Use temperature.clamp(min=...), and ignore_index where a position does not count."
            )


def _first(name: str, values: Tensor, bad: Tensor) -> str:
    """The first of the `values`, broadcastable to `bad`, that is so, and where it stands: 'labels[1, 2] = 9999'."""
    place = bad.nonzero()[0].tolist()[bad.ndim - values.ndim :]
    index = [min(at, size - 1) for at, size in zip(place, values.shape, strict=True)]
    value = values[tuple(index)].item()
    return f"{name}{index or ''} = {f'{value:.6g}' if isinstance(value, float) else value}"


def checked_temperature(logits: Tensor, temperature: float | Tensor, what: str = "logits") -> float | Tensor:
    if isinstance(temperature, Tensor):
        return _checked_temperature_tensor(logits, temperature, what)
    if torch.compiler.is_compiling() and isinstance(temperature, (int, float)) and not isinstance(temperature, bool):
        if not logits.is_cpu and temperature == 1.0:
            return 1.0  # worth a compilation: as a tensor, an accelerator takes it for one that differs by row
        # As a tensor, which makes its rows NaN if it is not positive. A product: torch.full would be compiled for each
        # value. On a CPU it is read again, and stays what it was.
        dtype = torch.float64 if logits.is_cpu else accumulation_dtype(logits.dtype)
        return torch.ones((), dtype=dtype, device=logits.device) * temperature
    # The type first, since asking whether it is a Real, an abstract class, shows in a small call.
    number = type(temperature) is float or (isinstance(temperature, numbers.Real) and not isinstance(temperature, bool))
    if not number or not is_temperature(temperature):
        raise InputError(
            f"got temperature={temperature!r}; a number from {_LEAST:.3g} to {_MOST:.3g}, or a tensor of them "
            f"broadcastable to the leading dimensions of {what}, is valid. For greedy decoding take the argmax."
        )
    return float(temperature)


def is_temperature(number: Any) -> bool:
    """Whether `number` is positive, finite and so in float32."""
    return bool(_LEAST <= number <= _MOST)


def _checked_temperature_tensor(logits: Tensor, temperature: Tensor, what: str) -> Tensor:
    check_not_transformed("a temperature tensor", temperature)
    rows = logits.shape[:-1]
    if not temperature.dtype.is_floating_point:
        raise InputError(
            f"got a temperature tensor of dtype {short_name(temperature.dtype)}; a floating dtype is valid."
        )
    if temperature.requires_grad:
        raise InputError(
            "got a temperature tensor that requires a gradient; it gets none. Pass temperature.detach(), or divide the "
            f"{what} by it yourself."
        )
    if temperature.device != logits.device:
        raise InputError(
            f"got a temperature tensor on {temperature.device} and {what} on {logits.device}; one device is valid. "
            f"Use temperature.to({str(logits.device)!r}), or a number."
        )
    fits = temperature.ndim <= len(rows) and all(
        t in (1, n) for t, n in zip(reversed(temperature.shape), reversed(rows), strict=False)
    )
    if not fits:
        raise InputError(
            f"got a temperature tensor of shape {list(temperature.shape)} for {what} of shape {list(logits.shape)}; "
            f"a shape broadcastable to {list(rows)} is valid (one temperature a token). "
            "For one a sequence use temperature.unsqueeze(-1)."
        )
    return temperature


def checked_out_dtype(logits: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    if out_dtype is None:
        return logits.dtype
    if out_dtype not in DTYPES:
        raise InputError(
            f"got out_dtype={out_dtype!r}; {', '.join(f'torch.{short_name(d)}' for d in DTYPES)}, or None for the "
            "dtype of the logits, are valid."
        )
    return out_dtype


def check_problem(problem: object) -> None:
    """Raise InputError for a problem of a caller's own making that no logits pose."""
    example = "Pass e.g. Problem('cpu', 4096, 32768, torch.float32)."
    if not isinstance(problem, Problem):
        raise InputError(f"got a problem of type {type(problem).__name__}; a Problem is valid. {example}")
    for name in ("dtype", "out_dtype"):
        if (dtype := getattr(problem, name)) not in DTYPES:
            valid = ", ".join(f"torch.{short_name(d)}" for d in DTYPES)
            raise InputError(f"got a problem whose {name} is {dtype!r}; {valid} are valid. {example}")
    for name, least in (("rows", 0), ("vocab", 1), ("labels_per_row", 1)):
        number = getattr(problem, name)
        if type(number) is not int or number < least:
            raise InputError(
                f"got a problem whose {name} is {number!r}; an integer of {least} or more is valid. {example}"
            )
    try:
        problem_from_dict(problem_to_dict(problem))
    except ProfileError as error:
        raise InputError(f"got a problem that could not be stored: {error}. {example}") from error
    if (reason := why_not_posed(problem)) is not None:
        raise InputError(f"got a problem of {reason}. {example}")


def checked_device(device: torch.device | str) -> torch.device:
    """`device`, if this process can use it. Raises InputError for a name that is none, and for one that is not here."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"got device={device!r}; e.g. 'cpu' or 'cuda:0' is valid. Name one of them.") from error
    try:
        torch.empty(0, device=place)
    except Exception as error:  # an AssertionError, RuntimeError or NotImplementedError, as torch was built
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"got device='{place}', which this torch cannot use here: {cause.rstrip('.')}. 'cpu' is valid. Name it, or "
            f"install a driver and a torch for that device."
        ) from error
    return place


def check_not_leaf(logits: Tensor) -> None:
    base = getattr(logits, "_base", None)
    base = logits if base is None else base
    if base.is_leaf and base.requires_grad:
        raise InputError(
            "got inplace_backward=True for logits that are a leaf (or a view of one) and require a gradient: the "
            "gradient would overwrite their value, and be their .grad as well. Logits computed by a model are valid; "
            "for a leaf set inplace_backward=False."
        )


def ranks_of(group: Any) -> int:
    """How many ranks the process group has. InputError where it is none, or this rank is not one of its ranks."""
    if group == distributed.GroupMember.NON_GROUP_MEMBER:
        raise InputError(
            "got the group NON_GROUP_MEMBER, which new_group returns where this rank is not one of its ranks; a group "
            "that it is part of is valid. Call on the ranks of the group alone."
        )
    if not hasattr(group, "size") or not hasattr(group, "rank"):
        raise InputError(
            f"got group={group!r}; a process group of torch.distributed is valid, e.g. distributed.group.WORLD or "
            "mesh.get_group('tp'), on each of its ranks."
        )
    if group.rank() < 0:
        raise InputError("got a group that this rank is not part of. Call on the ranks of the group alone.")
    return int(group.size())
