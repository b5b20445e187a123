"""The backends: each passes the check in everything it can do; and the registry."""

import itertools

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.backends import get_backend, why_not
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.machine.clock import extra_peak_bytes, why_no_peak
from compiled_logprobs.operation.contract import Inputs, Wanted
from compiled_logprobs.problem import Problem
from tests.helpers.backends_for_tuning import WrongSign, registered

VOCAB = 1031  # odd, off every block size
OPTIONS = {
    "forward": {},
    "gradient, temperature": {"needs_grad": True, "temperature": "number"},
    "entropy, 3 labels, a temperature a token": {
        "needs_grad": True,
        "entropy": True,
        "labels_per_row": 3,
        "temperature": "per_token",
    },
    "in place, masked": {"needs_grad": True, "inplace_backward": True, "masked_logits": True, "temperature": "number"},
    "strided rows, entropy": {"needs_grad": True, "entropy": True, "layout": "rows", "aligned": False},
    "two strides, in place": {"needs_grad": True, "layout": "slice", "inplace_backward": True},
    "result in the dtype of the logits": {"needs_grad": True, "out_dtype": None},
}


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILED = [
    *(("bfloat16", options) for options in OPTIONS),
    ("float32", "gradient, temperature"),
    ("float32", "two strides, in place"),
    ("float16", "result in the dtype of the logits"),
]
"""Not all combinations, since each is compiled."""


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        *itertools.product(("cpp", "eager"), DTYPES, OPTIONS),
        *(pytest.param("compiled", *combination, marks=pytest.mark.slow) for combination in COMPILED),
    ],
)
def test_every_backend_for_cpus_passes_the_check(name, dtype, options):
    chosen = dict(OPTIONS[options])
    if "out_dtype" in chosen:
        chosen["out_dtype"] = DTYPES[dtype]
    problem = Problem("cpu", 24, VOCAB, DTYPES[dtype], **chosen)
    report = clp.check_backend(name, problem)
    assert report.passed, [check.detail for check in report.checks if not check.passed]
    assert report.repeatable and report.row_invariant is not None


