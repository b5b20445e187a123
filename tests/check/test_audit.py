"""The audit of anyone's function: other argument orders and names, and the likely cause of what is wrong."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

import compiled_logprobs as clp
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.check.function import Function
from compiled_logprobs.cli.main import app
from compiled_logprobs.problem import Problem
from tests.helpers import functions_to_check
from tests.helpers.wrong_backends import RIGHT_BACKENDS, WRONG_BACKENDS

HERE = Path(__file__).parent
SMALL = Problem("cpu", 12, 3001, torch.float32, needs_grad=True, entropy=True, temperature="number")


@pytest.fixture
def check(monkeypatch):
    """Runs `compiled-logprobs check functions_to_check:NAME ...` from this folder."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine take ten times as long
    yield lambda name, *options: CliRunner().invoke(app, ["check", f"functions_to_check:{name}", *options])
    torch.set_num_threads(threads)


def causes(result) -> list[str]:
    return [
        line.removeprefix("likely cause: ") for line in result.stdout.splitlines() if line.startswith("likely cause: ")
    ]


# --- signature and returns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("labels_first", ["--signature", "labels, logits"]),
        (
            "of_other_names",
            ["--signature", "logits, targets=labels, temp=temperature, reduction='none'", "--returns", "loss"],
        ),
        ("of_batches", ["--signature", "logits[None], labels[None]"]),
        ("with_a_required_length", ["--signature", "logits, labels, 48"]),
        ("positive", ["--returns", "loss"]),
    ],
)
def test_a_right_function_of_other_arguments_passes(check, name, options):
    result = check(name, *options)
    assert result.exit_code == 0, result.output
    assert f"{name}: passed " in result.stdout
    assert causes(result) == []


def test_a_function_of_torch_whose_signature_python_cannot_read_is_called_as_it_is_told():
    with pytest.raises(clp.InputError, match="cannot be read.*--signature"):
        clp.check_backend(torch.rsub)
    report = clp.check_backend(
        functional.cross_entropy,
        SMALL,
        signature="logits, labels, reduction='none', ignore_index=ignore_index",
        returns="loss",
    )
    assert report.passed, report.causes


@pytest.mark.parametrize("error", [RuntimeError, ImportError, NameError])
def test_a_signature_that_raises_is_said_to(error):
    """As lazily imported placeholders do, and annotations that Python evaluates late."""

    class Lazy:
        @property
        def __signature__(self):
            raise error("libcudart.so.12")

        def __call__(self, logits, labels):
            return functions_to_check.right(logits, labels)

    with pytest.raises(clp.InputError, match=rf"cannot be read \({error.__name__}: libcudart.so.12\).*--signature"):
        clp.check_backend(Lazy())
    assert clp.check_backend(Lazy(), SMALL, signature="logits, labels").passed


def test_the_options_in_a_signature_are_tried_and_no_others():
    seen = []

    def spy(logits, labels, **options):
        seen.append(options)
        return functions_to_check.right(logits / options.get("temp", 1.0), labels)

    assert clp.check_backend(spy, SMALL, signature="logits, labels, temp=temperature, flag=True").passed
    assert all(options.keys() == {"temp", "flag"} and options["flag"] is True for options in seen)
    assert any(options["temp"] != 1.0 for options in seen)


@pytest.mark.parametrize(
    "signature",
    [
        "logits",
        "logits, labels, labels",
        "logits, tokens",
        "logits, labels,, 1",
        "__import__('os'), labels, logits",
        "(",
        "",
        "logits, labels, **labels",
        "logits, labels[0]",
        "logits, labels, temperature * 2",
        "logits, labels)[0], print(",
    ],
)
def test_a_signature_that_is_none_is_refused_with_an_example(signature):
    with pytest.raises(clp.InputError, match="got signature .*valid"):
        clp.check_backend(functions_to_check.right, signature=signature)


def test_a_function_that_needs_more_is_exit_2_and_told_what_to_say(check):
    result = check("with_a_required_length")
    assert result.exit_code == 2
    assert "missing a required argument: 'length'. Say what it takes" in result.stderr


def test_a_backend_needs_no_signature(check):
    result = CliRunner().invoke(app, ["check", "eager", "--returns", "loss"])
    assert result.exit_code == 2
    assert "a backend is known. Leave them out." in result.stderr
    assert check("right", "--returns", "probability").exit_code == 2


