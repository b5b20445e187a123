"""The C++ kernels: what their tiles, tables and threads could get wrong; every vector width; accuracy."""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.backends import cpp, cpp_build
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.operation.contract import Inputs, Upstream, Wanted
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem

TILE = int(re.search(r"\bTILE = (\d+);", cpp.SOURCE.read_text())[1])
BLOCK = 256
"""Columns that AVX-512 sums by themselves; elsewhere they are fewer."""
VOCAB = 3 * TILE + 77
CPP = cpp.Cpp()
PROBLEM = Problem("cpu", 24, VOCAB, torch.float32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def both(logits, labels, **options):
    """Log-probabilities, entropy and gradient, by the kernels and in float64."""
    x = logits.detach().clone().requires_grad_()
    out = clp.log_probs_from_logits(x, labels, return_entropy=True, backend="cpp", **options)
    g, h = torch.randn_like(out.log_probs), torch.randn_like(out.entropy)
    (gradient,) = torch.autograd.grad(list(out), x, [g, h])
    true = reference(logits.detach(), labels.unsqueeze(-1), grad_log_probs=g.unsqueeze(-1), grad_entropy=h, **options)
    return (out.log_probs, out.entropy, gradient), (true.log_probs.squeeze(-1), true.entropy, true.gradient)


def assert_all_close(computed, true, atol=2e-5):
    for a, b in zip(computed, true, strict=True):
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=0, equal_nan=True)


@pytest.mark.parametrize("peak", [0, BLOCK - 1, BLOCK, TILE - 1, TILE, 2 * TILE + BLOCK, VOCAB - 1])
@pytest.mark.parametrize("height", [3.0, 5.5, 6.0, 40.0, 1e4, 3e38])
def test_a_logit_far_above_the_others_of_its_tile(peak, height):
    logits = torch.randn(3, VOCAB)
    logits[1, peak] = height
    for temperature in (1.0, 0.1):
        computed, true = both(logits, torch.tensor([peak, peak, 5]), temperature=temperature)
        assert_all_close(computed, true, 2e-5 / temperature)
    assert computed[0].max() <= 0 and computed[1].min() >= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_masked_blocks_tiles_and_rows(dtype):
    logits = torch.randn(6, VOCAB).to(dtype)
    logits[0, :BLOCK] = -torch.inf  # a block
    logits[1, : TILE + 1] = -torch.inf  # a tile
    logits[2, :-1] = -torch.inf  # all but the last column
    logits[3, 1:] = -torch.inf  # all but the first
    logits[4] = -torch.inf
    logits[5, ::2] = -torch.inf
    labels = torch.tensor([0, 5000, VOCAB - 1, 0, 3, 1])
    computed, true = both(logits, labels)
    assert_all_close(computed, true, 2e-5 if dtype == torch.float32 else 4e-2)
    assert (computed[2][2, :-1] == 0).all() and computed[1][2] == 0  # and not next to nothing


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("where", "vocab", "masked"),
    [
        (0, VOCAB, True),
        (17, VOCAB, False),
        (BLOCK, VOCAB, True),
        (VOCAB - 1, VOCAB, False),
        (0, 7, True),
        (39, 40, False),
    ],
)
def test_a_nan_or_an_infinity_anywhere_makes_its_row_nan(where, vocab, masked, dtype):
    logits = (torch.full((5, vocab), -torch.inf) if masked else torch.randn(5, vocab)).to(dtype)
    payload = {torch.float32: 0x7FFFFFFF, torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF}[dtype]
    integers = logits.view(torch.int32 if dtype == torch.float32 else torch.int16)
    logits[1, where] = torch.nan
    integers[2, where] = payload  # a NaN whose bits are all set
    integers[3, where] = payload - 2 ** (31 if dtype == torch.float32 else 15)  # and one with a sign
    logits[4, where] = torch.inf
    logits[0] = 0.0
    computed, _ = both(logits, torch.full((5,), 5))
    for values in computed:
        nan = values.isnan().reshape(5, -1)
        assert not nan[0].any() and nan[1:].all()


