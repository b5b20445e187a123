"""What torch.compile is asked for: few compilations, and no copy of the logits."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import compiled_logprobs as clp
from compiled_logprobs.autograd import compute
from compiled_logprobs.backends import get_backend
from compiled_logprobs.backends.compiled import _why_no_cpp_compiler
from compiled_logprobs.problem import Problem

ROWS = [0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 64, 100, 128, 255, 512, 1000, 1024, 2048, 4095, 4096]
TEMPERATURES = [1.0, 0.5, 0.7, 1.3, 2.0]


def compilations(function) -> int:
    before = counters["stats"]["unique_graphs"]
    function()
    return counters["stats"]["unique_graphs"] - before


@pytest.mark.parametrize("rows", [ROWS, ROWS[::-1]], ids=["rising", "falling"])
def test_any_number_of_rows_and_any_temperature_take_one_compilation_a_direction(rows):
    """The limit is two; the order in which N comes decides what the compiler takes for constant."""
    backend = get_backend("compiled")
    vocab = 61 if rows is ROWS else 59
    forward = backward = 0
    for n in rows:
        for temperature in TEMPERATURES:
            logits = torch.randn(n, vocab, requires_grad=True)
            labels = torch.randint(vocab, (n, 1))
            forward += compilations(lambda: compute(backend, logits, labels, temperature))  # noqa: B023 - called at once
            log_probs, _ = compute(backend, logits, labels, temperature)
            backward += compilations(lambda: log_probs.sum().backward())  # noqa: B023 - called at once
    assert (forward, backward) == (1, 1)


def test_any_batch_and_length_take_one_compilation_a_direction():
    """Whole [B, T, V] logits are those of [B * T, V]; a slice of the positions has two strides, and a compilation of its own."""
    whole = sliced = 0
    for batch, length in ((2, 5), (3, 5), (4, 7), (3, 9), (8, 3), (5, 4)):
        leaf, labels = torch.randn(batch, length, 53, requires_grad=True), torch.randint(53, (batch, length))

        def run(logits, labels):
            clp.log_probs_from_logits(logits, labels, backend="compiled").sum().backward()

        whole += compilations(lambda: run(leaf * 1.0, labels))  # noqa: B023 - called at once
        sliced += compilations(lambda: run((leaf * 1.0)[:, :-1], labels[:, :-1]))  # noqa: B023 - called at once
    assert (whole, sliced) == (2, 2)  # forward and backward


def test_a_vocabulary_is_a_constant_of_its_kernel():
    """torch.compile takes a size that has changed for dynamic; the vocabulary of another function must not count."""
    backend = get_backend("compiled")
    found = []

    def spy(self, *arguments, **options):
        size = create_symbol(self, *arguments, **options)
        found.append(str(size))
        return size

    create_symbol = ShapeEnv.create_symbol
    for vocab in (47, 43, 41):
        logits, labels = torch.randn(6, vocab, requires_grad=True), torch.randint(vocab, (6, 1))
        found.clear()
        with mock.patch.object(ShapeEnv, "create_symbol", spy):
            log_probs, _ = compute(backend, logits, labels)
            log_probs.sum().backward()
        assert str(vocab) in found  # and not a symbol
        assert any(size.startswith("s") for size in found)  # but N is


def test_many_vocabularies_do_not_exhaust_a_recompilation_limit():
    backend = get_backend("compiled")
    for vocab in range(11, 23):  # torch's default limit is 8 for one function
        logits = torch.randn(4, vocab)
        log_probs, _ = compute(backend, logits, torch.zeros(4, 1, dtype=torch.int64))
        torch.testing.assert_close(log_probs[:, 0], logits.log_softmax(-1)[:, 0])


def test_without_a_compiler_the_backend_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    _why_no_cpp_compiler.cache_clear()
    try:
        reason = get_backend("compiled").why_not(Problem("cpu", 8, 100, torch.float32))
        assert reason == (
            "torch.compile needs a C++ compiler on CPU, and there is none on the PATH: install one, or name it in CXX"
        )
    finally:
        _why_no_cpp_compiler.cache_clear()


BROKEN_COMPILER = """
import torch, compiled_logprobs as clp
logits, labels = torch.randn(1100, 1000), torch.randint(1000, (1100,))
print(clp.log_probs_from_logits(logits, labels).shape)
try:
    clp.log_probs_from_logits(logits, labels, backend="compiled")
except clp.BackendUnavailable as error:
    print(error)
"""


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
