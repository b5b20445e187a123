"""Why a function is wrong: what its numbers would be right for, found by computing that and comparing.

Shapes: N rows, V vocabulary.
"""

import itertools
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.check.cases import IGNORE_INDEX
from compiled_logprobs.check.function import CALL, Function
from compiled_logprobs.check.readings import CLOSE, COARSELY, LOSS, TOLERANCES, imprecision, log_probs_of, read, same
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.problem import RESULTS, Problem, short_name

NUMBER_A_TOKEN = "a number a token is expected, as torch's losses give with reduction='none'"
ROWS = 12
TORCH = Path(torch.__file__).parent
TEMPERATURE = 1.7
"""Its square, its inverse and 1 are far from it and from one another."""
ALWAYS = {
    "outside_write": "writes beyond what it may: a kernel without a mask at the end of a row, or strided rows taken "
    "for contiguous ones",
    "version_counter": "writes the gradient over the logits without telling autograd, so that others who saved them "
    "read it as logits; bump the version counter",
    "stale_result": "hands out memory that a later call writes again; return a tensor of its own",
    "grad_mode_bits": "takes another path where a gradient is needed, so that ratios of new to old probability do not "
    "start at exactly 1",
}
"""What a failed check says by itself."""

VALUES = frozenset({"log_prob_error", "log_prob_rmse"})
GRADIENT = frozenset({"gradient_flows", "gradient_error", "gradient_rmse", "gradient_sign", "gradient_row_sum"})
ENTROPY = frozenset({"entropy_sign", "entropy_error", "entropy_rmse"})


def likely_causes(
    function: Function, problem: Problem, failed: frozenset[str], device: torch.device, seed: int, ignore_index: bool
) -> list[str]:
    """What is probably wrong with a function that failed the checks `failed` on `problem`; the first explains most.

    It is called a few times more, with ordinary inputs. Where nothing is recognised the list is empty.
    """
    probe = _Probe(function, problem._replace(masked_logits=False, inplace_backward=False), device, seed)
    causes: list[str] = []
    try:
        causes += _about_calling(probe, failed, ignore_index)
        causes += _about_kind(probe, failed)
        overwrites = [*_about_inputs(probe, failed)]
        remembers = [] if overwrites else [*_about_state(probe, failed)]
        causes += overwrites + remembers
        if remembers:  # what its numbers are then tells nothing
            return causes
        causes += _about_values(probe, failed)
        if not overwrites and probe.formula_is_right:  # otherwise what follows would tell only what comes of that
            for about in (_about_gradient, _about_entropy, _about_nan):
                causes += about(probe, failed)
        causes += _about_ignored(probe, failed)
        failed -= {"stale_result", "grad_mode_bits"} if overwrites else set()  # which are consequences
    except _Raised as raised:
        if not causes and "outside_write" not in failed:  # where a write that goes nowhere here has been seen
            causes.append(f"raises for an ordinary input: {raised}")
    causes += [words for name, words in ALWAYS.items() if name in failed]
    return list(dict.fromkeys(causes))


class _Raised(Exception):
    """The function raised; says what."""


class _Got(NamedTuple):
    """What came of one call."""

    result: Any
    logits: Tensor
    """As they are afterwards."""
    model: Tensor
    """What the logits were computed from, and a gradient can be taken in; it keeps its values."""

    def first(self) -> Tensor | None:
        """The first tensor among the results."""
        parts = self.result if isinstance(self.result, (tuple, list)) else (self.result,)
        return next((part for part in parts if isinstance(part, Tensor)), None)

    def rows(self) -> Tensor | None:
        """[N] float64, if there is a number a row."""
        first = self.first()
        return first.detach().double().reshape(-1) if first is not None and first.numel() == len(self.model) else None

    def other(self) -> Tensor | None:
        """What is returned beside the log-probabilities, if it is a number a row."""
        pair = self.result if isinstance(self.result, tuple) and len(self.result) == 2 else (None, None)
        return pair[1] if isinstance(pair[1], Tensor) and pair[1].shape == (len(self.model),) else None


