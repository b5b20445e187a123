"""What torch.compile is asked for: few compilations, and no copy of the logits."""

import itertools
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import compiled_logprobs as clp
from compiled_logprobs.backends import compiled as compiled_module
from compiled_logprobs.backends import get_backend
from compiled_logprobs.backends.compiled import _dummies, _why_no_cpp_compiler
from compiled_logprobs.operation import formula
from compiled_logprobs.operation.autograd import compute
from compiled_logprobs.operation.contract import Inputs, Upstream, Wanted
from compiled_logprobs.operation.formula import Saved
from compiled_logprobs.problem import Problem, layout_of

ROWS = [0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 64, 100, 128, 255, 512, 1000, 1024, 2048, 4095, 4096]
COMPILED = get_backend("compiled")
TAKES_HINTS = compiled_module._takes_hints()


def compilations(function) -> int:
    before = counters["stats"]["unique_graphs"]
    function()
    return counters["stats"]["unique_graphs"] - before


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "vocab"), [(ROWS, 61), (ROWS[::-1], 59)], ids=["rising", "falling"])
def test_any_number_of_rows_and_any_temperature_take_one_compilation_a_direction(rows, vocab):
    """The order in which N comes decides what the compiler takes for constant."""
    forward = backward = 0
    for n, temperature in itertools.product(rows, [1.0, 0.7, 2.0]):
        logits, labels, results = torch.randn(n, vocab, requires_grad=True), torch.randint(vocab, (n, 1)), []
        call = partial(compute, COMPILED, logits, labels, temperature)
        forward += compilations(lambda: results.extend(call()))  # noqa: B023 - called at once
        backward += compilations(lambda: results[0].sum().backward())  # noqa: B023 - called at once
    assert (forward, backward) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("takes_hints", "vocab"), [(True, 2999), (False, 2987)])
def test_the_form_for_gpus_takes_one_compilation_whatever_number_of_rows_comes_first(monkeypatch, takes_hints, vocab):
    """Compiled for a CPU here, with the sizes that Inductor is told of on a GPU: they must not become guards, nor reach
    backward."""
    monkeypatch.setattr(compiled_module, "reads_blocks", lambda device_type, vocab: True)
    monkeypatch.setattr(compiled_module, "_takes_hints", lambda: takes_hints and TAKES_HINTS)
    count = 0
    for n in (3000, 1, 2, 7, 342, 64):
        leaf, labels = torch.randn(n, vocab, requires_grad=True), torch.randint(vocab, (n, 1))
        temperature, results = torch.rand(n) + 0.5, []
        call = partial(compute, COMPILED, leaf, labels, temperature, entropy=True)
        count += compilations(lambda: results.extend(call()))  # noqa: B023 - called at once
        truth = (leaf / temperature.unsqueeze(-1)).log_softmax(-1)
        true = truth.gather(-1, labels), -(truth.exp() * truth).sum(-1)
        torch.testing.assert_close(results, list(true), rtol=1e-4, atol=1e-5)
        mine, gradient = (torch.autograd.grad(x.sum() + h.sum(), leaf)[0] for x, h in (results, true))
        torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-5)
    assert count == 1


@pytest.mark.slow
def test_any_batch_and_length_take_one_compilation_a_direction():
    """Whole [B, T, V] logits are those of [B * T, V]; a slice of the positions has two strides, and a compilation of
    its own."""
    whole = sliced = 0
    for batch, length in ((2, 5), (3, 5), (3, 9), (8, 4)):
        leaf, labels = torch.randn(batch, length, 53, requires_grad=True), torch.randint(53, (batch, length))

        def run(logits, labels):
            clp.log_probs_from_logits(logits, labels, backend="compiled").sum().backward()

        whole += compilations(lambda: run(leaf * 1.0, labels))  # noqa: B023 - called at once
        sliced += compilations(lambda: run((leaf * 1.0)[:, :-1], labels[:, :-1]))  # noqa: B023 - called at once
    assert (whole, sliced) == (2, 2)  # forward and backward


@pytest.mark.slow
def test_each_of_many_vocabularies_is_a_constant_of_its_kernel(monkeypatch):
    """torch.compile takes a size that has changed for dynamic, and falls back to eager after many compilations."""
    monkeypatch.setattr(compiled_module, "RECOMPILE_LIMIT", 2)
    sizes = []

    def spy(self, *arguments, **options):
        size = create_symbol(self, *arguments, **options)
        sizes.append(str(size))
        return size

    create_symbol = ShapeEnv.create_symbol
    monkeypatch.setattr(ShapeEnv, "create_symbol", spy)
    for vocab in range(11, 15):
        logits = torch.randn(6, vocab)
        sizes.clear()
        (log_probs,) = compute(COMPILED, logits, torch.zeros(6, 1, dtype=torch.int64))
        torch.testing.assert_close(log_probs[:, 0], logits.log_softmax(-1)[:, 0])
        assert str(vocab) in sizes  # and not a symbol
        assert any(size.startswith("s") for size in sizes)  # but N is


def test_without_a_compiler_the_backend_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    # The reason without its cache, for which the compiler is still there.
    assert _why_no_cpp_compiler.__wrapped__() == (
        "torch.compile needs a C++ compiler on CPU, and there is none on the PATH: install one, or name it in CXX"
    )


