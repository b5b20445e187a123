"""How large the inputs of a problem are: of the first calls, of the rounds, and where the winner is looked at.

Of logits N shrinks where time or memory is short. From hidden states V does, and N only then: all that there is to do
grows with V in proportion, while a chunk has its number of rows, and a weight's gradient costs few rows as much as
many.

Shapes: N rows, H hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch

from compiled_logprobs.machine.clock import free_memory
from compiled_logprobs.problem import Problem, accumulation_dtype

BUFFERS = 2
"""How many inputs take turns, so that no candidate can live on having seen one before."""
SHARE_OF_FREE_MEMORY = 0.5
"""What the check, the rounds and plain torch may take of it, each."""
PILOT_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Size of the first calls, which compile, and tell how long a round would take: by what the device takes for a row, and
not by what the host takes for a call. From hidden states less by as much as H is more than `PILOT_HIDDEN`."""
PILOT_HIDDEN = 1024
LEAST_PILOTS = {"cpu": 1 / 4}
"""From hidden states: of the size of the first calls, what rounds have at least. A CPU has nobody to wait for, and less
lets a first call's budget have rounds enough for a choice."""
LEAST_VOCAB = 2048
"""V to which the vocabulary shrinks at most."""
MULTIPLE = 128
"""Columns that are left out are a multiple of it, so that the others lie in memory as all do."""


class Sizes:
    """Of one problem of logits on one device: what is timed is the problem with fewer rows."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._problem, self._device = problem, device
        self._extra_multiple = problem.needs_grad + 1.0

    def learn(self, extra_multiple: float | None) -> None:
        """Reckon with a candidate that takes so many times the logits."""
        self._extra_multiple = max(self._extra_multiple, extra_multiple or 0.0)

    def pilot(self, is_able: Callable[[Problem], bool]) -> Problem:
        """For the first calls of a candidate, which has to be able to run it."""
        rows = min(max(2, self._fewest()), self._rows_in_memory(BUFFERS))
        return self._problem._replace(rows=max(1, min(self._problem.rows, int(rows))))

    def that_fit(self, logits: float, is_able: Callable[[Problem], bool]) -> Problem:
        """The largest, of the problem's N or the top of a bucket below, whose rounds fit into memory, and into time
        where that is enough for so many logits; all candidates have to be able to run it."""
        rows = max(logits / self._problem.vocab, self._fewest())
        rows = min(self._problem.rows, rows, self._rows_in_memory(BUFFERS))
        return self._problem._replace(rows=top_within(int(rows)))

    def smaller(self, timed: Problem) -> Problem | None:
        """What is worth a try where memory was too short; None if nothing is."""
        return None if timed.rows == 1 else timed._replace(rows=timed.rows // 2)

    def of_look(self, timed: Problem, logits: float) -> Problem | None:
        """What the winner is called with after the rounds; None if that is no more than was timed."""
        rows = int(min(self._problem.rows, self._rows_in_memory(1), logits / self._problem.vocab))
        return None if rows <= timed.rows else self._problem._replace(rows=rows)

    def _fewest(self) -> int:
        return PILOT_LOGITS[self._device.type] // self._problem.vocab

    def _rows_in_memory(self, buffers: int) -> float:
        # Inputs, the original of those that are overwritten, and what candidates take, gradient included.
        copies = buffers + self._problem.inplace_backward + self._extra_multiple
        return self._room() / (copies * self._problem.vocab * self._problem.dtype.itemsize)

    def _room(self) -> float:
        return SHARE_OF_FREE_MEMORY * free_memory(self._device)


class SizesFromHidden(Sizes):
    """Of one problem from hidden states: what is timed is the problem with fewer columns and, at need, fewer rows."""

    def pilot(self, is_able: Callable[[Problem], bool]) -> Problem:
        return self._with(self._fewest_logits(), is_able)

    def that_fit(self, logits: float, is_able: Callable[[Problem], bool]) -> Problem:
        least = LEAST_PILOTS.get(self._device.type, 1) * self._fewest_logits()
        return self._with(max(logits, least), is_able)

    def smaller(self, timed: Problem) -> Problem | None:
        if timed.vocab > MULTIPLE:
            return timed._replace(vocab=self._columns(timed.vocab // 2))
        return super().smaller(timed)

    def of_look(self, timed: Problem, logits: float) -> Problem | None:
        whole = self._problem
        fits = whole.rows * whole.vocab <= logits and self._bytes(whole) <= self._room()
        return whole if fits and timed != whole else None

    def _with(self, logits: float, is_able: Callable[[Problem], bool]) -> Problem:
        whole = self._problem
        vocab = self._columns(max(int(logits) // max(1, whole.rows), LEAST_VOCAB))
        rows = whole.rows if vocab * whole.rows <= logits else min(whole.rows, top_within(int(logits) // vocab))
        while rows < whole.rows and not is_able(whole._replace(rows=rows, vocab=vocab)):
            rows = min(whole.rows, 2 * rows)
        while self._bytes(whole._replace(rows=rows, vocab=vocab)) > self._room() and (vocab > MULTIPLE or rows > 1):
            vocab, rows = (self._columns(vocab // 2), rows) if vocab > MULTIPLE else (vocab, rows // 2)
        return whole._replace(rows=rows, vocab=vocab)

    def _columns(self, most: int) -> int:
        """The vocabulary, or the top of a bucket below that lies as it does: the same for budgets that are alike."""
        whole = self._problem.vocab
        if most >= whole:
            return whole
        return min(whole, max(MULTIPLE, top_within(most) // MULTIPLE * MULTIPLE) + whole % MULTIPLE)

    def _fewest_logits(self) -> int:
        hidden = max(PILOT_HIDDEN, self._problem.hidden or 0)
        return PILOT_LOGITS[self._device.type] * PILOT_HIDDEN // hidden

    def _bytes(self, timed: Problem) -> int:
        """What candidates take with all inputs, about."""
        size, wide, hidden = timed.dtype.itemsize, accumulation_dtype(timed.dtype).itemsize, timed.hidden or 1
        of_weight = timed.vocab * hidden * (size + timed.weight_grad * (size + wide))
        of_hidden = timed.rows * hidden * ((BUFFERS + 1) * size + wide)
        a_logit = size * self._extra_multiple + timed.softcap * wide
        return int(of_weight + of_hidden + timed.rows * timed.vocab * a_logit)


def sizes_of(problem: Problem, device: torch.device) -> Sizes:
    """By what the problem has."""
    return (Sizes if problem.hidden is None else SizesFromHidden)(problem, device)


def top_within(rows: int) -> int:
    """The top of the last bucket of N that holds at most so many rows, which has at least one."""
    octave = 1 << (max(1, rows).bit_length() - 1)
    return octave * 3 // 2 if octave > 1 and rows >= octave * 3 // 2 else octave
