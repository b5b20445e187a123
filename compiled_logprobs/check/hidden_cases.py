"""Inputs from hidden states that find mistakes: more rows than a chunk has, some of them ignored, and every option.

Shapes: N rows, H hidden size, V vocabulary, K labels a row.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compiled_logprobs.check.cases import IGNORE_INDEX, Case, labels_for
from compiled_logprobs.check.hidden_function import HiddenArguments
from compiled_logprobs.check.inputs import DIFFERENTIABLE, Returned, names_of
from compiled_logprobs.operation.contract import in_dtype
from compiled_logprobs.operation.reference import ReferenceFromHidden, reference_from_hidden
from compiled_logprobs.problem import Problem, accumulation_dtype

SIZES = 64, 96
"""Hidden sizes of the inputs; one has that of the problem."""
LARGEST_HIDDEN = 1024
LEAST_HIDDEN = 16
"""Beside a vocabulary that may be large: a gradient of the weight takes as long to judge as it has elements."""
RUN = slice(64, 256)
"""Rows that are ignored in a run, so that a chunk of 64 or 128 has none that counts."""
SOFTCAP, SCALE = 6.0, 0.5


@dataclass(frozen=True)
class HiddenCase(Case):
    """One kind of input."""

    columns: int = 1031
    """V."""
    hidden: int | None = SIZES[0]
    """H; None: the problem's."""
    exact: bool = False
    """Whether hidden states, weight and bias are small integers, whose products every dtype holds."""
    ignored: float = 0.3
    """The share of rows whose labels are all ignored."""
    ignored_run: bool = False
    """Whether those of `RUN` are ignored, too."""
    bias: bool | None = None
    """Whether there is one; None: as the problem says, as for the next ones."""
    softcap: bool | None = None
    logit_scale: float = 1.0
    tempered: Literal["none", "number", "per_token"] | None = None
    frozen: tuple[str, ...] = ()
    """What requires no gradient."""
    limit: float | None = None
    """Of memory: how many times the least that is possible."""
    twice: bool = False
    """Whether there is a second backward."""
    labels_per_row: int | None = None
    hold_nan: bool = False
    """Whether the hidden states of ignored rows are NaN."""

    def posed(self, problem: Problem) -> Problem:
        """What is asked with these inputs, where `problem` is."""
        return problem._replace(
            rows=self.rows,
            vocab=self.columns,
            hidden=self.hidden or min(problem.hidden or SIZES[0], LARGEST_HIDDEN),
            # Where products round, which of two columns holds the maximum is anyone's guess.
            argmax=problem.argmax and self.exact,
            temperature="number" if self.logit_scale != 1.0 else self.tempered or problem.temperature,
            labels_per_row=self.labels_per_row or problem.labels_per_row,
            bias=problem.bias if self.bias is None else self.bias,
            softcap=problem.softcap if self.softcap is None else self.softcap,
            layout="flat",
        )


def cases_from_hidden(
    problem: Problem,
    *,
    short: bool,
    foreign: bool,
    options: Collection[str],
    elsewhere: bool,
    ignore_index: bool = True,
) -> list[HiddenCase]:
    """The inputs that a backend has to get right from hidden states.

    Args:
        problem: as for `cases`.
        short: only those that find most mistakes.
        foreign: for somebody's function, whose ignored rows hold no NaN: plain torch makes one of 0 * NaN.
        options: those that the function takes, or that the problem has.
        elsewhere: also many rows, and a large vocabulary.
        ignore_index: whether some labels are ignored.
    """
    chosen = _all_cases(problem, short, not foreign, options, elsewhere)
    if ignore_index:
        return chosen
    return [replace(case, ignored=0.0) for case in chosen if case.ignored < 1.0 and not case.ignored_run]