@pytest.mark.parametrize("name", ["cpp", "eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("vocab", [7, 100, 70001])
def test_a_maximum_of_minus_infinity_says_that_a_row_holds_nothing_else(name, vocab):
    """And no NaN: what other ranks are told of a part of the vocabulary."""
    logits = torch.full((5, vocab), -torch.inf)
    logits[1:3, -1] = torch.nan
    logits[2, 0] = logits[3, 0] = 1.0
    inputs = Inputs(logits, torch.zeros(5, 1, dtype=torch.int64), 0.7, -100)
    m, log_s = get_backend(name).forward(inputs, Wanted(entropy=True)).stats[:2]
    assert (m == -torch.inf).tolist() == [True, False, False, False, True]
    assert (m.isnan() | log_s.isnan())[1:4].tolist() == [True, True, False]


def test_what_float16_cannot_hold_is_no_error_of_a_backend():
    # With this seed, a row's upstream gradient is 7e-5: its gradient lies below the smallest normal number of float16.
    problem = Problem("cpu", 24, VOCAB, torch.float16, **OPTIONS["strided rows, entropy"])
    for name in ("eager", "cpp"):
        assert clp.check_backend(name, problem, seed=548214262).reasons == []


@pytest.fixture
def registry():
    """A registry that forgets what a test registers."""
    with registered():
        yield


def test_a_registered_backend_runs_by_name_and_is_checked(registry):
    clp.register_backend("wrong", WrongSign())
    assert clp.backends()[-1] == "wrong"
    out = clp.log_probs_from_logits(torch.randn(3, 5), torch.tensor([0, 1, 2]), backend="wrong")
    assert (out > 0).all()  # as it is: what a backend returns is finished
    report = clp.check_backend("wrong", device="cpu", vocab=257)
    assert "log_prob_sign" in report.reasons and report.causes[0].startswith("returns the loss")


def test_a_backend_is_registered_by_its_place_and_imported_when_used(registry):
    for _ in range(2):  # the same again is no mistake
        clp.register_backend("elsewhere", "compiled_logprobs.backends.eager:Eager")
    assert isinstance(get_backend("elsewhere"), Eager)
    clp.register_backend("missing", "no_such_package:Backend")
    with pytest.raises(
        clp.BackendUnavailable, match="backend 'missing' cannot be imported from 'no_such_package:Backend'"
    ):
        get_backend("missing")
    assert "cannot be imported" in why_not("missing", Problem("cpu", 1, 8, torch.float32))
    clp.register_backend("a_function", "torch:add")
    with pytest.raises(clp.BackendUnavailable, match="not a Backend. Subclass compiled_logprobs.backends.base.Backend"):
        get_backend("a_function")


class HalfABackend(Eager):
    """With mistakes that would show only when it is called."""

    summary = None

    def forward(self, logits, labels, temperature):
        pytest.fail("it was called")

    def backward(self, inputs, stats, upstream, inplace_backward=False):
        pytest.fail("it was called")

    is_warm = True


@pytest.mark.parametrize("target", [HalfABackend(), f"{__name__}:HalfABackend"], ids=["instance", "place"])
def test_what_is_no_whole_backend_is_told_before_it_is_called(registry, target):
    clp.register_backend("half", target)
    words = (
        "backend 'half' is no whole Backend: got summary=None, where a str is valid; got backward(inputs, stats, "
        "upstream, inplace_backward=False), where backward(inputs, stats, upstream, *, inplace) is valid; got "
        "forward(logits, labels, temperature), where forward(inputs, wanted) is valid; got is_warm=True, where "
        "is_warm(problem) is valid. Write HalfABackend as compiled_logprobs.backends.base.Backend has it."
    )
    with pytest.raises(clp.BackendUnavailable) as raised:
        clp.log_probs_from_logits(torch.randn(3, 5), torch.tensor([0, 1, 2]), backend="half")
    assert str(raised.value) == words == why_not("half", Problem("cpu", 1, 8, torch.float32))


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("auto", Eager(), "got 'auto' for a backend's name"),
        ("two words", Eager(), "got 'two words' for a backend's name; an identifier is valid"),
        ("eager", Eager(), "backend 'eager' is registered already"),
        ("mine", "module_without_attribute", "its place as 'package.module:attribute', is valid"),
        ("mine", print, "a Backend, or its place as"),
    ],
)
def test_registering_nonsense(registry, name, target, message):
    with pytest.raises(clp.InputError, match=message):
        clp.register_backend(name, target)


class Computed(torch.autograd.Function):
    """Logits as a model gives them: not a leaf, and nothing else keeps them."""

    @staticmethod
    def forward(ctx, model, values):
        return values

    @staticmethod
    def backward(ctx, gradient):
        return None, None


@pytest.mark.slow
@pytest.mark.skipif(why_no_peak("cpu") is not None, reason=str(why_no_peak("cpu")))
@pytest.mark.parametrize("backend", ["cpp", "compiled"])
def test_extra_memory(backend):
    """Peak over what was in use before the call, in multiples of the logits."""
    padded, model = torch.randn(8, 65, 32003).to(torch.bfloat16), torch.zeros((), requires_grad=True)
    labels = torch.randint(32003, (8, 65))

    def forward(x, **options):
        return clp.log_probs_from_logits(x, labels[:, : x.shape[1]], backend=backend, **options)

    def both(x, **options):
        return torch.autograd.grad(forward(x, **options).sum(), x)

    forward(padded[:, :-1])  # compiles
    both(Computed.apply(model, padded))
    both(Computed.apply(model, padded.clone()), inplace_backward=True)
    computed, in_place = Computed.apply(model, padded), Computed.apply(model, padded.clone())
    for call, limit in (
        (lambda: forward(padded[:, :-1]), 0.02),
        (lambda: both(computed), 1.04),
        (lambda: both(in_place, inplace_backward=True), 0.04),
    ):
        assert extra_peak_bytes(call, "cpu") / padded.nbytes < limit