# --- likely causes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("positive", "returns the loss: positive where a log-probability must be negative"),
        ("tempered", "ignores the temperature"),
        ("twice_tempered", "divides by the temperature twice"),
        ("tempered_afterwards", "divides the log-probabilities by the temperature, and not the logits"),
        ("shifted", "takes the label of the next row"),
        ("shifts_itself", "shifts the labels itself"),
        ("in_half_precision", "with float32 logits: computes in half precision"),
        ("in_the_dtype_of_the_logits", "with bfloat16 logits: returns bfloat16, which has steps of 0.062 nats at -10"),
        ("divides_in_place", "divides the logits by the temperature in place"),
        ("cut_off", "is detached from the logits"),
        ("counts_ignored", "does not know ignored labels: -100 counts as token 0"),
        ("mean_of_the_batch", "returns the mean of the log-probabilities over the batch"),
        ("negative_entropy", "returns the sum of p log p as the entropy"),
        ("labels_first", 'takes (labels, logits), the other way round: say --signature "labels, logits"'),
        ("without_ignored", "has no ignored labels, and raises RuntimeError for those of -100"),
        ("fails", "raises for an ordinary input: RuntimeError: Pointer argument (at 0)"),
    ],
)
def test_the_likely_cause_is_named_first(check, name, cause):
    result = check(name, "--seed", "3")
    assert result.exit_code == 1, result.output
    assert causes(result)[0].startswith(cause)
    assert f"{name}: wrong: " in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "given", "right"),
    [
        ("right", "labels, logits", "logits, labels"),
        ("labels_first", "logits, labels", "labels, logits"),
        ("of_batches", "labels[None], logits[None]", "logits[None], labels[None]"),
        (
            "of_other_names",
            "labels, targets=logits, temp=temperature, reduction='none'",
            "logits, targets=labels, temp=temperature, reduction='none'",
        ),
    ],
)
def test_arguments_in_the_wrong_order_are_said_to_be(check, name, given, right):
    returns = ("--returns", "loss" if name == "of_other_names" else "log_prob")
    result = check(name, "--signature", given, *returns)
    assert result.exit_code == 1, result.output
    assert causes(result)[0] == f'takes ({right}), the other way round: say --signature "{right}"'
    assert check(name, "--signature", right, *returns).exit_code == 0


def test_what_fails_on_no_rows_is_checked_on_the_others_all_the_same():
    def needs_rows(logits, labels):
        return functions_to_check.positive(logits, labels) if len(labels) else torch.stack([])

    report = clp.check_backend(needs_rows, SMALL)
    assert {"runs", "log_prob_sign"} <= set(report.reasons)
    assert report.causes[0].startswith("raises for an empty batch (RuntimeError: stack expects")
    assert report.causes[1].startswith("returns the loss")


def test_several_things_wrong_at_once_are_all_named(check):
    found = causes(check("loss_and_more"))
    assert found[0].startswith("returns 2 results ([12], [12]) where one is expected")
    assert found[1].startswith("returns the loss")


def test_a_log_probability_where_a_loss_was_promised(check):
    assert causes(check("right", "--returns", "loss")) == [
        "returns the log-probability: negative where a loss must be positive. Say --returns log_prob"
    ]


def test_json_has_the_causes(check):
    (report,) = json.loads(check("positive", "--json").stdout, parse_constant=pytest.fail)["reports"]
    assert report["causes"][0].startswith("returns the loss")


