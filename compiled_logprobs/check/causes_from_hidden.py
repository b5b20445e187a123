"""Why a function from hidden states is wrong where it is right for embedded logits: its chunks, options and gradients.

Shapes: N rows, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.check.cases import IGNORE_INDEX
from compiled_logprobs.check.hidden_cases import SCALE, SOFTCAP
from compiled_logprobs.check.hidden_function import HiddenArguments, HiddenFunction
from compiled_logprobs.check.probe import TEMPERATURE
from compiled_logprobs.check.readings import CLOSE, COARSELY, same
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.problem import RESULTS, Problem

ROWS, HIDDEN, VOCAB = 333, 64, 67
SHIFTS = 64, 128, 256, 32, 16
"""Rows of the chunks that are commonly taken for others."""
HALF_A_ROW = 0.5
"""How much of a row's contribution has to be missing, or there once too often."""


class HiddenProbe:
    """A function from hidden states, and ordinary inputs for it that no chunk holds."""

    def __init__(self, function: HiddenFunction, problem: Problem, device: torch.device, seed: int) -> None:
        self.function = function
        self.sign = -1 if function.returns == "loss" else 1
        self.problem = problem._replace(**dict.fromkeys(RESULTS, False))  # type: ignore[arg-type]  # all are switches
        generator = torch.Generator(device).manual_seed(seed)

        def drawn(shape: tuple[int, ...], largest: int) -> Tensor:
            return torch.randint(-largest, largest + 1, shape, generator=generator, device=device).to(problem.dtype)

        labels = torch.randint(VOCAB, (ROWS, 1), generator=generator, device=device)
        self.given = HiddenArguments(drawn((ROWS, HIDDEN), 1), drawn((VOCAB, HIDDEN), 1), labels)
        self.bias = drawn((VOCAB,), 2)
        self.upstream = torch.randn(ROWS, generator=generator, device=device)

    def run(self, *, with_entropy: bool = False, **changed: Any) -> tuple[HiddenArguments, tuple[Tensor, ...]]:
        """Arguments that require gradients, and the results, log-probabilities [N] first."""
        given = self.given._replace(**changed)
        tensors = {name: x for name in ("hidden", "weight", "bias") if (x := getattr(given, name)) is not None}
        given = given._replace(**{name: x.clone().requires_grad_() for name, x in tensors.items()})
        problem = self.problem._replace(entropy=True) if with_entropy else self.problem
        result = self.function.from_hidden(given, problem)
        parts = result if isinstance(result, tuple) else (result,)
        return given, (parts[0].squeeze(-1), *parts[1:])

    def has(self, *options: str) -> bool:
        """Whether the function takes them."""
        return self.function.options >= {*options}


def causes_from_hidden(
    function: HiddenFunction, problem: Problem, failed: frozenset[str], device: torch.device, seed: int
) -> list[str]:
    """What is probably wrong; nothing where nothing is recognised, or the first rows are wrong, as of logits."""
    probe = HiddenProbe(function, problem, device, seed)
    causes: list[str] = []
    for about in (_about_inputs, _about_rows, _about_options, _about_entropy, _about_gradients):
        try:
            causes += about(probe, failed)
        except (Exception, SystemExit) as error:  # whatever a function raises has been said of it
            if nothing_can_serve_after(error):
                raise
            return []
        if causes:  # what follows would come of it
            break
    return causes


class _WrongThroughout(Exception):
    """The first rows are wrong already."""


def _about_inputs(probe: HiddenProbe, failed: frozenset[str]) -> Iterator[str]:
    if "inputs_changed" not in failed:
        return
    _, results = probe.run()
    changed = list(probe.function.overwritten())
    if not changed and results[0].requires_grad:
        torch.autograd.backward([results[0].sum()])
        changed = [f"{what} (in its backward)" for what in probe.function.overwritten()]
    for what in changed:
        yield f"writes over the {what.replace(' were', '').replace(' was', '')}: compute in memory of its own"


def _logits(given: HiddenArguments, *, capped_last: bool = False, scaled_last: bool = False) -> Tensor:
    """[N, V] float64, divided by the temperature."""
    z = given.hidden.detach().double() @ given.weight.detach().double().T
    z = z if given.bias is None else z + given.bias.detach().double()
    t = given.temperature
    t = t.double().unsqueeze(-1) if isinstance(t, Tensor) else t
    before = z / t if capped_last else z
    before = before if scaled_last else before * given.logit_scale
    x = before if given.softcap is None else given.softcap * torch.tanh(before / given.softcap)
    x = x * given.logit_scale if scaled_last else x
    return x if capped_last else x / t