def _all_cases(problem: Problem, short: bool, own: bool, options: Collection[str], elsewhere: bool) -> list[HiddenCase]:
    several = HiddenCase("rows of several chunks", 333, hidden=None, hold_nan=own)
    exact = HiddenCase("exact products", 333, columns=263, exact=True, hidden=96, hold_nan=own)
    if short:
        return [several, exact]
    has = {"bias", "softcap", "logit_scale", "temperature"} & set(options)
    ignored_run = "is wrong beside rows that are ignored, or where a whole chunk of them is"
    cases = [
        several,
        exact,
        HiddenCase("a run of ignored rows", 333, columns=263, exact=True, ignored_run=True, mistake=ignored_run),
        HiddenCase("no rows from hidden states", 0, columns=131),
        HiddenCase("one row from hidden states", 1, columns=131, exact=True, ignored=0.0),
        HiddenCase("a second backward of several chunks", 130, columns=131, exact=True, twice=True, may_refuse=True),
        HiddenCase("all rows ignored", 150, columns=131, ignored=1.0, exact=True, hold_nan=own),
        HiddenCase("many rows of few columns", 1037, columns=37, exact=True),
        HiddenCase("all of the vocabulary", 9, columns=problem.vocab, hidden=LEAST_HIDDEN, exact=True),
        HiddenCase("a frozen output layer", 150, columns=263, exact=True, frozen=("weight", "bias")),
        HiddenCase("frozen hidden states", 150, columns=263, exact=True, frozen=("hidden",)),
    ]
    if "bias" in has:
        cases.append(_option("a bias", "leaves the bias out, or its gradient", bias=True))
    if "logit_scale" in has:
        cases.append(_option("a scale", "lacks the scale of the logits, or in a gradient", logit_scale=SCALE))
    if "softcap" in has:
        cases.append(_option("a soft cap", "lacks the soft cap, or its slope in a gradient", softcap=True))
    if has >= {"softcap", "temperature"}:
        mistake = "caps the logits softly after the temperature has divided them, where it comes before"
        cases.append(_option("a soft cap and a temperature", mistake, softcap=True, tempered="number"))
    if has >= {"softcap", "logit_scale"}:
        mistake = "caps the logits softly before they are scaled, where it comes after"
        cases.append(_option("a soft cap and a scale", mistake, softcap=True, logit_scale=SCALE))
    if "temperature" in has:
        mistake = "takes the temperatures of other rows, or one for all, where each token comes with its own"
        cases.append(_option("a temperature a token in chunks", mistake, tempered="per_token", may_refuse=True))
    if "memory_limit" in options:
        # Few rows and columns where each row is a chunk of its own, which takes long.
        limits = (1.0, 70, 263), (1.02, 150, 1031), (1.3, 333, 1031)
        cases += [
            HiddenCase(f"{least:g} times the least memory", rows, columns=columns, limit=least, exact=True)
            for least, rows, columns in limits
        ]
    if own:
        cases.append(HiddenCase("three labels a row", 333, columns=263, exact=True, labels_per_row=3))
    if elsewhere and (problem.dtype == torch.float32 or not own):
        cases.append(HiddenCase("4200 rows of 37", 4200, columns=37, exact=True))
    if elsewhere and not problem.entropy and problem.dtype == torch.float32:  # which takes seconds
        cases.append(
            HiddenCase("all of 151936 tokens", 5, columns=151936, hidden=LEAST_HIDDEN, exact=True, ignored=0.0)
        )
    return cases


def _option(name: str, mistake: str, *, may_refuse: bool = False, **options: Any) -> HiddenCase:
    return HiddenCase(name, 150, columns=263, mistake=mistake, may_refuse=may_refuse, exact=True, **options)


