"""The `triton` backend on CPU tensors, with its kernels in Triton's interpreter.

A program, which tests spawn with TRITON_INTERPRET=1: prints what it checked, and fails with an AssertionError.

Shapes: N rows, V vocabulary, K labels a row.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from compiled_logprobs import log_probs_from_logits, warm
from compiled_logprobs.backends import register_backend, triton
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.choose.memory import MEMORY
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem
from tests.helpers.graph_bits import check_in_a_graph
from tests.helpers.host_syncs import without_host_syncs
from tests.helpers.triton_interpreter import like_a_gpu

ALL = Wanted(*[True] * len(Wanted._fields))
EPS = torch.finfo(torch.float32).eps
IGNORED = -100


class InterpretedTriton(triton.Triton):
    """The backend, allowed on the CPU."""

    def why_not(self, problem: Problem) -> str | None:
        return super().why_not(problem._replace(device_type="cuda"))


TRITON = InterpretedTriton()


def check_that_the_gate_lets_it_pass() -> None:
    register_backend("interpreted_triton", TRITON)
    plain = Problem("cpu", rows=5, vocab=311, dtype=torch.float32, needs_grad=True, aligned=False)
    for problem in (
        plain._replace(vocab=7, entropy=True),
        plain._replace(temperature="number", labels_per_row=3, masked_logits=True, logsumexp=True, argmax=True),
        plain._replace(entropy=True, layout="slice", dtype=torch.bfloat16, vocab=304, aligned=True),
        plain._replace(inplace_backward=True, temperature="per_token", dtype=torch.float16, sum_p_squared=True),
        plain._replace(inplace_backward=True, entropy=True, layout="rows", dtype=torch.bfloat16),
    ):
        report = check_backend("interpreted_triton", problem)
        assert report.passed, [check.detail for check in report.checks if not check.passed]
        assert report.row_invariant
        print(f"gate, {problem} ({problem.details()}): passed {len(report.checks)} checks", flush=True)


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """In float64, of rows that are neither ignored nor invalid."""
    x, t = inputs.logits.double(), inputs.temperature
    x = x / (t.double().unsqueeze(-1) if isinstance(t, Tensor) else t)
    exact = reference(inputs.logits, inputs.labels, t, ignore_index=inputs.ignore_index)
    return {
        "log_probs": exact.log_probs,
        "entropy": exact.entropy,
        "logsumexp": x.logsumexp(-1),
        "argmax": inputs.logits.float().argmax(-1),
        "sum_p_squared": x.softmax(-1).square().sum(-1),
    }


def assert_right(inputs: Inputs, results: Results, rows: Tensor) -> None:
    """`rows` of all results are within the design's bound of float64."""
    for name, exact in truth(inputs).items():
        got, exact = getattr(results, name)[rows], exact[rows]
        allowed = 16 * EPS * exact.abs().clamp(min=1.0)
        assert bool((((got - exact).abs() <= allowed) | (got == exact)).all()), (name, got, exact)