EXPECTED = {
    "probability_not_its_logarithm": "returns the probability, not its logarithm",
    "rounding_leaks_a_positive_value": "lets rounding carry a log-probability above 0",
    "multiplied_by_temperature": "multiplies by the temperature instead of dividing",
    "base_two_logarithm": "returns logarithms to base 2",
    "smoothed_labels": "smooths the labels, by 0.001",
    "wrong_on_every_second_call": "gives other numbers when it is called again",
    "remembered_by_address": "gives the old result for new values in the same memory",
    "single_row_special_case": "right for ordinary inputs, and wrong for these: one row",
    "entropy_without_temperature": "the entropy is that of the logits before the temperature",
    "entropy_detached": "the entropy is detached",
    "gradient_of_the_loss": "the values are right, and the gradient is of the loss",
    "upstream_gradient_taken_as_one": "the values are right, and the gradient takes the upstream gradient for 1",
    "gradient_of_the_label_alone": "the values are right, and the gradient leaves out the softmax",
    "gradient_over_the_logits_unasked": "writes the gradient over the logits, unasked",
    "gradient_over_the_logits_unannounced": "writes the gradient over the logits without telling autograd",
    "one_buffer_for_all_results": "hands out memory that a later call writes again",
    "another_path_without_gradient": "takes another path where a gradient is needed",
    "crashes_on_no_rows": "raises for an empty batch (ValueError: need at least one row)",
    "trailing_dimension": "keeps a trailing dimension of 1",
    "nan_turned_into_zero": "makes a number of a row that holds NaN",
    "easyr1_fallback_before_its_correction": "returns the loss: positive where a log-probability must be negative",
    "negative_entropy": "returns the sum of p log p as the entropy",
    "next_token": "takes the label of the next row",
    "temperature_ignored": "ignores the temperature",
    "temperature_in_half_precision": "computes in half precision",
    "half_precision_sum": "computes in half precision",
    "last_block_forgotten": "leaves out the last columns, from 2048 on",
    "first_token_wins": "right for ordinary inputs, and wrong for these: ",
    "last_row_forgotten": "right for ordinary inputs, and wrong for these: ",  # those whose last label is not ignored
    "every_row_slightly_off": "loses digits that float32 has",
    "detached": "is detached from the logits",
    "temperature_missing_in_the_gradient": "the values are right, and the gradient lacks the division by the temperature",
    "ignored_label_counted_as_token_0": "does not know ignored labels: -100 counts as token 0",
    "infinite_logits_clamped": "makes a number of a label at -inf",
    "divides_the_logits_in_place": "divides the logits by the temperature in place",
    "ignored_labels_overwritten": "writes over its arguments",
    "writes_past_the_end": "writes beyond what it may",
    "reads_rows_as_if_contiguous": "right for ordinary inputs, and wrong for these: strided and misaligned",
    "one_buffer_for_all_gradients": "hands out memory that a later call writes again",
    "leaves_the_program": "raises for an ordinary input: SystemExit: 0",
    "result_in_the_dtype_of_the_logits": "with bfloat16 logits: returns bfloat16",
    "mean_over_the_batch": "returns the mean of the log-probabilities over the batch",
    "a_tuple_instead_of_a_tensor": "returns 2 results",
}


@pytest.mark.parametrize("wrong", WRONG_BACKENDS, ids=lambda wrong: wrong.name)
def test_every_wrong_backend_is_given_a_cause(wrong):
    """Of the small problem and, where its size hides the mistake, of the default ones."""
    report = clp.check_backend(wrong.call, SMALL)
    report = clp.check_backend(wrong.call) if report.passed else report
    assert report.causes and report.causes[0].startswith(EXPECTED[wrong.name]), report.causes


@pytest.mark.parametrize("right", RIGHT_BACKENDS, ids=lambda right: right.__name__)
def test_a_right_function_has_no_causes(right):
    assert clp.check_backend(right, SMALL).causes == ()


def test_a_wrong_backend_of_ones_own_is_given_a_cause_where_people_ask(monkeypatch):
    def forward(self, logits, labels, temperature, *, entropy):
        log_probs, entropies, residuals = Eager.forward(self, logits, labels, 1.0, entropy=entropy)
        return log_probs, entropies, residuals

    registry = import_module("compiled_logprobs.backends")
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    clp.register_backend("coldness", type("Coldness", (Eager,), {"name": "coldness", "forward": forward})())
    report = clp.check_backend("coldness", device="cpu")
    assert report.causes[0] == "ignores the temperature"
    assert clp.check_backend("coldness", SMALL).causes == ()  # the autotuner asks like this, and needs none


def test_a_function_is_called_with_its_own_copy_of_the_labels():
    function = Function(functions_to_check.right)
    logits, labels = torch.randn(5, 7), torch.randint(7, (5, 1))
    torch.testing.assert_close(
        function(logits, labels, 1.0, SMALL), functions_to_check.right(logits, labels[:, 0])[:, None]
    )