class HiddenCaseInputs:
    """One case, ready to run, with the truth about it. It is judged as a `CaseInputs` is."""

    ceiling = 2.0**60
    """As good as none: what products in half precision cost is plain torch's to say."""

    def __init__(self, case: HiddenCase, problem: Problem, generator: torch.Generator) -> None:
        device, has = generator.device, case.posed(problem)
        problem = has if case.logit_scale == 1.0 else has._replace(temperature=case.tempered or problem.temperature)
        rows, vocab, size, kind = problem.rows, problem.vocab, problem.hidden or SIZES[0], problem.temperature
        self.case, self.problem, self.yardstick = case, problem, dict[str, float]()

        def drawn(shape: tuple[int, ...], scale: float, largest: int) -> Tensor:
            if case.exact:
                return torch.randint(-largest, largest + 1, shape, generator=generator, device=device).to(problem.dtype)
            return (scale * torch.randn(shape, generator=generator, device=device)).to(problem.dtype)

        self.hidden, self.weight = drawn((rows, size), 1.0, 1), drawn((vocab, size), 3.0 / size**0.5, 1)
        self.bias = drawn((vocab,), 1.0, 2) if problem.bias else None
        self.softcap = SOFTCAP if problem.softcap else None
        self.temperature: float | Tensor = 1.0
        if kind == "number":
            self.temperature = float(torch.empty((), device=device).uniform_(0.5, 2.0, generator=generator))
        elif kind == "per_token":
            self.temperature = torch.empty(rows, device=device).uniform_(0.5, 2.0, generator=generator)
        self.labels = labels_for(
            Case(case.name, rows, ignored=case.ignored),
            torch.zeros((), device=device).expand(rows, vocab),
            problem,
            generator,
        )
        if case.ignored_run:
            self.labels[RUN] = IGNORE_INDEX
        self.ignored = self.labels == IGNORE_INDEX
        """[N, K]"""
        if case.hold_nan:
            self.hidden.masked_fill_(self.ignored.all(-1, keepdim=True), torch.nan)
        t = self.temperature
        self.row_temperature = t.unsqueeze(-1) if isinstance(t, Tensor) else t
        self.sample = torch.arange(rows, device=device)
        self.upstream = {"log_probs": torch.randn(self.labels.shape, generator=generator, device=device)}
        """As of a `CaseInputs`."""
        for name in DIFFERENTIABLE[1:]:
            if getattr(problem, name):
                self.upstream[name] = torch.randn(rows, generator=generator, device=device)
        self._solve()

    def sampled(self, tensor: Tensor, columns: int) -> Tensor:
        """[N, columns]"""
        return tensor.reshape(-1, columns)

    def arguments(self, *, memory_limit: int | None, with_gradient: bool) -> HiddenArguments:
        """Fresh ones, for a call."""

        def fresh(name: str, x: Tensor) -> Tensor:
            return x.clone().requires_grad_(with_gradient and name not in self.case.frozen)

        t = self.temperature.clone() if isinstance(self.temperature, Tensor) else self.temperature
        return HiddenArguments(
            fresh("hidden", self.hidden),
            fresh("weight", self.weight),
            self.labels.clone(),
            None if self.bias is None else fresh("bias", self.bias),
            t,
            self.case.logit_scale,
            self.softcap,
            IGNORE_INDEX,
            memory_limit,
        )

    def _solve(self) -> None:
        """Compute the truth, and what plain torch makes of the same."""
        problem = self.problem
        upstream = {f"grad_{name}": grad for name, grad in self.upstream.items()} if problem.needs_grad else {}

        def solved(**options: Any) -> ReferenceFromHidden:
            return reference_from_hidden(
                self.hidden,
                self.weight,
                self.labels,
                self.bias,
                self.temperature,
                logit_scale=self.case.logit_scale,
                softcap=self.softcap,
                **options,
            )

        self.gradients = solved(**upstream)
        """The truth."""
        self.true = self.gradients.results
        rounded = {name: grad.to(problem.out_dtype) for name, grad in upstream.items()}
        dtype = accumulation_dtype(problem.dtype)
        self.plain_gradients = solved(product_dtype=problem.dtype, dtype=dtype, **rounded)
        plain = self.plain_gradients.results
        self.plain = Returned(**{name: in_dtype(getattr(plain, name), problem.out_dtype) for name in names_of(problem)})
        # Log-probabilities and logsumexps are as exact as the logits are large.
        largest = self.true.logsumexp.abs() + self.true.log_probs.abs().amax(-1) if problem.rows else self.true.entropy
        self.scale = largest.clamp(min=1.0).float().unsqueeze(-1)
        """[N, 1]: what an eps(float32) is relative to."""
