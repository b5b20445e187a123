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
from compiled_logprobs.backends import compiled_code, get_backend
from compiled_logprobs.backends.compiled import _why_no_cpp_compiler, dummies
from compiled_logprobs.operation import formula
from compiled_logprobs.operation.autograd import compute
from compiled_logprobs.operation.contract import Inputs, Upstream, Wanted
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem, layout_of
from tests.helpers.host_syncs import without_host_syncs

ROWS = [0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 64, 100, 128, 255, 512, 1000, 1024, 2048, 4095, 4096]
COMPILED = get_backend("compiled")
TAKES_HINTS = compiled_code.takes_hints()
ALL = Wanted(entropy=True, logsumexp=True, argmax=True, sum_p_squared=True)


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


def as_on_a_gpu(monkeypatch, *, compiles: bool) -> None:
    """Have CPU tensors take the forms for a GPU."""
    key_of = compiled_module.key_of

    def as_there(inputs):
        return key_of(inputs)._replace(device_type="cuda", aligned=False)

    monkeypatch.setattr(compiled_module, "key_of", as_there)
    if not compiles:
        monkeypatch.setattr(compiled_module, "compile_function", lambda function, name, device_type: function)
        for name in ("_compiled_forward", "_compiled_backward"):
            monkeypatch.setattr(compiled_module, name, getattr(compiled_module, name).__wrapped__)


@pytest.mark.slow
@pytest.mark.parametrize(("takes_hints", "vocab"), [(True, 2999), (False, 2987)])
def test_the_form_for_gpus_takes_one_compilation_whatever_number_of_rows_comes_first(monkeypatch, takes_hints, vocab):
    """Compiled for a CPU here, with the sizes that Inductor is told of on a GPU: they must not become guards, nor reach
    backward."""
    as_on_a_gpu(monkeypatch, compiles=True)
    for module in (compiled_module, compiled_code):
        monkeypatch.setattr(module, "takes_hints", lambda: takes_hints and TAKES_HINTS)
    count = 0
    for n in (3000, 1, 2, 7, 342, 64):
        leaf, labels = torch.randn(n, vocab, requires_grad=True), torch.randint(vocab, (n, 1))
        temperature, results = torch.rand(n) + 0.5, []
        call = partial(compute, COMPILED, leaf, labels, temperature, wanted=Wanted(entropy=True))
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
    hints, rows = [2, 7][3 - logits.ndim :], logits.shape[:-1]
    arguments = {"logits": logits, "labels": torch.zeros(*rows, 1), "stats": torch.zeros(3, *rows)}
    made = dummies({**arguments, "temperature": torch.tensor(0.7)}, hints)
    assert layout_of(made["logits"]) == layout_of(logits) and made["logits"].shape == (*hints, 32)
    assert made["labels"].shape == (*hints, 1) and made["stats"].shape == (3, *hints)
    assert made["temperature"].shape == ()


@pytest.mark.parametrize(
    ("disable", "remedy"),
    [
        (lambda: torch._dynamo.config.patch(disable=True), "unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE"),
        (lambda: torch.compiler.set_stance("force_eager"), "call torch.compiler.set_stance('default')"),
    ],
    ids=["variable", "stance"],
)
def test_where_torch_compile_is_disabled_the_backend_says_so(disable, remedy):
    problem = Problem("cpu", 8, 100, torch.float32)
    with disable():
        assert COMPILED.why_not(problem) == f"torch.compile is disabled here: {remedy}"
    assert COMPILED.why_not(problem) is None


@pytest.mark.slow
def test_what_was_compiled_serves_in_inference_mode_too():
    """Whatever was made there: a capture in it finds compiled what was warmed outside."""
    logits, labels = torch.randn(8, 100), torch.zeros(8, 1, dtype=torch.int64)
    backend = compiled_module.Compiled()
    expected = backend.forward(Inputs(logits, labels, 1.0, -100), Wanted())
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        made_there = Inputs(logits + 0, labels + 0, 1.0, -100)
        for inputs in (Inputs(logits, labels, 1.0, -100), made_there):
            assert torch.equal(backend.forward(inputs, Wanted()).log_probs, expected.log_probs)
    assert made_there.logits.is_inference()
    backend.forward(made_there, Wanted())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count > 0


def logits_of_every_kind(vocab: int, layout: str) -> torch.Tensor:
    shape = {"flat": (14,), "rows": (14,), "three dimensions": (2, 4, 3)}.get(layout, (3, 5))
    logits = 5 * torch.randn(*shape, vocab) + 100
    rows = logits.view(-1, vocab)
    rows[0] = -torch.inf
    rows[1, : min(vocab - 1, 2 * formula.BLOCK)] = -torch.inf  # whole blocks of it
    rows[2, vocab - 1] = torch.nan
    rows[3, 0] = torch.inf
    rows[4] = 1.0
    rows[5, 1:] = -torch.inf
    if layout == "rows":
        return torch.cat([logits, logits], -1)[:, :vocab]
    if layout == "time first":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if layout in ("slice", "three dimensions"):
        return torch.cat([logits, logits[:, :1]], 1)[:, :-1]
    if layout == "off any row":
        return torch.cat([logits.flatten(1), torch.zeros(len(logits), 1)], 1)[:, :-1].unflatten(1, (*shape[1:], vocab))
    return logits