@pytest.mark.parametrize("layout", ["flat", "rows", "slice"])
def test_what_stands_in_for_hints_has_the_layout_of_the_call(layout):
    logits = {"flat": torch.zeros(5, 32), "rows": torch.zeros(5, 48)[:, :32], "slice": torch.zeros(3, 5, 32)[:, :-1]}[
        layout
    ]
    leading = logits.ndim - 1
    dummy, labels, number = _dummies(
        [logits, logits.new_zeros(*logits.shape[:-1], 1), torch.tensor(0.7)], leading, [2, 7][-leading:]
    )
    assert layout_of(dummy) == layout_of(logits) and dummy.shape == (*[2, 7][-leading:], 32)
    assert labels.shape == (*[2, 7][-leading:], 1) and number == 0.7


def test_where_torch_compile_is_disabled_the_backend_says_so():
    with torch._dynamo.config.patch(disable=True):
        reason = COMPILED.why_not(Problem("cpu", 8, 100, torch.float32))
    assert reason == "torch.compile is disabled here: unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE"


def rows_of_every_kind(vocab: int, leading: tuple[int, ...]) -> torch.Tensor:
    logits = 5 * torch.randn(*leading, vocab) + 100
    logits[..., 0, :] = -torch.inf
    logits[..., 1, : min(vocab - 1, 2 * formula.BLOCK)] = -torch.inf  # whole blocks of it
    logits[..., 2, vocab - 1] = torch.nan
    logits[..., 3, 0] = torch.inf
    logits[..., 4, :] = 1.0
    logits[..., 5, 1:] = -torch.inf
    return logits


@pytest.mark.parametrize("vocab", [5, formula.BLOCK, formula.BLOCK + 1, 5000])
@pytest.mark.parametrize(("leading", "per_token"), [((7,), False), ((2, 6), True)], ids=["rows", "batch and length"])
def test_the_forms_for_gpus_agree_with_the_others_in_float64(vocab, leading, per_token):
    logits, labels = rows_of_every_kind(vocab, leading), torch.randint(vocab, (*leading, 2))
    temperature = torch.rand(leading) + 0.5 if per_token else 0.7
    exact = temperature.double() if per_token else temperature
    for entropy in (False, True):
        got = formula.forward_in_blocks(logits, labels, temperature, entropy=entropy)
        truth = formula.forward_at_once(logits.double(), labels, exact, entropy=entropy)
        for mine, true in zip((*got[:2], *got[2]), (*truth[:2], *truth[2]), strict=True):
            if true is not None:
                torch.testing.assert_close(mine.double(), true, rtol=3e-6, atol=3e-5, equal_nan=True)

    labels, residuals = labels[..., :1], formula.forward_at_once(logits.double(), labels, exact, entropy=True)[2]
    ignored, upstream, through_entropy = torch.rand(leading) < 0.3, torch.randn(*leading, 1), torch.randn(leading)
    for grad_entropy in (None, through_entropy):
        in_float32 = tuple(residual.float() for residual in residuals)
        mine = formula.gradient(
            Saved(logits, labels, temperature, in_float32, ignored), Upstream(upstream, grad_entropy)
        )
        true, at_labels = formula.backward_at_once(
            Saved(logits.double(), labels, exact, residuals, ignored), Upstream(upstream.double(), grad_entropy)
        )
        formula.write_label_columns(true, labels, at_labels)
        torch.testing.assert_close(mine.double(), true, rtol=3e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "limit"),
    [((9, 5000), 6 * 5120), ((4, 7, 5000), 2 * 7 * 5120), ((3, 400, 5000), 110 * 5120)],
    ids=["rows", "batches", "each batch too large"],
)
def test_rows_beyond_32_bit_indices_are_computed_in_parts(shape, limit, monkeypatch):
    """On a GPU, since the number of blocks that Inductor is told of makes it index with 32 bits."""
    monkeypatch.setattr(compiled_module, "INT32_MAX", limit)
    monkeypatch.setattr(compiled_module, "reads_blocks", lambda device_type, vocab: True)
    parts = []

    def run(function, logits, labels, temperature, *, hints):
        parts.append(logits.shape)
        assert compiled_module.rows_within_int32(logits) >= len(logits)
        assert max(hints[0] * 5 * (hints[1] if len(hints) > 1 else 1), 1024) < 64 * 108
        return formula.forward_in_blocks(logits, labels, temperature, entropy=True)

    monkeypatch.setattr(compiled_module, "_run", run)
    logits, labels = torch.randn(1, *shape[1:]).expand(shape), torch.randint(5000, (*shape[:-1], 1))
    results = COMPILED.forward(Inputs(logits, labels, torch.rand(shape[:-1]) + 0.5, -100), Wanted(entropy=True))
    assert len(parts) > 1 and results.log_probs.shape == labels.shape and results.entropy.shape == shape[:-1]
    assert results.stats.shape == (3, *shape[:-1])


BROKEN_COMPILER = """
import torch, compiled_logprobs as clp
logits, labels = torch.randn(1100, 1000), torch.randint(1000, (1100,))
print(clp.log_probs_from_logits(logits, labels).shape)
try:
    clp.log_probs_from_logits(logits, labels, backend="compiled")
except clp.BackendUnavailable as error:
    print(error)
"""


@pytest.mark.slow
def test_a_compiler_that_fails_is_a_reason_and_auto_serves_all_the_same(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, "-c", BROKEN_COMPILER], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("torch.Size([1100])\nbackend 'compiled' could not be compiled here: ")
    assert "use backend='eager' or backend='auto'" in ran.stdout