@dataclass
class _Probe:
    """A function, and ordinary inputs for it."""

    function: Function
    problem: Problem
    device: torch.device
    seed: int
    formula_is_right: bool = True
    """Whether what it returns is the log-probability, but for precision; as far as is known."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.sign = -1 if self.function.returns == "loss" else 1
        self.temperature = 1.0 if self.problem.temperature == "none" else TEMPERATURE
        self.logits = self.new_logits()
        vocab = self.problem.vocab
        # Half of them from the upper half, where an index that is too narrow and a forgotten block show.
        labels = torch.randint(vocab, (ROWS,), generator=self.generator, device=self.device)
        self.labels = torch.where(torch.arange(ROWS, device=self.device) % 2 == 0, labels, vocab - 1 - labels // 2)
        self.some_ignored = self.labels.clone()
        self.some_ignored[1::3] = IGNORE_INDEX

    def new_logits(self) -> Tensor:
        shape = ROWS, self.problem.vocab
        return (3.0 * torch.randn(shape, generator=self.generator, device=self.device)).to(self.problem.dtype)

    def run(self, logits: Tensor | None = None, labels: Tensor | None = None, *, asked: str = "") -> _Got:
        """Call it, for log-probabilities and what is asked for beside them; raises _Raised."""
        model = (self.logits if logits is None else logits).clone().requires_grad_()
        labels = self.labels if labels is None else labels
        given = model.clone()  # not a leaf, since a function may write into what a model gave it
        result = self.call(given, labels.clone(), asked=asked)
        return _Got(result, given.detach(), model)

    def call(self, logits: Tensor, labels: Tensor, *, asked: str = "") -> Any:
        """What it returns, as it is; raises _Raised."""
        results: dict[str, Any] = {name: name == asked for name in RESULTS}
        problem = self.problem._replace(**results)
        try:
            return self.function.returned(logits, labels.unsqueeze(-1), self.temperature, problem)
        except (Exception, SystemExit) as error:  # whatever a function raises is what is looked into here
            if nothing_can_serve_after(error):
                raise
            raise _Raised(_in_words(error)) from error

    def raises(self, logits: Tensor, labels: Tensor) -> str | None:
        """What it raises for these, if it does."""
        try:
            self.run(logits, labels)
        except _Raised as raised:
            return str(raised)
        return None


def _in_words(error: BaseException) -> str:
    """What was raised and, where that can be told from its traceback, by which line."""
    said = str(error).strip().splitlines()[:1]
    frames = itertools.dropwhile(lambda frame: frame.filename != CALL, traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if frame.filename != CALL and not Path(frame.filename).is_relative_to(TORCH)]
    where = f" (line {own[-1].lineno} of {Path(own[-1].filename).name}: {own[-1].line})" if own else ""
    return ": ".join([type(error).__name__, *said]) + where


def _about_calling(probe: _Probe, failed: frozenset[str], ignore_index: bool) -> Iterator[str]:
    if "runs" not in failed:
        return
    if probe.raises(probe.logits, probe.labels) is not None:
        for what, *arguments in (
            ("logits and labels the other way round", "labels", "logits"),
            ("a batch of sequences", "logits[None]", "labels[None]"),
        ):
            other = replace(probe, function=probe.function.called_with(*arguments))
            if other.raises(other.logits, other.labels) is None:
                yield f'takes {what}: say --call "{other.function.call}"'
                return
        return
    raised = probe.raises(probe.logits, probe.some_ignored) if ignore_index else None
    if raised is not None:
        yield (
            f"has no ignored labels, and raises {raised.partition(':')[0]} for those of {IGNORE_INDEX}: mask them "
            "first, or leave them out of the check with --no-ignore-index"
        )
    for count, what in ((0, "an empty batch"), (1, "a batch of one row")):
        raised = probe.raises(probe.logits[:count], probe.labels[:count])
        if raised is not None:
            yield f"raises for {what} ({raised})"


def _about_kind(probe: _Probe, failed: frozenset[str]) -> Iterator[str]:
    got = probe.run()
    first = got.first()
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


def _about_values(probe: _Probe, failed: frozenset[str]) -> Iterator[str]:
    got = probe.run()
    rows = got.rows()
    if rows is None:
        return
    reading = read(probe.sign * rows, got.model, probe.labels, probe.temperature)
    probe.formula_is_right = reading is not None and not reading.words
    if reading is None:
        return
    for words in reading.words:
        log_prob = "returns the log-probability: negative where a loss must be positive. Say --returns log_prob"
        yield log_prob if probe.sign < 0 and words == LOSS else words
    first = got.first()
    if not reading.words and failed & VALUES and first is not None and first.dtype.itemsize > 2:
        # A result in half precision says so by its dtype.
        yield from imprecision(probe.sign * rows, got.model, probe.labels, probe.temperature)
    if not reading.words and "log_prob_sign" in failed:
        yield "lets rounding carry a log-probability above 0, where a token is certain: clamp it"


def _about_state(probe: _Probe, failed: frozenset[str]) -> Iterator[str]:
    if not failed & VALUES:
        return
    memory = probe.logits.clone()

    def numbers() -> Tensor:
        with torch.no_grad():
            result = probe.call(memory, probe.labels.clone())
        rows = _Got(result, memory, memory).rows()
        return torch.empty(0) if rows is None else rows.clone()

    calls = [numbers() for _ in range(4)]
    memory.copy_(probe.new_logits())
    other = numbers()
    if not len(calls[0]) or not len(other):
        return
    if not all(same(rows, calls[0], CLOSE) for rows in calls):
        yield "gives other numbers when it is called again with the same input: it remembers something"
    elif torch.equal(other, calls[0]):  # probabilities may all be near 0, and so near one another
        yield "gives the old result for new values in the same memory: it remembers results by address or shape"


def _about_gradient(probe: _Probe, failed: frozenset[str]) -> Iterator[str]:
    if not failed & GRADIENT or failed & (VALUES | {"log_prob_sign"}):
        return  # where the values are wrong, so is their gradient, and for the same reason
    got = probe.run()
    first = got.first()
    if first is None or first.numel() != ROWS:
        return
    if not first.requires_grad:
        yield "is detached from the logits: no gradient flows (a detach, a no_grad, or a kernel without backward)"
        return
    upstream = torch.randn(ROWS, generator=probe.generator, device=probe.device)
    (gradient,) = torch.autograd.grad(first.reshape(-1), got.model, upstream.to(first.dtype))
    gradient = probe.sign * gradient.double()
    t = probe.temperature
    probabilities = (got.model.detach().double() / t).softmax(-1)
    at_label = torch.zeros_like(probabilities).scatter(-1, probe.labels[:, None], 1.0)
    true = (at_label - probabilities) / t
    g = upstream.double()[:, None]
    readings = {
        "": true * g,
        "is of the loss: its sign is the wrong way round": -true * g,
        "takes the upstream gradient for 1": true,
        "leaves out the softmax: it is at the label alone": at_label / t * g,
        "is 0 everywhere": torch.zeros_like(true),
        "lacks the division by the temperature": true * t * g,
        "divides by the temperature twice": true / t * g,
    }
    fitting = (
        words for tolerance in TOLERANCES for words, values in readings.items() if same(gradient, values, tolerance)
    )
    if words := next(fitting, ""):
        yield f"the values are right, and the gradient {words}"


def _about_entropy(probe: _Probe, failed: frozenset[str]) -> Iterator[str]:
    if not probe.problem.entropy or not failed & (ENTROPY | {"gradient_flows"}):
        return
    got = probe.run(asked="entropy")
    entropy, x = got.other(), got.model.detach().double()
    if entropy is None:
        return
    if "gradient_flows" in failed and not entropy.requires_grad:
        yield "the entropy is detached from the logits: no gradient flows through it"
    true, untempered = (torch.special.entr((x / s).softmax(-1)).sum(-1) for s in (probe.temperature, 1.0))
    values = entropy.detach().double().reshape(-1)
    if same(values, -true, COARSELY):
        yield "returns the sum of p log p as the entropy: negative where an entropy must be positive. Negate it"
    elif probe.temperature != 1.0 and same(values, untempered, COARSELY):
        yield "the entropy is that of the logits before the temperature divides them"


def _about_ignored(probe: _Probe, failed: frozenset[str]) -> Iterator[str]:
    if "ignored_rows" not in failed:
        return
    rows, ignored = probe.run(labels=probe.some_ignored).rows(), probe.some_ignored == IGNORE_INDEX
    remedy = "Mask them, or check with --no-ignore-index"
    if probe.problem.entropy:
        entropy = probe.run(labels=probe.some_ignored, asked="entropy").other()
        if entropy is not None and bool((entropy[ignored] != 0).any()):
            yield f"does not give an entropy of 0 for labels of {IGNORE_INDEX}. {remedy}"
    if rows is None:
        return
    got, logits = rows[ignored], probe.logits[ignored]
    for words, token in (("token 0", 0), (f"token V - {-IGNORE_INDEX}", probe.problem.vocab + IGNORE_INDEX)):
        expected = log_probs_of(logits, torch.full((len(logits),), token, device=logits.device), probe.temperature)
        if same(got.abs(), expected.abs(), 4 * COARSELY):
            yield f"does not know ignored labels: {IGNORE_INDEX} counts as {words}. {remedy}"
            return
    if probe.formula_is_right and not bool((got == 0).all()):
        yield f"does not give 0 for labels of {IGNORE_INDEX}. {remedy}"


def _about_nan(probe: _Probe, failed: frozenset[str]) -> Iterator[str]:
    if "nan_pattern" not in failed:
        return
    logits = probe.logits.clone()
    logits[0, 5] = math.nan
    logits[1] = -math.inf
    logits[2, probe.labels[2]] = -math.inf
    if probe.raises(logits, probe.labels):
        return
    entropy = probe.run(logits, asked="entropy").other() if probe.problem.entropy else None
    if entropy is not None and bool(entropy[2].isnan()):
        yield "gives NaN as the entropy where a logit is -inf: 0 times infinity, which has to count 0"
    rows = probe.run(logits).rows()
    if rows is None:
        return
    if bool(rows[0].isfinite()):
        yield "makes a number of a row that holds NaN, which hides where it came from"
    if bool(rows[1].isfinite()) or bool(rows[2].isfinite()):
        yield "makes a number of a label at -inf, or of a row that is all -inf: a clamp, or a large number for infinity"
    elif bool(rows[2].isnan()):
        yield "gives NaN for a label at -inf, whose log-probability is -inf: 0 times infinity on the way"


def _about_inputs(probe: _Probe, failed: frozenset[str]) -> Iterator[str]:
    if "inputs_changed" not in failed:
        return
    got = probe.run()
    before, after, first = got.model.detach().double(), got.logits.double(), got.first()
    words = "writes over its arguments: take a copy of what is changed"
    if same(after, before, 0.0) and first is not None and first.requires_grad:
        torch.autograd.grad(first.sum(), got.model, allow_unused=True)
        if not same(got.logits.double(), before, 0.0):
            words = "writes the gradient over the logits, unasked: whoever reads them afterwards reads the gradient"
    elif same(after, before / probe.temperature, COARSELY):
        words = "divides the logits by the temperature in place: the next who reads them divides once more"
    elif same(after, before - before.amax(-1, keepdim=True), COARSELY):
        words = "subtracts the maximum from the logits in place"
    yield words
