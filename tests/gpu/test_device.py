"""What only a device can show, for every backend: `python -m pytest tests/gpu`, a step of `make gpu`.

Where there is no GPU the same tests run on the CPU, with small sizes, and stand-ins for streams and graphs.

Shapes: N rows, B x T rows of a slice, V vocabulary, K labels a row.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compiled_logprobs import BackendUnavailable, InputError, backends, explain, log_probs_from_logits, warm
from compiled_logprobs.api import call
from compiled_logprobs.backends.eager import CHUNK_ELEMENTS_ELSEWHERE
from compiled_logprobs.choose import auto
from compiled_logprobs.machine.clock import MIB, extra_peak_bytes, free_memory
from compiled_logprobs.operation.reference import reference
from tests.helpers.fake_streams import FakeGraph, stand_in_for_streams_and_graphs

pytestmark = pytest.mark.gpu

EPS = torch.finfo(torch.float32).eps
IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if IS_GPU else "cpu")
VOCAB = 151936 if IS_GPU else 257
ODD = 50257
BEYOND = 2**31 if IS_GPU else 2**12
"""Logits that one index of 32 bits cannot count."""
LARGE_ROWS = 8192 if IS_GPU else 16
LARGEST_LOGIT = 16.0

WANTED = {
    "forward": {},
    "entropy": {"return_entropy": True},
    "backward": {},
    "inplace": {"inplace_backward": True},
}
PROMISED = {"forward": 0.01, "entropy": 0.01, "backward": 1.02, "inplace": 0.02}
"""Extra memory of a mode, in multiples of the logits: its results, and the gradient unless that lies over them."""
BESIDE = {"eager": 6 * 4 * CHUNK_ELEMENTS_ELSEWHERE}
"""Bytes that a backend takes however many rows there are: `eager` some copies of a chunk in float32."""
BESIDE_OTHERS = 32 * MIB
SIZES = count(VOCAB + 16 if IS_GPU else VOCAB, 16)
"""Vocabularies that nothing was compiled for yet, but the first on a CPU, where that would only take time."""


each_backend = pytest.mark.parametrize("backend", backends())
in_a_graph = partial(torch.compile, fullgraph=True, **({} if IS_GPU else {"backend": "aot_eager"}))
"""Without Inductor on a CPU, where it would only take time."""


class Results(NamedTuple):
    """What a call returned; None for what was not asked for."""

    log_probs: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    argmax: Tensor | None = None
    sum_p_squared: Tensor | None = None


@pytest.fixture(autouse=True)
def device(monkeypatch):
    torch.manual_seed(0)
    if not IS_GPU:
        stand_in_for_streams_and_graphs(monkeypatch)
    yield
    if IS_GPU:
        torch.cuda.empty_cache()


def run(backend: str, logits: Tensor, labels: Tensor, **options) -> Results:
    """What the public function returns; the test is skipped where the backend cannot."""
    try:
        results = log_probs_from_logits(logits, labels, backend=backend, **options)
    except BackendUnavailable as error:
        skip_without(backend, error)
    if not isinstance(results, tuple):
        return Results(results)
    return Results(*(getattr(results, name) for name in Results._fields))


def skip_without(backend: str, error: BackendUnavailable) -> None:
    pytest.skip(f"{backend}: {str(error).splitlines()[0].rpartition(': ')[2]}")


def skip_without_memory(size: float) -> None:
    if free_memory(DEVICE) < size:
        pytest.skip(f"takes {size / 2**30:.0f} GiB of free memory")


def logits_of(*rows: int, vocab: int = VOCAB) -> Tensor:
    logits = 3 * torch.randn(*rows, vocab, device=DEVICE)
    return logits.clamp_(-LARGEST_LOGIT, LARGEST_LOGIT).to(torch.bfloat16)


def labels_of(*rows: int, vocab: int = VOCAB) -> Tensor:
    """A fifth of them ignored, and one of the others at either end of the row."""
    labels = torch.randint(vocab, rows, device=DEVICE).masked_fill_(torch.rand(rows, device=DEVICE) < 0.2, -100)
    labels.view(-1)[:3] = torch.tensor([0, -100, vocab - 1])
    return labels


def lay(values_BTV: Tensor, layout: str) -> Tensor:
    """The same values as logits that lie in memory as `layout` says."""
    b, t, v = values_BTV.shape
    if layout == "flat":
        return values_BTV.reshape(-1, v)
    if layout == "rows":
        return values_BTV.new_empty(b * t, v + 24)[:, :v].copy_(values_BTV.reshape(-1, v))
    return values_BTV.new_empty(b, t + 1, v)[:, :-1].copy_(values_BTV)


def hold_against_float64(logits: Tensor, labels: Tensor, got: Results, **options) -> None:
    """Results, signs and gradient of `got`, computed from `logits` [..., V] and `labels` [...] or [..., K]."""
    upstream = {result: torch.randn(result.shape, device=DEVICE) for result in got[:3] if result is not None}
    (gradient,) = torch.autograd.grad([*upstream], logits, [*upstream.values()])
    assert gradient.dtype == logits.dtype
    hold(logits.detach(), labels, got, gradient, *(upstream.get(result) for result in got[:3]), **options)


def hold(
    logits: Tensor,
    labels: Tensor,
    got: Results,
    gradient: Tensor,
    g: Tensor,
    h: Tensor | None = None,
    z: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> None:
    """The same, with the gradient for g, h and z at the log-probabilities, the entropy and the logsumexp."""
    many = labels.ndim == logits.ndim
    columns, g_K, got_K = (x if many else x.unsqueeze(-1) for x in (labels, g, got.log_probs.detach()))
    true = reference(logits, columns, temperature, grad_log_probs=g_K, grad_entropy=h, grad_logsumexp=z)
    coldest = float(torch.as_tensor(temperature).min())
    bound = 2 * EPS * max(16.0, LARGEST_LOGIT / coldest)
    for name, result in got._replace(log_probs=got_K, argmax=None)._asdict().items():
        if result is not None:
            assert result.dtype == torch.float32
            what = getattr(true, name)
            torch.testing.assert_close(result.detach().double(), what, atol=bound, rtol=16 * EPS, equal_nan=True)
    assert got.argmax is None or torch.equal(got.argmax, true.argmax)
    assert not (got_K > 0).any() and (got_K[columns == -100] == 0).all()
    assert not gradient[(columns == -100).all(-1)].any()
    rounding = torch.finfo(gradient.dtype).eps * true.gradient.nan_to_num().abs()
    upstream = g_K.abs().sum(-1, keepdim=True)
    upstream = upstream + sum(weight * x.abs().unsqueeze(-1) for x, weight in ((h, 20), (z, 1)) if x is not None)
    off = (gradient.double() - true.gradient).abs() - rounding - 4 * bound * upstream / coldest
    assert torch.equal(gradient.isnan(), true.gradient.isnan()) and off.nan_to_num().max() <= 1e-7


@each_backend
@pytest.mark.parametrize(
    ("layout", "vocab"), [("flat", VOCAB), ("rows", VOCAB), ("slice", VOCAB), *[("flat", ODD)] * IS_GPU]
)
def test_the_contract_in_every_layout(backend, layout, vocab):
    logits = lay(logits_of(3, 5, vocab=vocab), layout).requires_grad_()
    before = logits.detach().clone()
    labels = labels_of(*logits.shape[:-1], vocab=vocab)
    got = run(backend, logits, labels, temperature=0.7)
    hold_against_float64(logits, labels, got, temperature=0.7)
    assert torch.equal(logits.detach(), before)


ENTROPY = {"return_entropy": True}
ALL = ENTROPY | {"return_logsumexp": True, "return_argmax": True, "return_sum_p_squared": True}


@each_backend
@pytest.mark.parametrize(("options", "labels_per_row"), [*[(ENTROPY, ())] * IS_GPU, (ALL, (3,))])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_the_contract_of_other_results_and_a_temperature_for_each_row(backend, rows, options, labels_per_row):
    logits, temperature = logits_of(rows).requires_grad_(), torch.rand(rows, device=DEVICE) + 0.5
    labels = torch.randint(VOCAB, (rows, *labels_per_row), device=DEVICE)
    got = run(backend, logits, labels, temperature=temperature, **options)
    assert got.log_probs.shape == labels.shape and {x.shape for x in got[1:] if x is not None} == {(rows,)}
    if rows:
        hold_against_float64(logits, labels, got, temperature=temperature)
    else:
        assert torch.autograd.grad(got.log_probs.sum(), logits)[0].shape == logits.shape


@each_backend
def test_a_row_with_an_invalid_label_is_nan_and_the_others_are_not(backend):
    """Without a look at any value, which on a device would have to wait for it; on the CPU it is an error instead."""
    logits, labels = logits_of(6).requires_grad_(), labels_of(6)
    labels[4] = VOCAB
    try:
        got = run(backend, logits, labels)
    except InputError:
        assert not IS_GPU
        labels[4] = 0
        got = run(backend, logits, labels)
    hold_against_float64(logits, labels, got)


@each_backend
def test_in_place_the_gradient_lies_over_the_logits_and_is_the_same(backend):
    leaf, labels, g = logits_of(6).requires_grad_(), labels_of(6), torch.randn(6, device=DEVICE)
    (apart,) = torch.autograd.grad(run(backend, leaf, labels).log_probs, leaf, g)
    logits = leaf * 1
    (over,) = torch.autograd.grad(run(backend, logits, labels, inplace_backward=True).log_probs, logits, g)
    assert over.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(over, apart)


@pytest.mark.parametrize("backend", [*backends(), "auto"])
def test_a_graph_captured_after_a_warm_call_computes_anew(backend):
    """Forward and backward, replayed on other values in the same memory."""
    logits, labels, g = logits_of(8).requires_grad_(), labels_of(8), torch.randn(8, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        log_probs = log_probs_from_logits(logits, labels, temperature=0.7, backend=backend)
        return log_probs.detach(), *torch.autograd.grad(log_probs, logits, g)

    run(backend, logits, labels, temperature=0.7)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    hold_replays(step, logits, labels)


def hold_replays(step: Callable[[], tuple[Tensor, ...]], logits: Tensor, labels: Tensor) -> None:
    """Capture `step`, and replay it on other logits and labels in the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    if isinstance(graph, FakeGraph):
        graph.record(step, results)
    for _ in range(2):
        with torch.no_grad():
            logits.normal_()
            labels.copy_(labels_of(len(labels)))
        graph.replay()
        torch.cuda.synchronize()
        for replayed, expected in zip(results, step(), strict=True):
            assert torch.equal(replayed, expected)


