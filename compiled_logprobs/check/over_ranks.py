"""A function of a rank's columns, as one of whole logits: what the ranks of a group return, put together.

All ranks go through the same check with the same inputs, and see the same results, so that all go the same way: their
collectives meet.

Shapes: R rows, V vocabulary, C = V / ranks the columns of one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from compiled_logprobs.arguments import ranks_of
from compiled_logprobs.check.cases import IGNORE_INDEX, same_bits
from compiled_logprobs.check.function import Function, Returns
from compiled_logprobs.errors import InputError, nothing_can_serve_after
from compiled_logprobs.problem import Problem


class RaisedElsewhere(Exception):
    """Another rank raised; says what."""


class FunctionOverRanks(Function):
    """A function that takes the columns of one rank, whose results are to be those of all, on all ranks."""

    def __init__(self, function: Callable[..., Any], group: Any, call: str | None, returns: Returns) -> None:
        super().__init__(function, call, returns)
        ranks_of(group)  # raises for what is none
        self.group, self.differs = group, False
        """`differs`: whether a rank has returned other numbers than another in the last call."""

    def within(self, problem: Problem) -> Problem:
        """As of any function, but without what no function does over ranks, or cannot be watched there."""
        if problem.vocab % self.group.size():
            raise InputError(
                f"got a vocabulary of {problem.vocab} for {self.group.size()} ranks; a multiple is valid, of which all "
                "have as many columns. Round it up."
            )
        return super().within(problem)._replace(argmax=False, inplace_backward=False)

    def _called_so(self, call: str) -> "FunctionOverRanks":
        return FunctionOverRanks(self._function, self.group, call, self.returns)

    def returned(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        problem: Problem,
        ignore_index: int = IGNORE_INDEX,
    ) -> Any:
        """What the ranks return: of each row the numbers of the rank that has its label."""
        columns: Tensor = _Columns.apply(logits, self.group)  # type: ignore[no-untyped-call]  # torch's gap
        raised, result = None, None
        try:
            result = super().returned(columns, labels, temperature, problem, ignore_index)
        except (Exception, SystemExit) as error:  # whatever it is, the other ranks have to be told
            if nothing_can_serve_after(error):
                raise
            raised = error
        parts = tuple(result) if isinstance(result, tuple) else (result,)
        kinds = [(part.dtype, part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        said = "" if raised is None else f"{type(raised).__name__}: {raised}"
        flows = [isinstance(part, Tensor) and part.requires_grad for part in parts]
        told = self.told((said, kinds, flows))
        if raised is not None:
            raise raised
        for rank, (words, others, _) in enumerate(told):
            if words or others != kinds:
                what = f"raises {words}" if words else f"returns {others}, and {kinds} on this one"
                raise RaisedElsewhere(f"rank {rank} {what}")
        if not all(isinstance(part, Tensor) for part in parts):
            return result
        owner = (labels[..., 0] // columns.shape[-1]).clamp(0, len(told) - 1).reshape(-1)
        each = [_gathered(part.detach(), self.group) for part in parts]
        self.differs = not all(same_bits(values, of_rank[0]) for of_rank in each for values in of_rank)
        whole = tuple(
            _Agreed.apply(columns, part, _chosen(of_rank, owner))  # type: ignore[no-untyped-call]  # torch's gap
            if any(flow[number] for *_, flow in told)
            else _chosen(of_rank, owner)
            for number, (part, of_rank) in enumerate(zip(parts, each, strict=True))
        )
        return whole if isinstance(result, tuple) else whole[0]

    def told(self, words: Any) -> list[Any]:
        """What each rank says, in their order."""
        all_words: list[Any] = [None] * self.group.size()
        distributed.all_gather_object(all_words, words, group=self.group)
        return all_words


class _Columns(torch.autograd.Function):
    """This rank's columns [R, C] of logits [R, V], in their memory; backward puts the gradients of all together."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: Any) -> Tensor:
        ctx.group = group
        width = logits.shape[-1] // group.size()
        offset = logits.storage_offset() + group.rank() * width * logits.stride(-1)
        return logits.new_empty(0).set_(logits.untyped_storage(), offset, (*logits.shape[:-1], width), logits.stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.cat(_gathered(gradients[0], ctx.group), -1), None


class _Agreed(torch.autograd.Function):
    """The numbers that the check is shown in place of a rank's own, to which the gradient goes."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, own: Tensor, shown: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        return shown

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        # To the columns as well, so that all ranks have a backward where a number does not depend on its own ones.
        return torch.zeros_like(ctx.saved_tensors[0]), gradients[0], None


def _gathered(values: Tensor, group: Any) -> list[Tensor]:
    """Those of each rank, in their order."""
    values = values.contiguous()
    received = [torch.empty_like(values) for _ in range(group.size())]
    # As bytes, since not every group moves every dtype.
    distributed.all_gather(
        [each.view(-1).view(torch.uint8) for each in received], values.view(-1).view(torch.uint8), group=group
    )
    return received


def _chosen(of_ranks: list[Tensor], owner: Tensor) -> Tensor:
    """Of each row the numbers of its label's owner; of what has no rows those of the first rank."""
    first = of_ranks[0]
    if first.numel() != owner.numel():
        return first.clone()
    return torch.stack(of_ranks).view(len(of_ranks), -1).gather(0, owner[None]).view(first.shape)
