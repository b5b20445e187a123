"""The backends: each passes the check in everything it can do; and the registry."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.backends import get_backend, why_not
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.problem import Problem

ROOT = Path(__file__).parents[2]
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
    "two strides, in place": {"needs_grad": True, "layout": "other", "inplace_backward": True},
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
        *(
            (name, dtype, options)
            for name in clp.backends()
            for dtype in DTYPES
            for options in OPTIONS
            if name != "compiled"
        ),
        *(pytest.param("compiled", *combination, marks=pytest.mark.slow) for combination in COMPILED),
    ],
)
def test_every_backend_that_can_run_passes_the_check(name, dtype, options):
    chosen = dict(OPTIONS[options])
    if "out_dtype" in chosen:
        chosen["out_dtype"] = DTYPES[dtype]
    problem = Problem("cpu", 24, VOCAB, DTYPES[dtype], **chosen)
    reason = why_not(name, problem)
    if reason is not None:
        assert name == "flash_attn" and reason == "needs a CUDA or ROCm device"  # test_flash_attn.py runs it
        return
    report = clp.check_backend(name, problem)
    assert report.passed, [check.detail for check in report.checks if not check.passed]
    assert report.repeatable and report.row_invariant is not None


def test_what_float16_cannot_hold_is_no_error_of_a_backend():
    # With this seed, a row's upstream gradient is 7e-5: its gradient lies below the smallest normal number of float16.
    problem = Problem("cpu", 24, VOCAB, torch.float16, **OPTIONS["strided rows, entropy"])
    for name in ("eager", "cpp"):
        assert clp.check_backend(name, problem, seed=548214262).reasons == []


def test_float64_is_for_eager_alone():
    problem = Problem("cpu", 24, VOCAB, torch.float64, out_dtype=torch.float64, needs_grad=True, entropy=True)
    assert clp.check_backend("eager", problem).passed
    assert why_not("compiled", problem) == "computes in float32; float64 logits are for eager"


class Doubling(Eager):
    """Wrong by a factor."""

    name = "doubling"

    def forward(self, logits, labels, temperature, *, entropy):
        log_probs, entropies, residuals = super().forward(logits, labels, temperature, entropy=entropy)
        return 2 * log_probs, entropies, residuals


@pytest.fixture
def registry(monkeypatch):
    """A registry that forgets what a test registers."""
    module = sys.modules["compiled_logprobs.backends"]
    monkeypatch.setattr(module, "_targets", dict(module._targets))
    monkeypatch.setattr(module, "_loaded", dict(module._loaded))


def test_a_registered_backend_runs_by_name_and_is_checked(registry):
    clp.register_backend("doubling", Doubling())
    assert clp.backends()[-1] == "doubling"
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    out = clp.log_probs_from_logits(logits, labels, backend="doubling")
    torch.testing.assert_close(out, 2 * clp.log_probs_from_logits(logits, labels, backend="eager"))
    assert "log_prob_error" in clp.check_backend("doubling", Problem("cpu", 8, 257, torch.float32)).reasons


def test_a_backend_is_registered_by_its_place_and_imported_when_used(registry):
    clp.register_backend("elsewhere", "compiled_logprobs.backends.eager:Eager")
    assert isinstance(get_backend("elsewhere"), Eager)
    clp.register_backend("elsewhere", "compiled_logprobs.backends.eager:Eager")  # the same again is no mistake
    clp.register_backend("missing", "no_such_package:Backend")
    with pytest.raises(
        clp.BackendUnavailable, match="backend 'missing' cannot be imported from 'no_such_package:Backend'"
    ):
        get_backend("missing")
    assert "cannot be imported" in why_not("missing", Problem("cpu", 1, 8, torch.float32))
    clp.register_backend("a_function", "torch:add")
    with pytest.raises(clp.BackendUnavailable, match="not a Backend. Subclass compiled_logprobs.backends.base.Backend"):
        get_backend("a_function")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("auto", Doubling(), "got 'auto' for a backend's name"),
        ("two words", Doubling(), "got 'two words' for a backend's name; an identifier is valid"),
        ("eager", Doubling(), "backend 'eager' is registered already"),
        ("mine", "module_without_attribute", "its place as 'package.module:attribute', is valid"),
        ("mine", print, "a Backend, or its place as"),
    ],
)
def test_registering_nonsense(registry, name, target, message):
    with pytest.raises(clp.InputError, match=message):
        clp.register_backend(name, target)


def test_each_backend_has_a_fingerprint_of_its_own():
    names = clp.backends()
    assert len({get_backend(name).fingerprint() for name in names}) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), [("cpp", "float32"), ("cpp", "bfloat16"), ("compiled", "bfloat16")])
def test_extra_memory(backend, dtype):
    """Peak resident memory of a process, over that before the call, in multiples of the logits."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.helpers.peak_memory", backend, dtype],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    extra = json.loads(ran.stdout)
    print(extra)
    assert extra["forward"] < 0.01
    assert extra["forward of a slice"] < 0.01
    assert extra["forward and backward"] < 1.02
    assert extra["in place"] < 0.02