def inputs_of(dtype: torch.dtype, lie: str, vocab: int, labels_per_row: int, per_token: bool) -> Inputs:
    """Ten rows: an ignored one that holds NaN, an invalid one, one of -inf, one that holds NaN, one with its last label
    ignored, one half of -inf, and four others."""
    x = (torch.randn(12, vocab + 8) * 3).to(dtype)
    logits = {
        "flat": lambda: x[:10, :vocab].contiguous(),
        "rows": lambda: x[1:11, 1 : vocab + 1],
        "slice": lambda: x.view(2, 6, -1)[:, :5, :vocab],
        "three strides": lambda: torch.randn(2, 3, 10, vocab, dtype=torch.float32).to(dtype)[:, :1, ::2],
    }[lie]()
    flat = [logits[index] for index in product(*map(range, logits.shape[:-1]))]
    labels = torch.randint(vocab, (10, labels_per_row), dtype=torch.int32 if per_token else torch.int64)
    flat[0][3], labels[0] = torch.nan, IGNORED
    labels[1, -1] = vocab
    flat[2][:] = -torch.inf
    flat[3][vocab - 1] = torch.nan
    if labels_per_row > 1:
        labels[4, -1] = IGNORED
        labels[5, :] = labels[5, 0]
    flat[6][: vocab // 2] = -torch.inf
    labels[6, 0], labels[7, 0], labels[8, 0] = 0, vocab - 1, 8
    t = (torch.rand(10) + 0.5).reshape(logits.shape[:-1]) if per_token else 0.7
    return Inputs(logits, labels.reshape(*logits.shape[:-1], labels_per_row), t, IGNORED)


def check_all_results_and_gradients() -> None:
    for dtype, lie, vocab, labels_per_row, per_token, inplace in (
        (torch.float32, "flat", 311, 3, True, False),
        (torch.bfloat16, "rows", 304, 1, False, True),
        (torch.float16, "slice", 304, 1, True, False),
        (torch.float32, "three strides", 37, 2, False, False),
    ):
        inputs = inputs_of(dtype, lie, vocab, labels_per_row, per_token)
        shape = inputs.logits.shape[:-1]
        good = torch.arange(10).reshape(shape) >= 4
        results = TRITON.forward(inputs, ALL)
        assert_right(inputs, results, good)
        first = {name: getattr(results, name).reshape(10, -1)[:4, -1].tolist() for name in Results._fields[2:]}
        log_probs = results.log_probs.reshape(10, -1)
        assert log_probs[0].eq(0).all() and log_probs[1:4].isnan().all(), log_probs
        assert first.pop("argmax") == [-1] * 4
        assert all(values[0] == 0 and all(value != value for value in values[1:]) for values in first.values()), first

        g, h, z = torch.randn(inputs.labels.shape), torch.randn(shape), torch.randn(shape)
        g[inputs.labels == IGNORED] = torch.nan
        exact = gradient_of(inputs, g, h, z)
        gradient = TRITON.backward(inputs, results.stats, Upstream(g, h, z), inplace=inplace)
        assert gradient.dtype == dtype and (gradient is inputs.logits if inplace else gradient.is_contiguous())
        error = (gradient - exact)[good].abs()
        allowed = exact[good].abs() * torch.finfo(dtype).eps + 1e-5
        assert bool((error <= allowed).all()), (error - allowed).max()
        rows = gradient.reshape(10, -1)
        assert rows[0].eq(0).all() and rows[1:4].isnan().all()
        print(f"all results, {dtype} {lie}", flush=True)


def gradient_of(inputs: Inputs, g: Tensor, h: Tensor, z: Tensor) -> Tensor:
    """In float64; `z` is what comes through the log-sum-exp."""
    t = inputs.temperature
    exact = reference(
        inputs.logits, inputs.labels, t, ignore_index=IGNORED, grad_log_probs=g.nan_to_num(), grad_entropy=h
    ).gradient
    assert exact is not None
    t = t.double().unsqueeze(-1) if isinstance(t, Tensor) else t
    return exact + (inputs.logits.double() / t).softmax(-1) * z.double().unsqueeze(-1) / t


def check_hard_rows() -> None:
    """One dominant logit over a long tail, shifted rows, and a temperature near 0."""
    vocab = 65536
    for dtype, shift, t in (
        (torch.float32, 0.0, 1.0),
        (torch.bfloat16, 0.0, 1.0),
        (torch.float32, 1e4, 0.7),
        (torch.float32, -1e4, 0.7),
    ):
        logits = torch.rand(1, vocab) * 2 - 18
        logits[0, 0] = 0.0
        inputs = Inputs((logits + shift).to(dtype), torch.tensor([[0, 77]]), t, IGNORED)
        assert_right(inputs, TRITON.forward(inputs, ALL), torch.tensor([True]))
    cold = Inputs(torch.tensor([[5.0, 4.0, 1.0]]), torch.tensor([[0, 1, 1]]), 1.2e-38, IGNORED)
    results = TRITON.forward(cold, ALL)
    expected = [0.0, *[float(torch.tensor(-1 / 1.2e-38))] * 2]
    assert results.log_probs[0].tolist() == expected, results.log_probs
    assert results.entropy is not None and results.entropy.item() == 0.0
    g = torch.tensor([[1e-38, 0.0, 0.0]])
    assert not TRITON.backward(cold, results.stats, Upstream(g), inplace=False).any()
    masked = torch.full((2, 311), -1e9)
    masked[0, 7] = 3.0
    inputs = Inputs(masked, torch.tensor([[7], [310]]), 1.0, IGNORED)
    assert_right(inputs, TRITON.forward(inputs, ALL), torch.tensor([True, True]))
    print("hard rows", flush=True)


def check_that_bits_do_not_depend_on_what_else_is_asked() -> None:
    inputs = inputs_of(torch.bfloat16, "flat", 304, 1, False)
    everything = TRITON.forward(inputs, ALL)
    for wanted in (Wanted(), Wanted(entropy=True), Wanted(argmax=True)):
        results = TRITON.forward(inputs, wanted)
        for name, result in zip(Results._fields, results, strict=True):
            same = getattr(everything, name)
            assert result is None or same_bits(result, same[: len(result)] if name == "stats" else same), name
    for count in (1, 2, 5):  # and where the rows lie otherwise
        apart = torch.zeros(count, 321, dtype=torch.bfloat16)[:, 5:309].copy_(inputs.logits[:count])
        alone = TRITON.forward(Inputs(apart, inputs.labels[:count], inputs.temperature, IGNORED), Wanted())
        assert same_bits(alone.log_probs, everything.log_probs[:count])
    rows, upstream = len(inputs.logits), Upstream(torch.ones(inputs.labels.shape))
    number = inputs._replace(temperature=0.7)  # on a device a graph makes it one a row
    a_row = inputs._replace(temperature=torch.full((rows,), 0.7))
    results = TRITON.forward(number, Wanted())
    assert same_bits(TRITON.forward(a_row, Wanted()).log_probs, results.log_probs)
    gradients = [TRITON.backward(given, results.stats, upstream, inplace=False) for given in (number, a_row)]
    assert same_bits(*gradients)
    print("the same bits", flush=True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=9.0), b.nan_to_num(nan=9.0))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """What kernels move within it, in bytes."""
    moved: Counter[str] = Counter()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count_load(self, pointers, mask, *others):
        value = load(self, pointers, mask, *others)
        moved["loaded"] += int(np.sum(mask.data)) * value.data.itemsize
        return value

    def count_store(self, pointers, value, mask, *others):
        moved["stored"] += int(np.sum(mask.data)) * value.data.itemsize
        return store(self, pointers, value, mask, *others)

    with (
        patch.object(builder, "create_masked_load", count_load),
        patch.object(builder, "create_masked_store", count_store),
    ):
        yield moved