def _picked(x: Tensor, labels: Tensor) -> Tensor:
    return x.log_softmax(-1).gather(-1, labels).squeeze(-1)


def _about_rows(probe: HiddenProbe, failed: frozenset[str]) -> Iterator[str]:
    """Values of rows beyond the first chunk."""
    given, results = probe.run()
    rows, x = probe.sign * results[0].detach().double(), _logits(given)
    truth = _picked(x, given.labels)
    if rows.shape != truth.shape:
        raise _WrongThroughout
    wrong = (rows - truth).abs() > 4 * COARSELY * truth.abs().max()
    if not bool(wrong.any()):
        return
    first = int(wrong.nonzero()[0])
    if first == 0:
        raise _WrongThroughout
    if not bool(rows[first:].any()):
        yield f"gives 0 for the last rows, from row {first} of {ROWS} on: the last chunk is left out"
        return
    for size in (*SHIFTS, first):
        first_ones = given.labels[torch.arange(ROWS, device=x.device) % size]
        others = {"the chunk before": given.labels.roll(size, 0), "the first chunk": first_ones}
        for which, labels in others.items():
            if same(rows[wrong], _picked(x, labels)[wrong], 4 * COARSELY):
                yield f"takes the labels of {which}, of {size} rows, from row {first} on"
                return
    yield f"is wrong from row {first} of {ROWS} on: chunks of rows are put together wrongly"


def _about_options(probe: HiddenProbe, failed: frozenset[str]) -> Iterator[str]:
    """Each option by itself, and those whose order counts together."""
    cap: dict[str, Any] = {"softcap": SOFTCAP}
    tried: list[tuple[tuple[str, ...], dict[str, Any], dict[str, Callable[[HiddenArguments], Tensor]]]] = [
        (("bias",), {"bias": probe.bias}, {"leaves the bias out": lambda g: _logits(g._replace(bias=None))}),
        (("softcap",), cap, {"leaves the soft cap out": lambda g: _logits(g._replace(softcap=None))}),
        (
            ("logit_scale",),
            {"logit_scale": SCALE},
            {"leaves the scale of the logits out": lambda g: _logits(g._replace(logit_scale=1.0))},
        ),
        (
            ("softcap", "temperature"),
            {**cap, "temperature": TEMPERATURE},
            {
                "caps the logits softly after the temperature has divided them: the cap comes first": lambda g: _logits(
                    g, capped_last=True
                )
            },
        ),
        (
            ("softcap", "logit_scale"),
            {**cap, "logit_scale": SCALE},
            {
                "scales the logits after the soft cap, where the scale comes first": lambda g: _logits(
                    g, scaled_last=True
                )
            },
        ),
    ]
    for options, changed, readings in tried:
        if not probe.has(*options):
            continue
        given, results = probe.run(**changed)
        rows = probe.sign * results[0].detach().double()
        if same(rows, _picked(_logits(given), given.labels), COARSELY):
            continue
        for words, reading in readings.items():
            if same(rows, _picked(reading(given), given.labels), COARSELY):
                yield words
                return


def _about_entropy(probe: HiddenProbe, failed: frozenset[str]) -> Iterator[str]:
    if not failed & {"entropy_error", "entropy_rmse"} or not probe.has("return_entropy"):
        return
    given, results = probe.run(with_entropy=True)
    log_p = _logits(given).log_softmax(-1)
    truth, entropy = -(log_p.exp() * log_p).sum(-1), results[1].detach().double()
    wrong = (entropy - truth).abs() > CLOSE * truth.abs().max()
    if bool(wrong.any()) and not bool(wrong[0]):  # else it is wrong throughout
        first = int(wrong.nonzero()[0])
        for size in (*SHIFTS, first):
            if same(entropy[wrong], truth.roll(size)[wrong], COARSELY):
                yield f"gives rows the entropy of the chunk before, of {size} rows, from row {first} on"
                return
        yield f"the entropy is wrong from row {first} of {ROWS} on: chunks of rows are put together wrongly"