@pytest.mark.parametrize("vocab", [VOCAB, 33])
def test_bits_depend_neither_on_threads_nor_on_other_rows_nor_on_strides(vocab):
    before = torch.get_num_threads()
    padded = torch.randn(5, 9, vocab + 3)
    logits, labels = padded[:, 1:, 1 : vocab + 1], torch.randint(vocab, (5, 8))
    whole, _ = both(logits, labels)
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            x = logits[3:4, 2].clone()
            out = clp.log_probs_from_logits(x, labels[3:4, 2], return_entropy=True, backend="cpp")
            assert torch.equal(out.log_probs[0], whole[0][3, 2]) and torch.equal(out.entropy[0], whole[1][3, 2])
    finally:
        torch.set_num_threads(before)


def tail(rows=4, vocab=2**18):
    """A dominant logit over a long tail: a sum that has taken the first in loses the others."""
    logits = torch.randn(rows, vocab) - 17
    logits[0] = -17.0
    logits[:, 0] = 0.0
    return logits


ROWS = {
    "ordinary": (lambda: torch.randn(8, 32003), 1.0),
    "wide": (lambda: torch.randn(8, 32003) * 10, 1.0),
    "a long tail": (tail, 1.0),
    "all equal": (lambda: torch.zeros(2, 2**18), 1.0),
    **{f"{by:+}": (lambda by=by: torch.randn(8, 32003) * 3 + by, 0.7) for by in (1e3, -1e3, 1e4, -1e4)},
    "short": (lambda: torch.randn(64, 5) * 3, 1.0),
    "narrow": (lambda: torch.randn(37, 100) * 10 + 1e3, 0.7),
    "masked and narrow": (lambda: torch.randn(37, 100).where(torch.arange(100) % 3 == 0, -torch.inf), 1.0),
    "a tiny temperature": (lambda: torch.tensor([[5.0, 4.0, 1.0]]), 1.2e-38),
    "a huge one": (lambda: torch.randn(8, 32003) * 1e4, 1e38),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", ROWS)
def test_within_16_eps_of_float64(rows, dtype):
    """And with the same bits whatever else is wanted."""
    make, temperature = ROWS[rows]
    logits = make().to(dtype)
    labels = torch.randint(logits.shape[-1], (len(logits), 4), dtype=torch.int32)
    labels[:, 0] = 0
    inputs = Inputs(logits, labels, temperature, -100)
    results, alone = CPP.forward(inputs, Wanted(True, True, True, True)), CPP.forward(inputs, Wanted())
    true, x = reference(logits, labels, temperature), logits.double() / temperature
    pairs = (
        (results.log_probs, true.log_probs),
        (results.entropy, true.entropy),
        (results.logsumexp, x.logsumexp(-1)),
        (results.sum_p_squared, x.softmax(-1).square().sum(-1)),
    )
    for mine, exact in pairs:
        close = (mine - exact).abs() <= 16 * torch.finfo(torch.float32).eps * exact.abs().clamp(min=1)
        assert (close | (mine == exact.float())).all()  # the logsumexp may lie beyond float32
    assert torch.equal(results.argmax, logits.float().argmax(-1))
    assert torch.equal(results.log_probs, alone.log_probs) and torch.equal(results.stats[:2], alone.stats)
    assert torch.equal(CPP.forward(inputs, Wanted(entropy=True)).entropy, results.entropy)


IGNORED_ROWS_ARE_NOT_READ = """
import ctypes, mmap, torch
from compiled_logprobs.backends.cpp import Cpp
from compiled_logprobs.operation.contract import Inputs, Upstream, Wanted
memory, page = mmap.mmap(-1, 4 * 4096), 4096
logits = torch.frombuffer(memory, dtype=torch.float32).view(4, 1024).normal_()
labels = torch.tensor([[7], [-100], [9], [-100]])
protect = lambda row, how: ctypes.CDLL(None).mprotect(ctypes.c_void_p(logits[row].data_ptr()), page, how)
assert protect(1, 0) == protect(3, 0) == 0  # to read them is a crash
inputs = Inputs(logits, labels, 1.0, -100)
results = Cpp().forward(inputs, Wanted(True, True, True, True))
gradient = Cpp().backward(inputs, results.stats, Upstream(torch.full((4, 1), torch.inf)), inplace=False)
assert [results.argmax[row].item() for row in (1, 3)] == [-1, -1]
for values in (results.log_probs, results.entropy, results.logsumexp, results.sum_p_squared, gradient):
    assert (values[1::2] == 0).all() and (values[::2] != 0).any()
protect(1, 2), protect(3, 2)  # to write them is not
Cpp().backward(inputs, results.stats, Upstream(torch.ones(4, 1)), inplace=True)
protect(1, 3), protect(3, 3)
assert (logits[1::2] == 0).all()
"""


@pytest.mark.slow
def test_ignored_rows_are_not_read():
    subprocess.run([sys.executable, "-c", IGNORED_ROWS_ARE_NOT_READ], timeout=300, check=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_many_labels_a_row_some_of_them_the_same(inplace):
    leaf, labels = torch.randn(4, VOCAB, requires_grad=True), torch.randint(VOCAB, (4, 300))
    labels[:, 150:200] = labels[:, :50]
    labels[1] = 7
    g, logits = torch.randn(4, 300), leaf * 1.0
    true = reference(leaf.detach(), labels, grad_log_probs=g).gradient
    out = clp.log_probs_from_logits(logits, labels, backend="cpp", inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(out, leaf, g)
    torch.testing.assert_close(gradient.double(), true, atol=1e-4, rtol=0)


def test_a_gradient_that_no_cache_keeps():
    """Its zeros go past the caches, from whatever address on."""
    logits, labels = torch.randn(3, 2**23 + 3).to(torch.bfloat16), torch.tensor([[5], [-100], [2**23 + 2]])
    inputs = Inputs(logits, labels, 1.0, -100)
    stats, before = CPP.forward(inputs, Wanted()).stats, logits.clone()
    for inplace in (False, True):
        gradient = CPP.backward(inputs, stats, Upstream(torch.ones(3, 1)), inplace=inplace)
        assert (gradient[1] == 0).all() and (gradient[[0, 2], [5, -1]] > 0.9).all() and (gradient[::2, 9:-9] <= 0).all()
        assert gradient.nbytes > 2**25
        assert inplace or torch.equal(logits, before)


ANOTHER_WIDTH = """
import pytest, torch, compiled_logprobs as clp
from compiled_logprobs.problem import Problem
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for options in ({}, {"entropy": True, "needs_grad": True, "labels_per_row": 3, "masked_logits": True}):
        report = clp.check_backend("cpp", Problem("cpu", 24, 1031, dtype, **options))
        assert report.passed, report
assert pytest.main(["-q", "-p", "no:cacheprovider", WITHIN_16_EPS]) == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_vectors(capability):
    """On processors that have them, torch uses the width that this variable names."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    program = ANOTHER_WIDTH.replace("WITHIN_16_EPS", repr(f"{__file__}::{test_within_16_eps_of_float64.__name__}"))
    subprocess.run([sys.executable, "-c", program], timeout=300, env=environment, check=True)


@pytest.mark.parametrize(
    ("module", "name", "value", "reason"),
    [
        (
            cpp_build,
            "cpp_compiler",
            lambda: None,
            "there is no C++ compiler on the PATH: install one, such as the package",
        ),
        (cpp_build, "TORCH_HEADERS", Path("nowhere"), "this torch came without its C++ headers: install one that has"),
        (cpp, "sys", SimpleNamespace(platform="darwin"), "is tested on Linux only, and this is darwin"),
    ],
    ids=["compiler", "headers", "Linux"],
)
def test_a_machine_without_what_it_needs(module, name, value, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpp, "_library", cpp._library.__wrapped__)  # without what this process has loaded
    why_not = cpp._why_not_here.__wrapped__()
    assert why_not.removeprefix("its library is not in the cache, and ").startswith(reason)
    assert cpp.Cpp().why_not(PROBLEM._replace(device_type="cuda")) == "is for CPUs"


WITHOUT_A_COMPILER = """
import torch, compiled_logprobs as clp
logits, labels = torch.randn(1024, 1031), torch.randint(1031, (1024,))
clp.log_probs_from_logits(logits, labels)
print(clp.explain(logits, labels).backend)
try:
    clp.log_probs_from_logits(logits, labels, backend="cpp")
except clp.BackendUnavailable as error:
    print(error)
"""


COLD = (
    "eager\nbackend 'cpp' cannot run .*: its library is not in the cache, and there is no C.. compiler on the PATH: "
    "install one, such as the package g.., or name it in CXX.\nBackends that can: eager. Name one of them"
)


@pytest.mark.slow
def test_without_a_compiler_a_warm_cache_serves_and_a_cold_one_is_a_reason(tmp_path):
    """As in the image of a container, where no compiler is."""
    cpp._library()  # in the cache of this user, too
    environment = {**os.environ, "PATH": str(tmp_path)}
    environment.pop("CXX", None)
    for cache, expected in (({}, "^cpp\n$"), ({"XDG_CACHE_HOME": str(tmp_path)}, COLD)):
        command = [sys.executable, "-c", WITHOUT_A_COMPILER]
        printed = subprocess.check_output(command, text=True, env=environment | cache, timeout=300)
        assert re.match(expected, printed), printed


def test_it_is_ready_where_its_library_is_kept_and_compiles_nothing_to_tell(monkeypatch, tmp_path):
    cpp._library()
    assert cpp.Cpp().is_warm(PROBLEM)
    monkeypatch.setattr(cpp_build, "_build", lambda *_: pytest.fail("it compiled"))
    monkeypatch.setattr(cpp, "_is_kept", cpp._is_kept.__wrapped__)
    monkeypatch.setattr(cpp, "_library", functools.cache(lambda: None))
    assert cpp.Cpp().is_warm(PROBLEM)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not cpp.Cpp().is_warm(PROBLEM)


def test_a_compiler_that_failed_is_not_asked_again(monkeypatch):
    asked = []

    def fails():
        asked.append(1)
        raise BackendUnavailable("cpp_kernels.cpp cannot be compiled and loaded here: no space left.")

    monkeypatch.setattr(cpp, "_library", fails)
    backend = cpp.Cpp()
    assert isinstance(backend, Backend)
    logits, labels = torch.randn(4, 7), torch.zeros(4, 1, dtype=torch.int64)
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="no space left"):
            backend.forward(Inputs(logits, labels, 1.0, -100), Wanted())
    assert len(asked) == 1 and "no space left" in backend.why_not(PROBLEM)


def test_the_powers_are_as_exact_as_they_say():
    """Through the whole function: the log-probability of the second of two logits is -log(1 + exp(x))."""
    x = torch.linspace(-87, 87, 20001)
    true = -torch.nn.functional.softplus(x.double())
    for columns in (2, 1031):  # in a short row exponents are relative to the maximum, in a long one not quite
        logits = torch.full((len(x), columns), -120.0)
        logits[:, 0], logits[:, 1] = x, 0.0
        out = clp.log_probs_from_logits(logits, torch.ones(len(x), dtype=torch.int64), backend="cpp")
        assert ((out - true) / true.clamp(max=-math.log(2))).abs().max() < 6e-7


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1.0, 100.0])
def test_the_gradient_at_a_label_that_is_certain_is_zero(temperature):
    logits = torch.tensor([[0.0, -2e5, -3e5]], requires_grad=True)
    out = clp.log_probs_from_logits(logits, torch.tensor([0]), temperature=temperature, backend="cpp")
    (gradient,) = torch.autograd.grad(out, logits, torch.tensor([0.3]))
    assert (gradient == 0).all()
