"""The report: of each check the worst that was seen, over all inputs and for each kind of them, and the errors.

Shapes: n rows compared, V vocabulary, C values a row: K labels, or V logits, or one.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.check.cases import Case
from compiled_logprobs.decision import QUANTILES, CaseEvidence, Check, Kind, Spread, Token, number
from compiled_logprobs.problem import Problem

MEANING = {
    "runs": "every call returns",
    "result_type": "returns a tensor, or (log_probs, ...) with what else is asked for, in order",
    "shape": "the log-probabilities have the shape of the labels, all else that of the rows",
    "dtype": "the results have the dtype that was asked for (argmax int64), the gradient that of the logits",
    "log_prob_sign": "no log-probability is positive, no cross entropy negative",
    "log_prob_error": "largest error of a log-probability against float64, in nats",
    "log_prob_rmse": "root mean square error of the log-probabilities against float64, in nats",
    "entropy_sign": "no entropy is negative",
    "entropy_error": "largest error of an entropy against float64, in nats",
    "entropy_rmse": "root mean square error of the entropies against float64, in nats",
    "logsumexp_error": "largest error of a logsumexp against float64, in nats",
    "logsumexp_rmse": "root mean square error of the logsumexps against float64, in nats",
    "argmax": "argmax is the first column that holds the maximum; -1 where the row is ignored or NaN",
    "sum_p_squared_error": "largest error of a sum of squared probabilities against float64",
    "sum_p_squared_rmse": "root mean square error of these sums against float64",
    "gradient_flows": "the results carry a gradient to the logits",
    "gradient_error": "largest error of the gradient against float64",
    "gradient_rmse": "root mean square error of the gradient against float64",
    "gradient_sign": "a log-probability rises with its own logit and falls with every other",
    "gradient_row_sum": "the gradient of a row sums to 0",
    "hidden_gradient_error": "largest error of the gradient in the hidden states against float64",
    "hidden_gradient_rmse": "root mean square error of the gradient in the hidden states against float64",
    "weight_gradient_error": "largest error of the gradient in the output layer's weight against float64",
    "weight_gradient_rmse": "root mean square error of the gradient in the weight against float64",
    "bias_gradient_error": "largest error of the gradient in the output layer's bias against float64",
    "bias_gradient_rmse": "root mean square error of the gradient in the bias against float64",
    "frozen_gradient": "a weight or bias that requires no gradient gets none",
    "ignored_rows": "ignored labels give exactly 0, and their rows a gradient of exactly 0",
    "nan_pattern": "NaN and infinities stand where they stand in float64",
    "zero_upstream": "where the upstream gradient is 0, so is the gradient of the row, exactly",
    "inputs_changed": "logits, or hidden states, weight and bias, and labels and temperature keep every bit",
    "outside_write": "no memory outside the results is written",
    "own_memory": "no result of a backend shares memory with what it keeps for the backward",
    "same_on_ranks": "all ranks of a group return the same bits",
    "random_state": "the random generators of torch, Python and NumPy are left as they were",
    "modes": "torch's modes are left as they were: gradients, default dtype, threads, autocast, determinism, "
    "precision of products",
    "version_counter": "a gradient written over the logits is announced to autograd",
    "stale_result": "a later call leaves the results of an earlier one alone",
    "grad_mode_bits": "a row has the same bits with and without a gradient",
    "row_invariance": "a row has the same bits whatever N it came with and whatever else is asked for, where the "
    "backend declares that",
}
"""What each check demands; its keys are the reasons for which a backend is stopped."""
WORST = 3
"""How many of the largest errors are kept of each kind of input and result."""
SAMPLED_ERRORS = 4096
"""Of so many errors at most, evenly spread, are the quantiles: those of a whole gradient cost more than the check."""


@dataclass(frozen=True)
class ProblemReport:
    """What the check saw of one problem."""

    problem: Problem
    checks: tuple[Check, ...]
    """The worst over all inputs."""
    cases: tuple[CaseEvidence, ...]
    """The same checks for each kind of input, and how the errors spread."""
    refused: tuple[str, ...] = ()
    """What a function raised for, and may."""


@dataclass(frozen=True, repr=False)
class CheckReport:
    """Whether a backend, or a function, keeps the contract; as a string, the verdict and the likely causes."""

    subject: str
    results: tuple[ProblemReport, ...]
    seed: int
    """Of the inputs: `check_backend(..., seed=report.seed)` makes the same ones."""
    repeatable: bool | None
    """Whether the same call gave the same bits twice. Recorded; neither is a failure."""
    row_invariant: bool | None
    """Whether a row had the same bits in batches of different N. A failure only of a backend that declares it."""
    causes: tuple[str, ...] = ()
    """What is probably wrong, the first likely to explain most; empty where nothing is, or nothing is recognised."""
    refused: tuple[str, ...] = ()
    """What the function does not take, such as a temperature a token, by raising; no failure."""

    @property
    def checks(self) -> tuple[Check, ...]:
        """One a check and problem."""
        return tuple(check for result in self.results for check in result.checks)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """The names of the checks that failed, each once."""
        return list(dict.fromkeys(check.name for check in self.checks if not check.passed))

    def __repr__(self) -> str:
        count = len(self.checks)
        verdict = f"passed {count} of {count} checks" if self.passed else f"wrong: {', '.join(self.reasons)}"
        causes = (f"likely cause: {cause}" for cause in self.causes)
        refused = (f"does not take {what}" for what in self.refused)
        return "\n".join([f"{self.subject}: {verdict}", *causes, *refused])

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only, and None where a figure is not finite."""
        of_problems = [
            ({"problem": str(result.problem), "options": result.problem.details()}, result) for result in self.results
        ]
        return {
            "subject": self.subject,
            "passed": self.passed,
            "reasons": self.reasons,
            "seed": self.seed,
            "causes": list(self.causes),
            "refused": list(self.refused),
            "repeatable": self.repeatable,
            "row_invariant": self.row_invariant,
            "checks": [
                {"meaning": MEANING[check.name], **problem, **asdict(check)}
                for problem, result in of_problems
                for check in result.checks
            ],
            "cases": [{**problem, **asdict(case)} for problem, result in of_problems for case in result.cases],
        }