def check_that_ignored_rows_are_not_read() -> None:
    logits, labels = torch.randn(4, 2048).to(torch.bfloat16), torch.randint(2048, (4, 1))
    half = labels.clone()
    half[::2] = IGNORED
    moved: dict[str, Counter[str]] = {}
    for name, y in (("forward", labels), ("forward, half", half)):
        with counted() as moved[name]:
            results = TRITON.forward(Inputs(logits, y, 1.0, IGNORED), Wanted())
    for name, y in (("backward", labels), ("backward, half", half)):
        with counted() as moved[name]:
            TRITON.backward(Inputs(logits, y, 1.0, IGNORED), results.stats, Upstream(torch.ones(4, 1)), inplace=False)
    total = {name: sum(count.values()) for name, count in moved.items()}
    size = logits.nbytes
    assert size <= total["forward"] <= 1.1 * size and 2 * size <= total["backward"] <= 2.1 * size, moved
    assert total["forward, half"] <= 0.52 * total["forward"], moved
    assert total["backward, half"] <= 0.76 * total["backward"], moved
    print(f"bytes moved, half of the rows ignored: {total}", flush=True)


def check_what_is_warm() -> None:
    backend, small = InterpretedTriton(), Problem("cpu", 2, 64, torch.float16, labels_per_row=2, needs_grad=True)
    inputs = Inputs(torch.randn(2, 64).half(), torch.zeros(2, 2, dtype=torch.int64), 1.0, IGNORED)
    results = backend.forward(inputs, Wanted())
    assert backend.is_warm(small._replace(needs_grad=False, rows=9)) and not backend.is_warm(small)
    backend.backward(inputs, results.stats, Upstream(torch.ones(2, 2)), inplace=False)
    assert backend.is_warm(small)
    for changes in ({"inplace_backward": True}, {"entropy": True}, {"aligned": False}, {"temperature": "per_token"}):
        assert not backend.is_warm(small._replace(**changes)), changes
    odd, lie_alike, alike = (
        Problem("cpu", 2, 37, torch.float16, needs_grad=True, aligned=False),
        triton._lie_alike,
        set(),
    )

    def noted(logits: Tensor, gradient: Tensor) -> bool:
        alike.add(lie_alike(logits, gradient))
        return lie_alike(logits, gradient)

    with patch.object(triton, "_lie_alike", noted):
        warm(odd, backend="interpreted_triton")
    assert alike == {False, True}  # each of which is compiled by itself, and neither told by a problem
    assert MEMORY.is_warm("interpreted_triton", TRITON, odd) and not TRITON.is_warm(odd)
    print("what is warm", flush=True)


