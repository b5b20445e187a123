"""Anyone's function: how it is called, and what it returns."""

import json

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

import compiled_logprobs as clp
from compiled_logprobs.check.function import Function
from compiled_logprobs.cli.main import app
from tests.helpers.functions_to_check import PROBLEM, good, labels_first


def of_other_names(scores, *, targets, temp=1.0, reduction="mean"):
    """Right, where `reduction` is 'none' and `temp` the temperature; a loss."""
    return functional.cross_entropy(scores.float() / temp, targets, reduction=reduction)


def of_batches(logits, labels):
    """logits [B, T, V], labels [B, T] -> [B, T]."""
    return torch.stack([good(x, y) for x, y in zip(logits, labels, strict=True)])


def with_a_required_length(logits, labels, length):
    return good(logits, labels)[:length]


@pytest.mark.parametrize(
    ("function", "call", "returns"),
    [
        (labels_first, "f(labels, logits)", "log_prob"),
        (of_other_names, "f(logits, targets=labels, temp=temperature, reduction='none')", "loss"),
        (of_batches, "f(logits[None], labels[None])", "log_prob"),
        (of_batches, "f(logits.unsqueeze(0), labels.unsqueeze(0)).squeeze(0)", "log_prob"),
        (with_a_required_length, " f(logits, labels, 48)", "log_prob"),
        (good, "-f(logits, labels)", "loss"),
        (functional.cross_entropy, "f(logits, labels, reduction='none', ignore_index=ignore_index)", "loss"),
    ],
)
def test_a_right_function_of_other_arguments_passes(function, call, returns):
    report = clp.check_backend(function, PROBLEM, call=call, returns=returns)
    assert report.passed and report.causes == (), (report.reasons, report.causes)


def test_the_options_in_a_call_are_tried_and_no_others():
    seen = []

    def spy(logits, labels, **options):
        seen.append(options)
        return good(logits / options.get("temp", 1.0), labels)

    assert clp.check_backend(spy, PROBLEM, call="f(logits, labels, temp=temperature, flag=True)").passed
    assert all(options.keys() == {"temp", "flag"} and options["flag"] is True for options in seen)
    assert any(options["temp"] != 1.0 for options in seen)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("f(logits, labels", "no expression of Python: '\\(' was never closed"),
        ("f(logits, labels, temp=1, temp=2)", "no expression of Python: keyword argument repeated: temp"),
        ("labels, logits", "no f in it"),
        ("f(labels=labels)", "no logits in it"),
        ("f(logits, labels, temp)", "the name 'temp' in it"),
        ("logits.map_(labels, f)", "which does not call f"),
        ("__import__('os').remove(f(logits, labels))", "the name '__import__' in it"),
    ],
)
def test_a_call_that_is_none_is_refused_with_an_example(call, said):
    with pytest.raises(clp.InputError, match=rf"got call .*{said}.*Valid is e.g. call=\"f\(labels, logits"):
        clp.check_backend(good, call=call)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("f(logits, targets=labels, tau=temperature)", "unexpected keyword argument 'tau'"),
        ("-f(logits, labels)[0]", "missing a required argument: 'targets'|too many positional arguments"),
    ],
)
def test_what_the_function_does_not_take_is_refused(call, said):
    with pytest.raises(clp.InputError, match=rf"got call .* a function of \(scores, .*({said}).*Say how"):
        Function(of_other_names, call)


@pytest.mark.parametrize("call", ["-f(logits, targets=labels)", "f(logits, targets=labels)[0]", "f(*(logits, labels))"])
def test_a_call_may_stand_anywhere_and_unpack(call):
    assert Function(of_other_names, call).call == call
    assert Function(torch.rsub, "f(logits, labels, anything=1)")  # has no signature


@pytest.mark.parametrize("error", [ImportError, NameError])
def test_a_signature_that_raises_is_said_to(error):
    """As lazily imported placeholders do, and annotations that Python evaluates late."""

    class Lazy:
        @property
        def __signature__(self):
            raise error("libcudart.so.12")

        def __call__(self, logits, labels):
            return good(logits, labels)

    with pytest.raises(clp.InputError, match=rf"cannot be read \({error.__name__}: libcudart.so.12\).*--call"):
        clp.check_backend(Lazy())
    assert clp.check_backend(Lazy(), PROBLEM, call="f(logits, labels)").passed


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (with_a_required_length, {}, "missing a required argument: 'length'. Say how it is called, e.g. call="),
        (torch.rsub, {}, "whose signature cannot be read"),
        (None, {}, "got 'None' of type NoneType, which cannot be called; a function of .* or the name of a backend"),
        (torch.nn.CrossEntropyLoss, {}, "got the class CrossEntropyLoss; a function is valid, or an instance"),
        ("eager", {"returns": "loss"}, "which is known of a backend. Leave them out."),
        (good, {"returns": "probability"}, "'log_prob' or 'loss' is valid"),
        (good, {"problem": PROBLEM, "vocab": 301}, "vocab=301 beside 12 x 3001 .*; 2 or more is valid, without"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, options, said):
    with pytest.raises(clp.InputError, match=said):
        clp.check_backend(given, **options)


@pytest.mark.parametrize(
    ("options", "exit_code"),
    [
        ((), 1),
        (("--call", "f(labels, logits)"), 0),
        (("--call", "f(labels)"), 2),
        (("--call", "f(labels, logits, tau=1)"), 2),
    ],
)
def test_the_command_line_takes_a_call_and_a_vocabulary(options, exit_code):
    target = "tests.helpers.functions_to_check:labels_first"
    result = CliRunner().invoke(app, ["check", target, "--vocab", "301", "--seed", "3", "--json", *options])
    assert result.exit_code == exit_code, result.output
    if exit_code < 2:
        (report,) = json.loads(result.stdout, parse_constant=pytest.fail)["reports"]
        assert bool(report["causes"]) == bool(exit_code) and "48 x 301 float32" in report["checks"][0]["problem"]