class Stop(Exception):
    """Nothing further can be learned from this case."""


class Refused(Stop):
    """The function raised for a case that it may refuse."""


@dataclass
class Errors:
    """How far the results of one kind were off in one call, where they and the truth are finite."""

    what: Kind
    got: Tensor
    """[n, C]"""
    true: Tensor
    """[n, C], in float64."""
    counted: Tensor
    """[n, C] or [n, 1], of bool: whether it is a value of its own, and not an ignored label's."""
    rows: Tensor
    """[n]: which of N they are."""
    tokens: Tensor | None = None
    """[n, C]: which of V a value belongs to; None where that is its column, or it has none."""

    def __post_init__(self) -> None:
        rounded = self.true.to(self.got.dtype)
        self.finite = (self.true.isfinite() & self.got.isfinite() & rounded.isfinite()).double()
        """[n, C]: 0 where the value or its truth is not."""
        self.truth = self.true.nan_to_num(0.0, 0.0, 0.0) * self.finite
        self.error = self.of(self.got)
        """[n, C], absolute, in float64."""
        self.fits_pattern = torch.equal(self.got.isnan(), rounded.isnan()) and torch.equal(
            self.got.isinf() * self.got.sign(), rounded.isinf() * rounded.sign()
        )
        """Whether NaN and infinities stand where they should."""

    def of(self, results: Tensor) -> Tensor:
        """How far other results of the kind are off."""
        return (results.double().nan_to_num(0.0, 0.0, 0.0) * self.finite - self.truth).abs()

    def sample(self) -> Tensor:
        """Errors of finite values that count, at most `SAMPLED_ERRORS`, evenly spread."""
        flat, columns = self.error.reshape(-1), self.error.shape[-1]
        step = -(-len(flat) // SAMPLED_ERRORS)
        step += 1 - step % 2 if step > 1 else 0  # odd, so that it does not fall into the step of the columns
        at = torch.arange(0, len(flat), step, device=flat.device)
        row, column = at // columns, at % columns
        counts = self.counted[row, column if self.counted.shape[-1] == columns else 0]
        return flat[at][counts & (self.finite.reshape(-1)[at] != 0)]

    def worst(self) -> list[Token]:
        """The largest errors, where there are any."""
        rank = self.error
        if not self.fits_pattern:
            rounded = self.true.to(self.got.dtype)
            elsewhere = ~torch.isclose(self.got, rounded, rtol=0.0, atol=0.0, equal_nan=True)
            rank = rank.masked_fill((self.finite == 0) & elsewhere, torch.inf)
        columns = rank.shape[-1]
        # First the rows, by a pass that finds no places: of a gradient, that is what is fast.
        rows = rank.amax(-1).topk(min(WORST, len(rank))).indices
        error, place = rank[rows].flatten().topk(min(WORST, len(rows) * columns))
        row, column = rows[place // columns], place % columns
        token = column if self.tokens is None else self.tokens[row, column]
        # All in one tensor, since each look at a value waits for the device; below 2^53 an integer stays what it is.
        looked_at = torch.stack(
            [self.rows[row].double(), token.double(), self.got[row, column].double(), self.true[row, column], error]
        )
        return [
            Token(
                int(n),
                int(v) if self.what in ("log_prob", "gradient") else None,
                number(_rounded(got, 9, got)),
                number(_rounded(true, 9, true)),
                _rounded(off, 4),
            )
            for n, v, got, true, off in looked_at.T.tolist()
            if off > 0.0
        ]


_Worst = dict[str, tuple[float, Check]]
"""By the name of a check, the worst that was seen, after how bad that is."""


class Notes:
    """What is noted down while a problem is checked: of each check the worst, over all cases and in each of them."""

    def __init__(self) -> None:
        self.repeats: list[bool] = []
        """Whether the same call gave the same bits, each time that this was tried."""
        self.rows_alone: list[bool] = []
        """Whether rows had the same bits among fewer."""
        self._refused: list[str] = []
        self._cases: list[tuple[Case, _Worst, dict[Kind, list[tuple[Tensor, list[Token]]]]]] = []
        """The last with a sample of the errors and the largest ones of each call."""

    def begin(self, case: Case) -> None:
        """What is added from now on is about this case."""
        self._cases.append((case, {}, {}))

    def add(
        self, name: str, passed: bool, detail: str = "", figure: float | None = None, limit: float | None = None
    ) -> None:
        badness = 1.0 if figure is None or not limit else figure / limit
        rank = (math.inf if math.isnan(badness) else badness) + (0.0 if passed else 1e300)
        case, worst, _ = self._cases[-1]
        words = "" if passed else f"{case.name}: {detail}"
        check = Check(name, passed, _rounded(figure, 6), _rounded(limit, 6), words)
        if name not in worst or rank > worst[name][0]:
            worst[name] = rank, check

    def add_figure(self, name: str, figure: float, limit: float) -> None:
        """A check that demands a figure within a limit."""
        self.add(name, figure <= limit, f"{figure:.3g}, limit {limit:.3g}", figure, limit)

    def require(self, name: str, passed: bool, detail: str = "") -> None:
        """As `add`, and stop the case on a failure."""
        self.add(name, passed, detail)
        if not passed:
            raise Stop

    @property
    def cases(self) -> list[Case]:
        """Those that have begun."""
        return [case for case, _, _ in self._cases]

    def refuse(self, detail: str) -> None:
        """The function raises for this case, as it may."""
        first_line = (detail.strip().splitlines() or [""])[0]
        self._refused.append(f"{self._cases[-1][0].name} ({first_line})")

    def add_errors(self, errors: Errors) -> None:
        """How far off one call was."""
        self._cases[-1][2].setdefault(errors.what, []).append((errors.sample(), errors.worst()))

    def report(self, problem: Problem) -> ProblemReport:
        """All of it."""
        cases = tuple(
            CaseEvidence(case.name, case.rows, _ordered([worst]), tuple(_spread(*item) for item in errors.items()))
            for case, worst, errors in self._cases
        )
        return ProblemReport(
            problem, _ordered([worst for _, worst, _ in self._cases]), cases, tuple(dict.fromkeys(self._refused))
        )


def _ordered(cases: list[_Worst]) -> tuple[Check, ...]:
    """Of each check the worst over these cases, the first of equals."""
    seen = {name: [case[name] for case in cases if name in case] for name in MEANING}
    return tuple(max(ranked, key=lambda pair: pair[0])[1] for ranked in seen.values() if ranked)


def _spread(what: Kind, calls: list[tuple[Tensor, list[Token]]]) -> Spread:
    # A row has the same bits with and without a gradient, and is one row all the same.
    each_once = list(dict.fromkeys(token for _, tokens in calls for token in tokens))
    each_once.sort(key=lambda token: math.inf if token.error is None else token.error, reverse=True)
    largest = tuple(each_once[:WORST])
    errors = torch.cat([sample for sample, _ in calls])
    if not len(errors):
        return Spread(what, 0, (), largest)
    quantiles = errors.quantile(torch.tensor(QUANTILES, dtype=errors.dtype, device=errors.device)).tolist()
    seen = max((token.error for token in each_once if token.error is not None), default=0.0)
    upper_ends = (float(f"{value:.4g}") for value in (*quantiles[:-1], max(quantiles[-1], seen)))
    return Spread(what, len(errors), tuple(upper_ends), largest)


def _rounded(value: float | None, digits: int, otherwise: Any = None) -> Any:
    """To so many significant digits, since there are thousands of values; `otherwise` for what is not finite."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else otherwise
