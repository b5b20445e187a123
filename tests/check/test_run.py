"""The check stops no right backend, and every wrong one: the wrong ones are in test_causes.py."""

import re
import signal
import threading

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.backends import BUILT_IN, get_backend
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.check.cases import cases
from compiled_logprobs.problem import Problem
from tests.helpers.backends_for_tuning import registered
from tests.helpers.functions_to_check import (
    PROBLEM,
    RIGHT_FUNCTIONS,
    by_the_compiled_backend,
    float64_throughout,
    good,
    label_logit_minus_logsumexp,
    log_softmax_and_gather,
)


def failures(function, problem=None, seed=None) -> list[str]:
    return [check.detail for check in clp.check_backend(function, problem, seed=seed).checks if not check.passed]


def test_the_mean_square_has_verdicts_of_its_own():
    report = clp.check_backend(lambda logits, labels: good(logits, labels) * 1.001, PROBLEM)
    assert {"log_prob_rmse", "gradient_rmse"} <= set(report.reasons)


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 24), marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize(
    "right",
    [pytest.param(right, marks=[pytest.mark.slow] * (right is by_the_compiled_backend)) for right in RIGHT_FUNCTIONS],
    ids=lambda right: right.__name__,
)
def test_no_right_function_is_stopped(right, seeds):
    """Small problems, in alternating dtypes, with and without a gradient, and with whatever options a function has."""
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for seed in seeds:
        problem = PROBLEM._replace(dtype=dtypes[seed % 3], needs_grad=seed % 2 == 0)
        assert (seed, failures(right, problem, seed)) == (seed, [])


@pytest.mark.slow
@pytest.mark.parametrize("right", [log_softmax_and_gather, float64_throughout])
def test_no_right_function_is_stopped_by_default_inputs(right):
    report = clp.check_backend(right)
    assert report.passed and report.repeatable and report.causes == ()


@pytest.mark.slow
def test_the_compiled_idiom_of_a_user_passes():
    """torch.compile over log_softmax and gather, as open-instruct and others have it."""
    compiled = torch.compile(log_softmax_and_gather, dynamic=True)
    for seed in range(3):
        assert failures(lambda logits, labels: compiled(logits, labels), PROBLEM, seed) == []


