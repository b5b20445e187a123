"""Why a function is wrong: what its numbers would be right for, found by computing that and comparing.

Shapes: N rows, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from compiled_logprobs.check.cases import IGNORE_INDEX, PADDING
from compiled_logprobs.check.causes_of_gradients import about_backward, about_gradient
from compiled_logprobs.check.causes_of_results import about_results
from compiled_logprobs.check.causes_of_values import VALUES, about_nan, about_values
from compiled_logprobs.check.function import Function
from compiled_logprobs.check.hidden_function import HiddenFunction
from compiled_logprobs.check.over_ranks import FunctionOverRanks
from compiled_logprobs.check.probe import ROWS, Got, Probe, Raised
from compiled_logprobs.check.readings import CLOSE, COARSELY, log_probs_of, same
from compiled_logprobs.problem import Problem, results_of, short_name

NUMBER_A_TOKEN = "a number a token is expected, as torch's losses give with reduction='none'"
ALWAYS = {
    "outside_write": "writes beyond what it may: a kernel without a mask at the end of a row, or strided rows taken "
    "for contiguous ones",
    "zero_upstream": "gives a gradient, or NaN, where the upstream gradient is 0, as of a token that a mask leaves out "
    "of the loss: a division by it, or a 0 taken for none",
    "frozen_gradient": "writes a gradient into an output layer that requires none: go by needs_input_grad",
    "own_memory": "keeps for the backward what it also returns, where whoever writes into a result changes the "
    "gradient: keep a copy",
    "same_on_ranks": "gives other numbers on other ranks: what each has of its own has to be summed over all",
    "random_state": "seeds torch's random generators, Python's or NumPy's, or draws from them: use a torch.Generator "
    "of its own",
    "modes": "changes a mode of torch for all that comes after, such as gradients, the default dtype or the number of "
    "threads: change it in a with block, or not at all",
    "version_counter": "writes the gradient over the logits without telling autograd, so that others who saved them "
    "read it as logits; bump the version counter",
    "stale_result": "hands out memory that a later call writes again; return a tensor of its own",
    "grad_mode_bits": "takes another path where a gradient is needed, so that ratios of new to old probability do not "
    "start at exactly 1",
}
"""What a failed check says by itself."""


def likely_causes(
    function: Function, problem: Problem, failed: frozenset[str], device: torch.device, seed: int, ignore_index: bool
) -> list[str]:
    """What is probably wrong with a function that failed the checks `failed` on `problem`; the first explains most.

    It is called a few times more, with ordinary inputs. Where nothing is recognised the list is empty.
    """
    ordinary = problem._replace(masked_logits=False, inplace_backward=False)
    probe = Probe(function, ordinary, device, seed, problem.masked_logits)
    causes: list[str] = []
    try:
        causes += _about_calling(probe, failed, ignore_index)
        causes += _about_kind(probe, failed)
        overwrites = [*_about_inputs(probe, failed)]
        remembers = [] if overwrites else [*_about_state(probe, failed)]
        causes += overwrites + remembers
        if remembers:  # what its numbers are then tells nothing
            return causes
        causes += about_values(probe, failed)
        if not overwrites and probe.formula_is_right:  # otherwise what follows would tell only what comes of that
            for about in (about_gradient, about_results, about_nan):
                causes += about(probe, failed)
        causes += _about_ignored(probe, failed)
        # Some are consequences.
        failed -= {"stale_result", "grad_mode_bits"} if overwrites else set()
        failed -= {"zero_upstream"} if failed & VALUES else set()
    except Raised as raised:
        if not causes and "outside_write" not in failed:  # where a write that goes nowhere here has been seen
            causes.append(f"{'fails' if 'result_type' in failed else 'raises'} for an ordinary input: {raised}")
            if device.type == "cpu" and any(word in str(raised).lower() for word in ("cuda", "triton", "gpu")):
                causes[-1] += (
                    ". The inputs are on a CPU: check it where its device is, or name that by device= (--device)"
                )
    causes += [words for name, words in ALWAYS.items() if name in failed]
    return list(dict.fromkeys(causes))


def _about_calling(probe: Probe, failed: frozenset[str], ignore_index: bool) -> Iterator[str]:
    if "runs" not in failed:
        return
    if probe.raises(probe.logits, probe.labels) is not None:
        for what, expressions in probe.function.other_calls:
            other = replace(probe, function=probe.function.called_with(**expressions))
            if other.raises(other.logits, other.labels) is None:
                yield f'takes {what}: say call="{other.function.call}" (--call)'
                return
        return
    raised = probe.raises(probe.logits, probe.some_ignored) if ignore_index else None
    if raised is not None:
        yield (
            f"has no ignored labels, and raises {raised.partition(':')[0]} for those of {IGNORE_INDEX}: mask them "
            "first, or leave them out of the check with ignore_index=False (--no-ignore-index)"
        )
    for count, what in ((0, "an empty batch"), (1, "a batch of one row")):
        raised = probe.raises(probe.logits[:count], probe.labels[:count])
        if raised is not None:
            yield f"raises for {what} ({raised})"
    apart = probe.logits.new_zeros(ROWS, probe.problem.vocab + PADDING)[:, : probe.problem.vocab]
    raised = probe.raises_as_it_lies(apart.copy_(probe.logits), probe.labels)
    if raised is not None:
        yield f"raises for rows with memory between them ({raised}): reshape where it says view"
    for name in ("", *(name for name in results_of(probe.problem) if name != "argmax")):
        raised = about_backward(probe, name)
        if raised is not None:
            yield f"raises in {f'the {name}'.replace('_', ' ') + chr(39) + 's' if name else 'its'} backward ({raised})"


def _about_kind(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    got = probe.run()
    first = got.first()
    if first is not None and first.device != probe.logits.device:
        raise Raised(f"its result is on {first.device}, and the logits on {probe.logits.device}: return it there")
    if first is None:
        kind = "None" if got.result is None else f"a {type(got.result).__name__}"
        yield f"returns {kind}, and no tensor: return the log-probability of each label, [N] in float32"
        return
    if isinstance(got.result, (tuple, list)):
        kinds = [str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in got.result]
        results = f"{len(kinds)} results ({', '.join(kinds)})"
        yield f"returns {results} where one is expected: wrap it, and return the one that is meant"
    shape = list(first.shape)
    if first.ndim == 0:
        truth = log_probs_of(got.model, probe.labels, probe.temperature)
        for what, total in (("mean", truth.mean()), ("sum", truth.sum())):
            for of, sign in (("losses", -1), ("log-probabilities", 1)):
                if same(first.detach().double(), sign * total, COARSELY / 2):
                    yield f"returns the {what} of the {of} over the batch, where {NUMBER_A_TOKEN}"
                    return
        yield f"returns one number for the whole batch, where {NUMBER_A_TOKEN}"
    elif shape == [ROWS, 1]:
        yield "keeps a trailing dimension of 1: squeeze it"
    elif shape == [ROWS - 1]:
        shifted = log_probs_of(got.model[:-1], probe.labels[1:], probe.temperature)
        for words, sign in (("", 1), (", and returns the loss", -1)):
            if same(sign * first.detach().double(), shifted, 4 * COARSELY):
                yield f"shifts the labels itself, so that logits [N, V] and labels [N] give N - 1 results{words}"
                return
        yield "returns one result too few"
    elif shape != [ROWS]:
        yield f"returns {shape} for {ROWS} labels"
    if "dtype" in failed and first.dtype != torch.float32:
        step = torch.finfo(first.dtype).eps * 8 if first.dtype.is_floating_point else math.nan
        steps = f", which has steps of {step:.2g} nats at -10" if first.dtype.itemsize == 2 else ""
        yield f"returns {short_name(first.dtype)}{steps}: give float32"


_NEW_SIZES = itertools.cycle(range(142, 252))
"""Rows, as no other input has: others in each check of a process, since a function may remember those of earlier
ones."""


def _about_state(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    if not failed & (VALUES | {"ignored_rows"}):
        return
    memory = probe.logits.clone()

    def numbers(logits: Tensor = memory, labels: Tensor = probe.labels) -> Tensor:
        with torch.no_grad():
            result = probe.call(logits, labels.clone())
        rows = Got(result, logits, logits).rows()
        return torch.empty(0) if rows is None else rows.clone()

    calls = [numbers() for _ in range(4)]
    memory.copy_(probe.new_logits())
    other = numbers()
    if not len(calls[0]) or not len(other):
        return
    if "random_state" in failed and not all(torch.equal(rows, calls[0]) for rows in calls):
        yield "gives other numbers when it is called again, and draws random ones: a dropout that is left on, or noise"
    elif not all(
        torch.equal(rows.nan_to_num(), calls[0].nan_to_num()) or same(rows, calls[0], CLOSE) for rows in calls
    ):
        yield "gives other numbers when it is called again with the same input: it remembers something"
    elif torch.equal(other, calls[0]) and bool((other != other[0]).any()):
        # Probabilities may all be near 0, and so near one another.
        yield "gives the old result for new values in the same memory: it remembers results by address or shape"
    else:
        # Of two sizes that it has not seen, right for the labels that come first, whichever these are.
        with suppress(Raised):
            is_right = []
            for order in ((probe.some_ignored, probe.labels), (probe.labels,)):
                size = next(_NEW_SIZES)
                if isinstance(probe.function, FunctionOverRanks):
                    (size, *_) = probe.function.told(size)  # which one rank may have counted on by itself
                rows = torch.arange(size, device=memory.device) % ROWS
                for labels in order:
                    due = log_probs_of(memory, labels.clamp(min=0), probe.temperature)
                    due = due.masked_fill(labels == IGNORE_INDEX, 0.0)[rows]
                    is_right.append(same(probe.sign * numbers(memory[rows], labels[rows]), due, 4 * COARSELY))
            if is_right == [True, False, True]:
                yield "goes by earlier labels for others of the same shape: it remembers something by shape"


def _about_ignored(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    if "ignored_rows" not in failed:
        return
    rows, ignored = probe.run(labels=probe.some_ignored).rows(), probe.some_ignored == IGNORE_INDEX
    remedy = "Mask them, or check with ignore_index=False (--no-ignore-index)"
    for name in results_of(probe.problem):
        result, due = probe.run(labels=probe.some_ignored, asked=name).other(), -1 if name == "argmax" else 0
        if result is not None and bool((result[ignored] != due).any()):
            what = f"a{'n' if name[0] in 'ae' else ''} {name.replace('_', ' ')}"
            yield f"does not give {what} of {due} for labels of {IGNORE_INDEX}. {remedy}"
    if rows is None:
        return
    got, logits = rows[ignored], probe.logits[ignored]
    for words, token in (("token 0", 0), (f"token V - {-IGNORE_INDEX}", probe.problem.vocab + IGNORE_INDEX)):
        expected = log_probs_of(logits, torch.full((len(logits),), token, device=logits.device), probe.temperature)
        if same(got.abs(), expected.abs(), 4 * COARSELY):
            yield f"does not know ignored labels: {IGNORE_INDEX} counts as {words}. {remedy}"
            return
    if probe.formula_is_right and not bool((got == 0).all()):
        if bool((got == got[0]).all()):
            yield f"gives {float(got[0]):.4g} for labels of {IGNORE_INDEX}, where 0 is expected. {remedy}"
        else:
            yield f"does not give 0 for labels of {IGNORE_INDEX}. {remedy}"


def _about_inputs(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    if "inputs_changed" not in failed or isinstance(probe.function, HiddenFunction):  # which has others
        return
    got = probe.run()
    before, after, first = got.model.detach().double(), got.logits.double(), got.first()
    shifted = before - before.amax(-1, keepdim=True)
    over = {
        "divides the logits by the temperature in place: the next who reads them divides once more": before
        / probe.temperature,
        "subtracts the maximum from the logits in place": shifted,
        "writes the exponentials over the logits": shifted.exp(),
        "writes the softmax over the logits": (before / probe.temperature).softmax(-1),
        "writes the log-probabilities over the logits": (before / probe.temperature).log_softmax(-1),
    }
    words = "writes over its arguments: take a copy of what is changed"
    changed = probe.function.overwritten()
    if not changed:
        probe.call(probe.logits.clone(), probe.labels.clone())  # which require no gradient
        changed = probe.function.overwritten()
    if changed:
        words = f"changes the {changed[0].removesuffix(' was')}: whoever has it uses it afterwards"
    elif same(after, before, 0.0):
        words = _about_inputs_later(probe, got, before, first) or words
    else:
        words = next((what for what, values in over.items() if same(after, values, COARSELY)), words)
    yield words


def _about_inputs_later(probe: Probe, got: Got, before: Tensor, first: Tensor | None) -> str:
    """What is written in backward, or beside ignored labels."""
    if first is not None and first.requires_grad:
        with suppress(Raised):
            probe.gradient(first, got, torch.ones_like(first).detach().reshape(-1))
        after = got.logits.double()
        if not same(after, before, 0.0):
            if same(after, before, CLOSE):
                return "changes the logits and changes them back, which rounds them: compute in memory of its own"
            return "writes the gradient over the logits, unasked: whoever reads them afterwards reads the gradient"
    got, ignored = probe.run(labels=probe.some_ignored), probe.some_ignored == IGNORE_INDEX
    if not bool(got.logits[ignored].any()) and bool(before[ignored].any()):
        return "writes 0 over the logits of ignored labels: whoever reads them afterwards reads 0"
    return ""