@pytest.mark.parametrize("vocab", [5, formula.BLOCK, 2500])
@pytest.mark.parametrize("layout", ["flat", "rows", "slice", "time first", "off any row", "three dimensions"])
@pytest.mark.parametrize(
    ("labels_per_row", "inplace", "in_parts"), [(1, False, True), (1, True, False), (2, False, False)]
)
def test_the_forms_for_gpus_keep_the_contract(monkeypatch, vocab, layout, labels_per_row, inplace, in_parts):
    """Not compiled: `tests.gpu_code` does that. In parts as beyond 2^31 logits."""
    as_on_a_gpu(monkeypatch, compiles=False)
    if in_parts:
        monkeypatch.setattr(compiled_module, "INT32_MAX", 8 * max(vocab, formula.BLOCK * 3))
    logits = logits_of_every_kind(vocab, layout)
    rows, kept = logits.shape[:-1], logits.clone()
    labels = torch.randint(vocab, (*rows, labels_per_row))
    labels.view(-1, labels_per_row)[[0, 6]] = -100
    labels.view(-1, labels_per_row)[7, 0] = vocab
    labels.view(-1, labels_per_row)[8, -1] = -100
    temperature = torch.rand(rows) + 0.5
    temperature.view(-1)[9] = 0.0
    grads = torch.randn(labels.shape), torch.randn(rows), torch.randn(rows)
    inputs = Inputs(logits, labels, temperature, -100)
    got = COMPILED.forward(inputs, ALL)
    alone = COMPILED.forward(inputs, Wanted())
    assert torch.equal(got.log_probs.nan_to_num(7.0), alone.log_probs.nan_to_num(7.0))
    gradient = COMPILED.backward(inputs, got.stats, Upstream(*grads), inplace=inplace)
    assert gradient.is_contiguous() or inplace
    assert (gradient.data_ptr() == logits.data_ptr()) == inplace and gradient.shape == logits.shape
    assert inplace or torch.equal(logits.nan_to_num(7.0), kept.nan_to_num(7.0))
    names = dict(zip(("grad_log_probs", "grad_entropy", "grad_logsumexp"), grads, strict=True))
    true = reference(kept, labels, temperature, **names)
    for name in ("log_probs", "entropy", "logsumexp", "argmax", "sum_p_squared"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(true, name).double(), rtol=3e-6, atol=3e-5, equal_nan=True
        )
    torch.testing.assert_close(gradient.double(), true.gradient, rtol=3e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["flat", "slice"])
def test_beyond_2_31_logits_no_value_is_read(monkeypatch, layout, inplace):
    """Which would end a capture; as on a GPU, in parts, and again in inference mode."""
    as_on_a_gpu(monkeypatch, compiles=False)
    monkeypatch.setattr(compiled_module, "INT32_MAX", 8 * formula.BLOCK * 3)
    logits = logits_of_every_kind(2500, layout)
    inputs = Inputs(logits, torch.randint(2500, (*logits.shape[:-1], 1)), 0.7, -100)
    expected = COMPILED.forward(inputs, ALL)
    with without_host_syncs():
        with torch.inference_mode():
            alone = COMPILED.forward(inputs, Wanted())
        results = COMPILED.forward(inputs, ALL)
        gradient = COMPILED.backward(inputs, results.stats, Upstream(torch.ones(inputs.labels.shape)), inplace=inplace)
    assert torch.equal(alone.log_probs.nan_to_num(7.0), expected.log_probs.nan_to_num(7.0))
    assert gradient.shape == logits.shape and not gradient.isnan().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_single_row_is_computed_as_two(monkeypatch, inplace):
    as_on_a_gpu(monkeypatch, compiles=False)
    inputs = Inputs(torch.randn(1, 7), torch.tensor([[3]]), 0.7, -100)
    log_p = (inputs.logits / 0.7).log_softmax(-1)
    results = COMPILED.forward(inputs, ALL)
    torch.testing.assert_close(results.log_probs, log_p[:, 3:4])
    assert results.stats.shape == (3, 1) and results.argmax.shape == (1,)
    gradient = COMPILED.backward(inputs, results.stats, Upstream(torch.ones(1, 1)), inplace=inplace)
    torch.testing.assert_close(gradient, ((torch.arange(7) == 3).float() - log_p.exp()) / 0.7)
    assert (gradient.data_ptr() == inputs.logits.data_ptr()) == inplace and gradient.shape == (1, 7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_whatever_is_wanted_and_beside_it(dtype):
    logits, labels = 3 * torch.randn(96, 2500).to(dtype), torch.randint(2500, (96, 1))
    results = [
        COMPILED.forward(Inputs(logits[:n], labels[:n], 0.7, -100), wanted).log_probs
        for n in (96, 1, 2, 5)
        for wanted in (Wanted(), Wanted(entropy=True), ALL)
    ]
    assert all(torch.equal(one, results[0][: len(one)]) for one in results)


@pytest.mark.slow
def test_another_ignore_index_compiles_nothing():
    logits, labels = torch.randn(6, 47, requires_grad=True), torch.randint(47, (6, 1))

    def run(ignore_index):
        (log_probs,) = compute(COMPILED, logits, labels, ignore_index=ignore_index)
        log_probs.sum().backward()
        return log_probs

    assert compilations(lambda: run(-100)) == 2
    for ignore_index in (0, 1, int(labels[3]), 2**40):
        assert compilations(lambda: run(ignore_index)) == 0  # noqa: B023 - called at once
        assert torch.equal(run(ignore_index) == 0.0, labels == ignore_index)


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