@pytest.mark.parametrize("backend", [*backends(), "auto"])
@pytest.mark.parametrize(
    ("rows", "grad"), [(8, True), (8, False), pytest.param(BEYOND // VOCAB + 3, True, id="32_bits")]
)
def test_a_capture_needs_no_call_before_but_warm(backend, rows, grad):
    """Forward and backward, or forward in inference mode; and of more logits than 32 bits count."""
    skip_without_memory(6 * rows * VOCAB * 2)
    logits = torch.empty(rows, VOCAB, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_(grad)
    labels, g = labels_of(rows), torch.randn(rows, device=DEVICE)
    try:
        warm(explain(logits, labels, temperature=0.7).problem, device=DEVICE, backend=backend)
    except BackendUnavailable as error:
        skip_without(backend, error)

    def step() -> tuple[Tensor, ...]:
        with torch.inference_mode(not grad):
            log_probs = log_probs_from_logits(logits, labels, temperature=0.7, backend=backend)
        return log_probs.detach(), *(torch.autograd.grad(log_probs, logits, g) if grad else ())

    hold_replays(step, logits, labels)


@pytest.mark.parametrize("backend", ["compiled", "auto"])
def test_a_capture_of_what_is_not_warm_is_refused_and_names_warm(backend, monkeypatch):
    vocab = VOCAB + 8  # for which nothing was compiled
    logits, labels = logits_of(3, vocab=vocab), labels_of(3, vocab=vocab)
    if not IS_GPU:
        for module in (call, auto):
            monkeypatch.setattr(module, "is_capturing", lambda problem: True)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(BackendUnavailable, match="Call warm"), torch.cuda.graph(graph):
        log_probs_from_logits(logits, labels, backend=backend)
    monkeypatch.undo()
    run("eager", logits, labels)  # after which the device is as it was


@pytest.mark.parametrize(
    ("backend", "inplace"),
    [*((name, False) for name in backends() if name != "eager"), ("auto", True)],  # eager is a formula in graphs
)
def test_a_graph_made_of_cuda_graphs_has_the_same_bits_as_outside(backend, inplace):
    """Called to compile it, to record it, and to replay it."""
    labels, g = labels_of(8), torch.randn(8, device=DEVICE)

    def step(logits: Tensor, labels: Tensor) -> Tensor:
        return log_probs_from_logits(logits * 2, labels, backend=backend, inplace_backward=inplace)

    run(backend, logits_of(8).requires_grad_() * 2, labels, inplace_backward=inplace)
    inside = in_a_graph(step, **({"mode": "reduce-overhead"} if IS_GPU else {}))
    for _ in range(4):
        logits = logits_of(8).requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        log_probs = inside(logits, labels)
        got = log_probs.detach().clone(), torch.autograd.grad(log_probs, logits, g)[0].clone()
        expected = step(logits, labels)
        assert torch.equal(got[0], expected) and torch.equal(got[1], torch.autograd.grad(expected, logits, g)[0])


@each_backend
def test_a_side_stream_gives_the_same_bits(backend):
    logits, labels, g = logits_of(8).requires_grad_(), labels_of(8), torch.randn(8, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        log_probs = run(backend, logits, labels, temperature=0.7).log_probs
        return log_probs, *torch.autograd.grad(log_probs, logits, g)

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results = step()
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, results, expected))


@each_backend
def test_a_second_device_computes_the_same(backend):
    """Which is not the current one."""
    if torch.cuda.device_count() == 1:
        pytest.skip("there is one device")
    second = torch.device("cuda:1" if IS_GPU else "cpu")
    logits, labels, g = logits_of(8), labels_of(8), torch.randn(8, device=DEVICE)
    results = []
    for device in (DEVICE, second):
        leaf = logits.to(device).requires_grad_()
        log_probs = run(backend, leaf, labels.to(device), temperature=0.7).log_probs
        results.append((log_probs, *torch.autograd.grad(log_probs, leaf, g.to(device))))
        assert log_probs.device == device
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there.to(DEVICE))


@each_backend
def test_autocast_changes_nothing(backend):
    logits, labels = logits_of(8).requires_grad_(), labels_of(8)
    expected = run(backend, logits, labels, temperature=0.7).log_probs
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = run(backend, logits, labels, temperature=0.7).log_probs
    assert torch.equal(got, expected)
    gradients = [torch.autograd.grad(log_probs.sum(), logits)[0] for log_probs in (got, expected)]
    assert torch.equal(*gradients)


@each_backend
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_checkpoint_recomputes_the_same(backend, is_reentrant):
    hidden = torch.randn(8, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    head, labels = torch.randn(16, VOCAB, device=DEVICE, dtype=torch.bfloat16), labels_of(8)

    def loss(hidden: Tensor) -> Tensor:
        return run(backend, hidden @ head, labels, temperature=0.7).log_probs.sum()

    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    checkpoint(loss, hidden, use_reentrant=is_reentrant).backward()
    torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.parametrize("backend", ["compiled", "auto"])
def test_a_checkpoint_in_a_graph_recomputes_the_same(backend):
    hidden = torch.randn(8, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    head, labels = torch.randn(16, VOCAB, device=DEVICE, dtype=torch.bfloat16), labels_of(8)

    def loss(hidden: Tensor) -> Tensor:
        return log_probs_from_logits(hidden @ head, labels, backend=backend).sum()

    run(backend, (hidden @ head).detach().requires_grad_(), labels)
    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    in_a_graph(lambda hidden: checkpoint(loss, hidden, use_reentrant=False))(hidden).backward()
    torch.testing.assert_close(hidden.grad, expected)


@each_backend
@pytest.mark.parametrize("mode", PROMISED if IS_GPU else ["inplace"])
def test_the_peak_of_memory_is_what_was_promised_cold_and_warm(backend, mode, record_property):
    vocab = next(SIZES)
    rows = min(LARGE_ROWS, free_memory(DEVICE) // (8 * 2 * vocab))
    leaf = (
        torch.empty(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
        .normal_()
        .requires_grad_(mode in ("backward", "inplace"))
    )
    labels, g = labels_of(rows, vocab=vocab), torch.randn(rows, device=DEVICE)
    for temper in ("cold", "warm"):
        logits = leaf * 1

        def step(logits: Tensor = logits) -> object:
            results = run(backend, logits, labels, **WANTED[mode])
            return torch.autograd.grad(results.log_probs, logits, g) if logits.requires_grad else results

        peak = extra_peak_bytes(step, DEVICE)
        promised = PROMISED[mode] * logits.nbytes + BESIDE.get(backend, BESIDE_OTHERS)
        record_property(f"{backend}, {mode}, {temper}, x the logits", round(peak / logits.nbytes, 4))
        assert peak <= promised or not IS_GPU  # on a CPU it is that of the process, the compiler's included


def test_in_a_graph_the_peak_of_memory_in_place_is_that_of_the_logits_alone(record_property):
    """Where the graph computed them, and nothing else needs them."""
    rows = min(LARGE_ROWS, free_memory(DEVICE) // (8 * 2 * VOCAB))
    hidden = torch.randn(rows, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    head, labels = torch.randn(16, VOCAB, device=DEVICE, dtype=torch.bfloat16), labels_of(rows)

    @in_a_graph
    def loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return log_probs_from_logits(hidden @ head, labels, inplace_backward=True).sum()

    def step() -> object:
        return torch.autograd.grad(loss(hidden, head, labels), hidden)

    step()
    peak, size = extra_peak_bytes(step, DEVICE), rows * VOCAB * 2
    record_property("in a graph, in place, x the logits", round(peak / size, 4))
    assert peak <= 1.1 * size + BESIDE_OTHERS or not IS_GPU


@pytest.mark.parametrize(("backend", "is_graph"), [*((name, False) for name in backends()), ("auto", True)])
def test_more_logits_than_32_bits_count(backend, is_graph):
    rows = BEYOND // VOCAB + 3
    skip_without_memory(3.2 * rows * VOCAB * 2)
    logits = torch.empty(rows, VOCAB, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    labels, g = labels_of(rows), torch.randn(rows, device=DEVICE)
    got = run(backend, logits, labels)
    if is_graph:
        got = Results(in_a_graph(partial(log_probs_from_logits, backend=backend))(logits, labels))
    (gradient,) = torch.autograd.grad(got.log_probs, logits, g)
    some = torch.tensor([0, 1, BEYOND // VOCAB - 1, BEYOND // VOCAB, rows - 1], device=DEVICE)  # the border is in one
    hold(logits.detach()[some], labels[some], Results(got.log_probs[some]), gradient[some], g[some])