def check_that_no_value_is_read() -> None:
    """Which would end a CUDA graph's capture. Some methods of tensors are the interpreter's own."""
    logits, labels = torch.randn(3, 311, requires_grad=True), torch.tensor([0, IGNORED, 310])

    def step() -> Tensor:
        out = log_probs_from_logits(logits, labels, temperature=0.7, backend="interpreted_triton")
        return torch.autograd.grad(out.sum(), logits)[0]

    expected = step()
    with without_host_syncs(methods=()):
        gradient = step()
    assert same_bits(gradient, expected)
    print("no value is read", flush=True)


def check_rows_beyond_2_31_elements() -> None:
    memory = torch.empty(2**31 + 2**12, dtype=torch.bfloat16)  # of which only what is touched is there
    for lie in (memory.as_strided((2, 311), (2**31 + 8, 1)), memory.as_strided((2, 2, 311), (2**31 + 8, 320, 1))):
        lie[:] = torch.randn(lie.shape)
        inputs = Inputs(lie, torch.randint(311, (*lie.shape[:-1], 1)), 1.0, IGNORED)
        near = inputs._replace(logits=lie.clone())
        upstream = Upstream(torch.ones(inputs.labels.shape))
        results = TRITON.forward(inputs, Wanted())
        assert same_bits(results.log_probs, TRITON.forward(near, Wanted()).log_probs)
        gradient = TRITON.backward(near, results.stats, upstream, inplace=False)
        assert same_bits(TRITON.backward(inputs, results.stats, upstream, inplace=True), gradient)
    print("rows beyond 2^31 elements", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    warnings.simplefilter("ignore", RuntimeWarning)  # of numpy: NaN and infinity are among what is tested
    with like_a_gpu():
        check_hard_rows()
        # Small enough for two chunks of two steps, and two blocks, which is all that the kernels distinguish.
        with patch.multiple(triton, CHUNK=160, VECTORS=16, BLOCK=256):
            check_all_results_and_gradients()
            check_that_bits_do_not_depend_on_what_else_is_asked()
            check_that_ignored_rows_are_not_read()
            check_rows_beyond_2_31_elements()
            check_that_the_gate_lets_it_pass()
            check_what_is_warm()
            check_in_a_graph("interpreted_triton", 311, return_entropy=True)
            check_that_no_value_is_read()