def _about_gradients(probe: HiddenProbe, failed: frozenset[str]) -> Iterator[str]:
    """The gradients in the hidden states and in the weight, each held against what they would be."""
    options: dict[str, Any] = {"softcap": SOFTCAP} if probe.has("softcap") else {}
    options |= {"logit_scale": SCALE} if probe.has("logit_scale") else {}
    labels = probe.given.labels.clone()
    for ignored in (False, True):
        if ignored:
            labels[3::7] = IGNORE_INDEX
        given, results = probe.run(labels=labels, **options)
        upstream = (probe.sign * probe.upstream).to(results[0].dtype)
        found = torch.autograd.grad(results[0], [given.hidden, given.weight], upstream, allow_unused=True)
        if any(x is None for x in found):
            missing = [name for name, x in zip(("hidden states", "weight"), found, strict=True) if x is None]
            yield f"gives the {' and the '.join(missing)} no gradient"
            return
        of_hidden, of_weight = (x.double() for x in found)
        dx, slope = _of_logits(given, probe.upstream)
        hidden, weight = given.hidden.detach().double(), given.weight.detach().double()
        dz = dx * slope * given.logit_scale
        if not same(of_hidden, dz @ weight, COARSELY):
            readings = {
                "lacks the slope of the soft cap": dx * given.logit_scale,
                "lacks the scale of the logits": dx * slope,
                "is of the loss: its sign is the wrong way round": -dz,
            }
            words = (words for words, each in readings.items() if same(of_hidden, each @ weight, COARSELY))
            if fits := next(words, None):
                yield f"the gradient in the hidden states {fits}"
                return
            true = dz @ weight
            factor = float((of_hidden * true).sum() / true.square().sum())
            if abs(factor - 1.0) > COARSELY and (of_hidden - factor * true).norm() <= COARSELY * of_hidden.norm():
                yield f"the gradient in the hidden states is {factor:.3g} times what it should be"
                return
        yield from _about_weight(of_weight, dz, hidden, labels.squeeze(-1))
    others = {"log_prob_rmse", "hidden_gradient_rmse"}  # where these are wrong, what is in the weight's comes of it
    if probe.problem.dtype != torch.float32 and "weight_gradient_rmse" in failed and not failed & others:
        yield (
            "rounds the gradient of the weight more often than once: chunks are added up in half precision, by "
            "autograd or in a buffer. Add them up in float32"
        )


def _of_logits(given: HiddenArguments, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient after the soft cap, and the cap's slope; [N, V] float64."""
    x = _logits(given).requires_grad_()
    kept = given.labels.squeeze(-1) != IGNORE_INDEX
    rows = _picked(x, given.labels.clamp(min=0)).masked_fill(~kept, 0.0)
    (dx,) = torch.autograd.grad(rows, x, upstream.double())
    if given.softcap is None:
        return dx, torch.ones_like(dx)
    return dx, 1.0 - (x.detach() / given.softcap).square()


def _about_weight(got: Tensor, dz: Tensor, hidden: Tensor, labels: Tensor) -> Iterator[str]:
    """Rows whose part of the weight's gradient is missing or there twice, found by least squares."""
    true = dz.T @ hidden
    if same(got, true, CLOSE):
        return
    if same(got, -true, COARSELY):
        yield "the gradient in the weight is of the loss: its sign is the wrong way round"
        return
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    # <A c, A c> = c^T (dz dz^T * h h^T) c, so that no N columns of V x H have to be held.
    gram = (dz[kept] @ dz[kept].T) * (hidden[kept] @ hidden[kept].T)
    right = ((dz[kept] @ (got - true)) * hidden[kept]).sum(-1)
    share = torch.linalg.lstsq(gram, right[:, None]).solution.squeeze(-1)
    counts = torch.where(share.abs() > HALF_A_ROW, share.sign(), 0.0)
    explained = (dz[kept] * counts[:, None]).T @ hidden[kept]
    if (got - true - explained).norm() > HALF_A_ROW * (got - true).norm():
        return  # of rows that hardly have a part, rounding makes anything
    missing, twice = kept[counts < 0], kept[counts > 0]
    if len(missing) > len(kept) / 2:
        return  # nothing is left out: each row's part is another
    if len(missing):
        is_ignored = labels == IGNORE_INDEX
        beside = is_ignored.roll(1) | is_ignored.roll(-1)
        if bool(beside[missing].all()):
            yield "the gradient in the weight lacks the rows next to ignored ones"
        elif len(missing) == len(labels) - int(missing[0]):
            yield f"the gradient in the weight lacks the last rows, from row {int(missing[0])} on: a chunk is left out"
        else:
            yield f"the gradient in the weight lacks {len(missing)} of {len(kept)} rows, such as {int(missing[0])}"
    elif len(twice):
        yield (
            f"the gradient in the weight counts {len(twice)} of {len(kept)} rows twice, such as {int(twice[0])}: "
            "chunks overlap"
        )