def test_a_compiled_function_is_checked_compiled():
    """It is compiled more often than torch's limit allows, beyond which torch runs it as it is, without a word."""
    graphs, uncompiled = [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def function(logits, labels):
        if not torch.compiler.is_compiling():
            uncompiled.append(len(labels))
        return label_logit_minus_logsumexp(logits, labels)

    assert clp.check_backend(torch.compile(function, backend=backend), PROBLEM).passed
    assert len(graphs) > 8 and uncompiled == []


def test_an_interrupt_does_not_wait_for_a_function_that_hangs():
    released = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background

    def hangs(logits, labels):
        if not released.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            released.wait(120)
        return good(logits, labels)

    with pytest.raises(KeyboardInterrupt):
        clp.check_backend(hangs, PROBLEM, short=True)
    released.set()
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def spied():
    """The logits and labels of each call, and a function that keeps them."""
    calls = []

    def spy(logits, labels):
        calls.append((logits.detach(), labels.clone()))
        return good(logits, labels)

    return calls, spy


def test_inputs_are_fresh_and_a_seed_repeats_them(spied):
    calls, spy = spied
    seed = clp.check_backend(spy, PROBLEM, short=True).seed
    count = len(calls)
    clp.check_backend(spy, PROBLEM, short=True)
    clp.check_backend(spy, PROBLEM, short=True, seed=seed)
    first, fresh, again = ([x.nan_to_num() for x, _ in calls[i * count :][:count]] for i in range(3))
    assert not all(map(torch.equal, first, fresh)) and all(map(torch.equal, first, again))


def test_inputs_cover_what_the_design_lists(spied):
    calls, spy = spied
    clp.check_backend(spy, Problem("cpu", 48, 3001, torch.float32))
    assert {0, 1, 7, 33, 48} <= {len(labels) for _, labels in calls}  # the bucket of 48 is 33 to 48
    labels = torch.cat([labels for _, labels in calls])
    assert {0, 3000, -100, 1023, 1024, 2047, 2048} <= set(labels.tolist())
    values = [logits for logits, _ in calls if len(logits)]
    assert any(x.isnan().any() for x in values)
    assert any((x == -torch.inf).all(-1).any() for x in values)
    assert any(x.min() > 9e3 for x in values) and any(x.max() < -9e3 for x in values)
    assert any((x == x[:, :1]).all() for x in values)
    assert any(x.stride(0) != 3001 and x.data_ptr() % 16 != 0 for x in values)


class SumsByTheNumberOfRows(Eager):
    """As a kernel does that has another path for many rows."""

    name = "sums_by_the_number_of_rows"
    row_invariant = True

    def __init__(self, result: str) -> None:
        self.result = result

    def forward(self, inputs, wanted):
        results = super().forward(inputs, wanted)
        if len(inputs.logits) > 64 and (result := getattr(results, self.result)) is not None:
            result.mul_(1.0 + 2**-23)
        return results


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_a_backend_is_held_to_the_row_invariance_that_it_declares(entropy, short):
    problem = Problem("cpu", 512, 301, torch.float32, entropy=entropy)
    with registered(sums_by_the_number_of_rows=SumsByTheNumberOfRows("entropy" if entropy else "log_probs")):
        report = clp.check_backend("sums_by_the_number_of_rows", problem, short=short)
        few = clp.check_backend("sums_by_the_number_of_rows", problem._replace(rows=64), short=short)
    assert report.reasons == ["row_invariance"] and report.row_invariant is False
    (failed,) = [check for check in report.checks if not check.passed]
    assert re.fullmatch(r"512 rows, all and some: the first \d+ of 512 rows have other bits alone", failed.detail)
    assert few.passed and few.row_invariant


class AnotherPathForMore(Eager):
    """As a kernel does that is a different one with the entropy."""

    name = "another_path_for_more"
    row_invariant = True

    def forward(self, inputs, wanted):
        results = super().forward(inputs, wanted)
        if wanted.argmax:
            results.log_probs.mul_(1.0 + 2**-23)
        return results


def test_bits_that_depend_on_what_else_is_asked_for_are_no_invariant_rows():
    problem, name = Problem("cpu", 64, 301, torch.float32), "another_path_for_more"
    with registered(
        another_path_for_more=AnotherPathForMore()
    ):  # which rounds once more: the values may be off as well
        alone, more = (clp.check_backend(name, problem._replace(argmax=n), seed=0) for n in (False, True))
    assert alone.passed and more.reasons == ["row_invariance"]
    (failed,) = [check for check in more.checks if not check.passed]
    assert failed.detail.endswith("log-probabilities have other bits where nothing else is asked for")


def test_where_row_invariance_is_not_declared_it_is_recorded_and_no_failure():
    def depends_on_the_batch(logits, labels):
        return good(logits, labels) * (1.0 if len(labels) > 2 else 1.0 + 2**-23)

    report = clp.check_backend(depends_on_the_batch, Problem("cpu", 12, 3001, torch.float32))
    assert report.passed and report.row_invariant is False and report.repeatable


class ReturnsWhatItKeeps(Eager):
    """The entropy is the row of the stats that backward reads."""

    name = "returns_what_it_keeps"

    def forward(self, inputs, wanted):
        results = super().forward(inputs, wanted)
        return results._replace(entropy=results.stats[2]) if wanted.entropy else results


@pytest.mark.parametrize("short", [False, True])
def test_a_backend_may_not_return_what_it_keeps_for_the_backward(short):
    problem = Problem("cpu", 12, 301, torch.float32, needs_grad=True, entropy=True)
    with registered(returns_what_it_keeps=ReturnsWhatItKeeps()):
        report = clp.check_backend("returns_what_it_keeps", problem, short=short)
        alone = clp.check_backend("returns_what_it_keeps", problem._replace(entropy=False), short=short)
    assert report.reasons == ["own_memory"] and alone.passed
    assert report.causes[0].startswith("keeps for the backward what it also returns")


def test_a_function_may_refuse_what_it_says_it_does_not_take():
    def strict(logits, labels, temperature: float = 1.0, ignore_index=-100):
        assert logits.is_contiguous(), "logits must be contiguous"
        assert labels.is_contiguous() and isinstance(temperature, float) and ignore_index == -100
        return good(logits / temperature, labels)

    report = clp.check_backend(strict, PROBLEM)
    assert report.passed and len(report.refused) == 6
    assert report.refused[2:4] == (
        "strided and misaligned rows (AssertionError: logits must be contiguous)",
        "a last stride of 2 (AssertionError: logits must be contiguous)",
    )
    assert "does not take a temperature a token (AssertionError" in str(report)


def test_the_callers_random_numbers_are_the_same_after_a_check():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    clp.check_backend(good, PROBLEM)
    assert torch.equal(torch.rand(3), expected)


def test_the_default_inputs_cover_the_vocabularies_that_models_have():
    def sizes(problem, *, foreign):
        chosen = cases(problem, short=False, foreign=foreign, elsewhere=True)
        return {(case.vocab, case.rows) for case in chosen if case.vocab}

    in_half = PROBLEM._replace(dtype=torch.bfloat16)
    foreign = sizes(PROBLEM, foreign=True)
    assert foreign == {(vocab, 3) for vocab in (32000, 50257, 128256, 151936, 262144)} | {(131, 1024), (131, 1037)}
    assert sizes(in_half, foreign=True) == foreign
    assert sizes(PROBLEM, foreign=False) == {(131, 1024), (131, 1037)}
    assert sizes(in_half, foreign=False) == {(151936, 3)}


def test_which_backends_declare_row_invariance():
    assert [name for name in BUILT_IN if get_backend(name).row_invariant] == ["cpp", "compiled", "triton", "flash_attn"]


def test_a_backend_that_cannot_run_the_problem():
    with pytest.raises(clp.BackendUnavailable, match="needs a CUDA or ROCm device"):
        clp.check_backend("flash_attn", device="cpu")


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("p", "got a problem of type str; a Problem is valid. Pass e.g. Problem"),
        ({"rows": -1}, "whose rows is -1; an integer of 0 or more is valid. Pass e.g. Problem"),
        ({"vocab": 30.0}, "whose vocab is 30.0; an integer of 1 or more is valid"),
        ({"labels_per_row": 0}, "whose labels_per_row is 0; an integer of 1 or more"),
        ({"dtype": "float32"}, "whose dtype is 'float32'; torch.float32, "),
        ({"out_dtype": torch.int64}, "whose out_dtype is torch.int64; torch.float32, "),
        ({"temperature": "warm"}, "temperature is 'warm'; valid is one of none, number, per_token"),
        ({"device_type": "cuda:1"}, "device_type is 'cuda:1'; valid is a name of at most"),
        ({"device_type": "xpu"}, "got device='xpu', which this torch cannot use here: "),
        ({"device_type": "mars"}, "got device='mars'; e.g. 'cpu' or 'cuda:0' is valid. Name one"),
    ],
    ids=str,
)
def test_a_problem_that_cannot_be_is_refused(problem, said):
    with pytest.raises(clp.InputError, match=re.escape(said)):
        clp.check_backend("eager", PROBLEM._replace(**problem) if isinstance(problem, dict) else problem)


def test_a_device_that_cannot_be_is_refused():
    with pytest.raises(clp.InputError, match="got device='mars'; e.g. 'cpu' or 'cuda:0' is valid. Name one of them."):
        clp.check_backend("eager", device="mars")
