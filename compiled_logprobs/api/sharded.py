"""Logits of which this rank has only some columns: which they are, by the arguments or by a DTensor."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from compiled_logprobs.arguments import check_logits, is_dtensor, ranks_of
from compiled_logprobs.backends import EAGER, get_backend
from compiled_logprobs.errors import InputError
from compiled_logprobs.operation.contract import Wanted
from compiled_logprobs.problem import Problem


class Part(NamedTuple):
    """What this rank has of a vocabulary that is split over several."""

    group: Any
    start: int
    columns: int
    """0 for a rank that has none, whose logits are one column of -inf."""
    vocab: int

    def wanted_of_backend(self, wanted: Wanted) -> Wanted:
        """What the backend has to be able to return, and to take a gradient of."""
        if wanted.argmax:
            raise InputError(
                f"got return_argmax=True for a vocabulary that is split over {self.group.size()} ranks; False is "
                "valid there, since it would need a collective of its own. Ask for it on gathered logits."
            )
        return wanted._replace(logsumexp=True)

    def backend_of(self, name: str, problem: Problem) -> str:
        """The name of what computes this rank's columns: where it has none, eager, since a named one may need some."""
        if name == "auto" or self.columns:
            return name
        get_backend(name, problem)  # raises where there is none of this name, as on the other ranks
        return EAGER

    def error_in_graph(self) -> InputError:
        """What a call in a graph is told."""
        return InputError(
            f"got a vocabulary that is split over {self.group.size()} ranks, while tracing; "
            "outside of graphs it is served. Put the call into a function under torch.compiler.disable."
        )


def part_of(
    logits: Tensor, group: Any, vocab_start_index: int | None, vocab_size: int | None
) -> tuple[Tensor, Part | None]:
    """The columns that this rank has, without the padding, and which they are; None where they are all.

    Arguments as for `log_probs_from_logits`, `logits` maybe a DTensor.
    """
    if is_dtensor(logits):
        if not group is vocab_start_index is vocab_size is None:
            raise InputError(
                "got a DTensor beside group, vocab_start_index or vocab_size; one or the other is valid. Pass the "
                "DTensor alone, whose placements say which columns lie here, or logits.to_local() and the group."
            )
        return _part_of_dtensor(logits)
    check_logits(logits, least_columns=int(group is None))
    ranks = 1 if group is None else ranks_of(group)
    held = logits.shape[-1]
    if vocab_start_index is not None and (group is None or vocab_size is None):
        missing = "group" if group is None else "vocab_size"
        raise InputError(
            f"got vocab_start_index={vocab_start_index!r} without {missing}; both beside it are valid. Pass the "
            "process group that the vocabulary is split over, and vocab_size, its number of columns in all."
        )
    if vocab_size is None:
        vocab_size = ranks * held
    start = vocab_start_index if vocab_start_index is not None else 0 if ranks == 1 else group.rank() * held
    for name, number, least, most in (
        ("vocab_size", vocab_size, 1, math.inf if ranks > 1 else held),
        ("vocab_start_index", start, 0, math.inf if ranks > 1 else 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
            valid = f"an integer from {least}" + ("" if most == math.inf else f" to {most}")
            raise InputError(
                f"got {name}={number!r} for logits of {held} columns on one of {ranks} ranks; {valid} is valid. "
                "Padding comes after the columns of the vocabulary."
            )
    columns = max(0, min(held, vocab_size - start))
    return _part(logits, group if ranks > 1 else None, start, columns, vocab_size)


def part_of_weight(
    weight: Tensor, bias: Tensor | None, group: Any, vocab_start_index: int | None, vocab_size: int | None
) -> tuple[Tensor, Tensor | None, Part | None]:
    """The same of a weight [columns, H] and a bias [columns]; a rank without columns has one with a bias of -inf.

    Both stay differentiable in what was given, though with nothing but zeros.
    """
    if group is vocab_start_index is vocab_size is None:
        return weight, bias, None
    held = weight.shape[0]
    logits, part = part_of(weight.T, group, vocab_start_index, vocab_size)
    columns = logits.shape[-1] if part is None else part.columns
    if columns == 0:
        weight = functional.pad(weight[:0], (0, 0, 0, 1))
        bias = weight.new_empty(0) if bias is None else bias[:0]
        return weight, functional.pad(bias, (0, 1), value=-torch.inf), part
    if columns < held:
        weight, bias = weight[:columns], None if bias is None else bias[:columns]
    return weight, bias, part


def of_all_rows(labels: Tensor) -> Tensor:
    """Labels or temperatures as a plain tensor, of a replicated DTensor or as they are."""
    if not is_dtensor(labels):
        return labels
    placements = cast(Any, labels).placements
    if not all(placement.is_replicate() for placement in placements):
        raise InputError(
            f"got labels or a temperature as a DTensor with {placements}; a plain tensor or a replicated one is valid. "
            "Call redistribute(placements=[Replicate()] * its device_mesh.ndim) on it."
        )
    return cast(Tensor, cast(Any, labels).to_local())


def _part_of_dtensor(logits: Any) -> tuple[Tensor, Part | None]:
    mesh, last = logits.device_mesh, logits.ndim - 1
    split = [
        dim
        for dim, (placement, ranks) in enumerate(zip(logits.placements, mesh.shape, strict=True))
        if ranks > 1 and not placement.is_replicate()
    ]
    held = [logits.placements[dim] for dim in split]
    if len(split) > 1 or not all(placement.is_shard(last) or placement.is_shard(-1) for placement in held):
        summed = ", ".join("Replicate()" if each.is_partial() else repr(each) for each in logits.placements)
        remedy = (
            f"Call logits.redistribute(placements=[{summed}]) first, which adds the partial sums up"
            if any(placement.is_partial() for placement in held)
            else "Pass logits.to_local() and the labels of its rows, and where the vocabulary is split as well, "
            "group=device_mesh.get_group(...) of that dimension, vocab_start_index and vocab_size"
        )
        raise InputError(
            f"got logits as a DTensor with {logits.placements} over a mesh of {tuple(mesh.shape)}; replicated ones and "
            f"a shard of the last dimension over one dimension of the mesh are valid. {remedy}."
        )
    local: Tensor = logits.to_local()
    vocab = logits.shape[-1]
    if not split:
        return _part(local, None, 0, vocab, vocab)
    width = -(-vocab // mesh.shape[split[0]])  # of all but the last, as torch.chunk has it
    start = min(vocab, mesh.get_local_rank(split[0]) * width)
    return _part(local, mesh.get_group(split[0]), start, local.shape[-1], vocab)


def _part(logits: Tensor, group: Any, start: int, columns: int, vocab: int) -> tuple[Tensor, Part | None]:
    if columns == 0:
        # A rank without columns takes part in the collectives, and its graph goes on to what made them.
        logits = functional.pad(logits.narrow(-1, 0, 0), (0, 1), value=-torch.inf)
    elif columns < logits.shape[-1]:
        logits = logits.narrow(-1, 0, columns)
    return logits, None if group is None else Part(group, start, columns, vocab)
