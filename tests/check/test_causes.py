"""The likely cause of what is wrong with anyone's function."""

import re
from pathlib import Path

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.check.report import MEANING
from tests.helpers.backends_for_tuning import registered
from tests.helpers.functions_to_check import PROBLEM, WRONG_FUNCTIONS, good, labels_remembered_by_shape, positive
from tests.helpers.reported_functions import REPORTED_FUNCTIONS


@pytest.mark.parametrize(
    "wrong",
    # The default check takes seconds.
    [
        pytest.param(wrong, marks=[pytest.mark.slow] if wrong.problem is None else [])
        for wrong in [*WRONG_FUNCTIONS, *REPORTED_FUNCTIONS]
    ],
    ids=lambda wrong: f"{wrong.reason}: {wrong.cause}",
)
def test_a_wrong_function_is_stopped_for_the_right_reason_and_given_the_right_cause(wrong):
    report = clp.check_backend(wrong.function, wrong.problem)
    assert not report.passed and wrong.reason in report.reasons
    assert next(check for check in report.checks if check.name == wrong.reason and not check.passed).detail
    assert report.causes[0].startswith(wrong.cause), report.causes


def test_the_documentation_names_where_each_was_reported():
    page = (Path(__file__).parents[2] / "docs/check.md").read_text()
    assert [wrong.source for wrong in REPORTED_FUNCTIONS if wrong.source not in page] == []


def test_each_kind_of_check_stops_one():
    # Each error has a twin, the mean square, which the same mistakes trip. Row invariance is for backends that declare
    # it, and memory of its own for all backends; see test_run.py for these, test_over_ranks.py for ranks, and
    # test_hidden.py for hidden states.
    alone = {"entropy_rmse", "logsumexp_rmse", "sum_p_squared_rmse", "gradient_rmse", "row_invariance", "own_memory"}
    alone.add("same_on_ranks")
    of_logits = {name for name in MEANING if not name.startswith(("hidden_", "weight_", "bias_", "frozen_"))}
    assert of_logits - {wrong.reason for wrong in WRONG_FUNCTIONS} == alone


def test_what_a_function_remembers_of_an_earlier_check_leads_to_no_other_cause():
    for seed in (0, 1, 2):
        report = clp.check_backend(labels_remembered_by_shape, PROBLEM, seed=seed)
        assert report.causes[0].startswith("goes by earlier labels for others of the same shape")


def test_a_cause_says_with_which_logits_it_was_seen():
    report = clp.check_backend(lambda logits, labels: good(logits, labels).to(logits.dtype), vocab=301)
    assert report.causes[0].startswith("with bfloat16 logits: returns bfloat16")


@pytest.mark.parametrize(
    ("call", "swapped"),
    [
        ("f(labels[None], logits[None])[0]", "f(logits[None], labels[None])[0]"),
        ("f(labels=logits, logits=labels)", "f(labels=labels, logits=logits)"),
    ],
)
def test_a_call_with_logits_and_labels_in_each_others_place_is_said_to_be(call, swapped):
    def batched(logits, labels):
        return good(logits, labels) if logits.ndim == 2 else good(logits[0], labels[0])[None]

    report = clp.check_backend(batched, PROBLEM, call=call)
    assert report.causes[0] == f'takes logits and labels the other way round: say call="{swapped}" (--call)'
    assert clp.check_backend(batched, PROBLEM, call=swapped).passed


def test_a_function_of_batches_is_said_to_be_one():
    def batched(logits, labels):
        batch, _, _ = logits.shape
        return torch.stack([good(logits[i], labels[i]) for i in range(batch)])

    report = clp.check_backend(batched, PROBLEM)
    assert report.causes == ('takes a batch of sequences: say call="f(logits[None], labels[None])" (--call)',)


def test_what_raises_is_named_with_its_line():
    def asserts(logits, labels):
        assert logits.shape[-1] == 7

    report = clp.check_backend(asserts, PROBLEM)
    assert re.fullmatch(
        r"raises for an ordinary input: AssertionError.* \(line \d+ of test_causes.py: assert .* == 7\)",
        report.causes[0],
    )


def test_several_things_wrong_at_once_are_all_named():
    report = clp.check_backend(lambda x, y: positive(x, y) if len(y) else torch.stack([]), PROBLEM)
    assert {"runs", "log_prob_sign"} <= set(report.reasons)
    assert report.causes[0].startswith("raises for an empty batch (RuntimeError: stack expects")
    assert report.causes[1].startswith("returns the loss")
    report = clp.check_backend(lambda x, y: (positive(x, y), torch.zeros(len(y))), PROBLEM)
    assert report.causes[0].startswith("returns 2 results ([12], [12]) where one is expected")
    assert report.causes[1].startswith("returns the loss")


def test_a_log_probability_where_a_loss_was_promised():
    assert clp.check_backend(good, PROBLEM, returns="loss").causes == (
        'returns the log-probability: negative where a loss must be positive. Say returns="log_prob" '
        "(--returns log_prob)",
    )


def test_a_wrong_backend_is_given_a_cause():
    def forward(self, inputs, wanted):
        return Eager.forward(self, inputs._replace(temperature=1.0), wanted)

    with registered(coldness=type("Coldness", (Eager,), {"name": "coldness", "forward": forward})()):
        assert clp.check_backend("coldness", device="cpu", vocab=301).causes[0] == "ignores the temperature"
        tempered = PROBLEM._replace(temperature="number")
        assert clp.check_backend("coldness", tempered, short=True).causes[0] == "ignores the temperature"
