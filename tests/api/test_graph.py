"""Inside other people's graphs: torch.compile, torch.export, fake tensors."""

import io
import math
import threading
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_logprobs as clp
from compiled_logprobs.api import graph
from compiled_logprobs.backends import get_backend
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.choose import memory
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import RESULTS
from tests.helpers.backends_for_tuning import registered

VOCAB = 257
EVERYTHING = {f"return_{name}": True for name in RESULTS}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **how):
    """As a user's graph, traced with its backward; run without Inductor, which takes seconds to compile it."""
    return torch.compile(function, **{"backend": "aot_eager", "fullgraph": True, **how})


def inputs(*rows: int):
    return torch.randn(*rows, VOCAB, requires_grad=True), torch.randint(VOCAB, rows)


def value_and_gradient(function, logits, labels, temperature, backend):
    """All that is returned, and the gradient through all that has one."""
    out = function(logits, labels, temperature, backend)
    through = [part for part in out if part.requires_grad]
    grads = [torch.linspace(-1, 2, part.numel()).view(part.shape) for part in through]
    return [*out, *torch.autograd.grad(through, logits, grads)]


def of_whole(logits, labels, temperature, backend):
    return clp.log_probs_from_logits(logits * 2, labels, temperature=temperature, backend=backend, **EVERYTHING)


def of_slice(logits, labels, temperature, backend):
    return clp.log_probs_from_logits(
        (logits * 2)[:, :-1], labels[:, 1:], temperature=temperature, backend=backend, return_entropy=True
    )


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("cpp", False), ("cpp", True), pytest.param("compiled", True, marks=pytest.mark.slow)]
)
def test_a_graph_has_the_same_bits_as_outside(backend, dynamic):
    for function in (of_whole, of_slice):
        inside = compiled(function, dynamic=dynamic)
        for rows, temperature in ((2, 1.0), (5, 0.7), (5, torch.rand(5, 1) + 0.5)):
            if backend == "compiled" and isinstance(temperature, torch.Tensor):
                continue  # for which it would compile for another quarter of a minute
            logits, labels = inputs(rows, 6)
            if function is of_slice and isinstance(temperature, torch.Tensor):
                temperature = temperature.expand(5, 5)
            labels[0, 1] = -100
            expected = value_and_gradient(function, logits, labels, temperature, backend)
            got = value_and_gradient(inside, logits, labels, temperature, backend)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_number_that_the_host_may_not_read_is_one_temperature_a_row_with_the_same_bits(monkeypatch):
    """As on an accelerator, whose tensors are not on the CPU."""
    logits, labels = inputs(3, 6)
    expected = value_and_gradient(of_slice, logits, labels, 0.7, "cpp")
    inside = compiled(of_slice)
    value_and_gradient(inside, logits, labels, 0.7, "cpp")
    temperatures = []
    run = graph.run_forward
    monkeypatch.setattr(
        graph, "run_forward", lambda a, b, c, t, *rest: (temperatures.append(t), run(a, b, c, t, *rest))[1]
    )
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    got = value_and_gradient(inside, logits, labels, 0.7, "cpp")
    assert [temperature.shape for temperature in temperatures] == [(3, 5)]
    assert all(map(torch.equal, got, expected))


class Mine(Eager):
    """Somebody's backend, which has bits of its own."""

    name = "mine"

    def forward(self, inputs, wanted):
        results = super().forward(inputs, wanted)
        return results._replace(log_probs=results.log_probs * 1.5)

    def backward(self, inputs, stats, upstream, *, inplace):
        return super().backward(inputs, stats, upstream, inplace=inplace) * 1.5


def test_a_backend_of_somebody_runs_in_a_graph():
    with registered(mine=Mine()):
        logits, labels = inputs(5, 6)
        expected = value_and_gradient(of_slice, logits, labels, 0.7, "mine")
        for a, b in zip(value_and_gradient(compiled(of_slice), logits, labels, 0.7, "mine"), expected, strict=True):
            assert torch.equal(a, b)
        assert not torch.allclose(expected[0], of_slice(logits, labels, 0.7, "eager")[0])


def test_rows_are_invariant_in_a_graph_too():
    """Whatever N they came with, and as outside."""
    logits, labels = inputs(9)
    inside = compiled(of_whole, dynamic=True)
    with clp.autotune(row_invariant=True):
        expected = value_and_gradient(of_whole, logits, labels, 0.7, "auto")
        for rows in (9, 4):
            given = logits[:rows].detach().requires_grad_(), labels[:rows]
            *results, gradient = value_and_gradient(inside, *given, 0.7, "auto")
            for a, b in zip(results, expected, strict=False):
                assert torch.equal(a, b[:rows])
            outside = value_and_gradient(of_whole, *given, 0.7, "auto")[-1]
            assert torch.equal(gradient, outside)
    assert {choice.backend for choice in memory.MEMORY.choices.values()} == {"cpp"}


def test_a_new_n_or_temperature_hardly_compiles_a_users_graph_again():
    counter = CompileCounterWithBackend("eager")
    loss = torch.compile(
        lambda x, y, t: clp.log_probs_from_logits(x, y, temperature=t).sum(), fullgraph=True, backend=counter
    )
    for rows in range(3, 23):
        logits, labels = inputs(rows)
        for temperature in (0.5, 0.7, 1.0, 1.1, 2.0):
            loss(logits, labels, temperature)
        assert counter.frame_count <= (2 if rows == 3 else 3)


@pytest.mark.parametrize("backend", ["cpp", pytest.param("compiled", marks=pytest.mark.slow)])
def test_torch_finds_the_operators_well_formed(backend):
    logits, labels = torch.randn(2, 4, 11, dtype=torch.bfloat16)[:, :-1], torch.randint(11, (2, 3))
    operators = torch.ops.compiled_logprobs
    temperature = torch.tensor(0.7, dtype=torch.float64)
    options = -100, [True, False, False, True], False, True, False, False, torch.float32, backend
    torch.library.opcheck(operators.log_probs, (logits.requires_grad_(), labels, temperature, *options))
    logits = logits.detach()
    log_probs, stats, entropy, *_ = operators.log_probs(logits, labels, temperature, *options)
    saved = logits, labels, temperature, stats
    for backward in (operators.log_probs_backward, operators.log_probs_backward_):
        torch.library.opcheck(backward, (*saved, log_probs, entropy, None, *options))


@pytest.mark.slow
def test_a_slice_is_not_copied_on_the_way_in(monkeypatch):
    seen = []

    run = graph.run_forward
    monkeypatch.setattr(graph, "run_forward", lambda serving, x, *rest: (seen.append(x), run(serving, x, *rest))[1])
    hidden, weight, labels = torch.randn(2, 6, 8), torch.randn(VOCAB, 8, requires_grad=True), torch.zeros(2, 6).long()

    @torch.compile(fullgraph=True)
    def step(hidden, weight, labels):
        logits = torch.nn.functional.linear(hidden, weight)
        return logits, clp.log_probs_from_logits(logits[:, :-1], labels[:, 1:])

    logits, log_probs = step(hidden, weight, labels)
    (x,) = seen
    assert x.data_ptr() == logits.data_ptr() and x.stride() == logits.stride() and x.shape == (2, 5, VOCAB)
    log_probs.sum().backward()
    assert weight.grad is not None


@pytest.fixture
def written(monkeypatch) -> list[tuple[int, int]]:
    """Where the logits of a graph's forward lie, and then where its backward writes the gradient."""
    seen = []
    run, run_back = graph.run_forward, graph.run_backward

    def forward(serving, logits, *rest):
        seen.append(logits.data_ptr())
        return run(serving, logits, *rest)

    def backward(*given, inplace):
        gradient = run_back(*given, inplace=inplace)
        assert inplace
        seen.append(gradient.data_ptr())
        return gradient

    monkeypatch.setattr(graph, "run_forward", forward)
    monkeypatch.setattr(graph, "run_backward", backward)
    return seen


def of_head(hidden, weight, labels, call):
    logits = torch.nn.functional.linear(hidden, weight)
    return None, call(logits.view(-1, VOCAB), labels.view(-1)).sum()


def of_head_and_others(hidden, weight, labels, call):
    """The logits are saved by others, and by a second call, and go out of the graph."""
    logits = torch.nn.functional.linear(hidden, weight)
    return logits, call(logits, labels).sum() + logits.logsumexp(-1).sum() + call(logits, labels, temperature=0.5).sum()


def of_input(hidden, weight, labels, call):
    """As where the loss alone is compiled."""
    return hidden, call(hidden, labels).sum()


@pytest.mark.slow
@pytest.mark.parametrize("function", [of_head, of_head_and_others, of_input])
def test_in_place_inductor_writes_over_what_nobody_needs_and_nothing_else(function, written):
    hidden, weight, labels = torch.randn(2, 6, 8), torch.randn(VOCAB, 8), torch.randint(VOCAB, (2, 6))
    if function is of_input:
        hidden = torch.randn(2, 6, VOCAB)
    leaves = hidden.requires_grad_(), *([] if function is of_input else [weight.requires_grad_()])
    call = partial(clp.log_probs_from_logits, backend="cpp")
    expected = torch.autograd.grad(function(hidden, weight, labels, call)[1], leaves)
    inside = torch.compile(function, fullgraph=True)
    logits, loss = inside(hidden, weight, labels, partial(call, inplace_backward=True))
    before = None if logits is None else logits.detach().clone()
    gradients = torch.autograd.grad(loss, leaves)
    for got, true in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, true, atol=1e-5, rtol=1e-5)
    assert before is None or torch.equal(logits, before)
    assert (written[0] in written[len(written) // 2 :]) == (function is of_head)


def note_calls(monkeypatch, kind, name, ran):
    for direction in ("forward", "backward"):
        run = getattr(kind, direction)
        monkeypatch.setattr(kind, direction, lambda *args, run=run, **how: (ran.append(name), run(*args, **how))[1])


def test_a_graph_looks_up_and_never_measures(mode, monkeypatch):
    """And its backward, in whatever thread and under whatever policy, takes what its forward took."""
    mode("tune")
    monkeypatch.setattr("compiled_logprobs.problem.SMALL", 0)
    ran = []
    for name in ("cpp", "eager"):
        note_calls(monkeypatch, type(get_backend(name)), name, ran)
    inside = compiled(lambda x, y: clp.log_probs_from_logits(x * 2, y).sum())
    logits, labels = inputs(5)
    loss = inside(logits, labels)
    (choice,) = memory.MEMORY.choices.values()
    assert "graph" in choice.unmeasured
    memory.MEMORY.choices.clear()
    memory.MEMORY.cool()
    ran.clear()

    def backward():
        with clp.autotune("tune"):
            loss.backward()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert logits.grad is not None and ran == ["cpp"]
    assert not memory.MEMORY.choices


def test_an_invalid_label_or_temperature_makes_its_row_nan_in_a_graph():
    logits, labels = inputs(3)
    labels[1] = VOCAB
    graph = compiled(lambda x, y, t: clp.log_probs_from_logits(x * 2, y, temperature=t, inplace_backward=True))
    for temperature, invalid in ((1.5, [False, True, False]), *((bad, [True] * 3) for bad in (-1.0, math.nan))):
        out = graph(logits, labels, temperature)
        (gradient,) = torch.autograd.grad(out.sum(), logits)
        assert out.isnan().tolist() == invalid and gradient.isnan().all(-1).tolist() == invalid
        true = reference(logits.detach() * 2, labels[:, None], temperature, grad_log_probs=torch.ones(3, 1))
        torch.testing.assert_close(gradient.double(), 2 * true.gradient, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_graph_takes_every_result_and_sees_what_was_not_asked_for(backend):
    logits, labels = inputs(4)
    labels[1] = -100
    options = dict.fromkeys(("return_logsumexp", "return_argmax", "return_sum_p_squared"), True)

    @compiled
    def graph(logits, labels):
        out = clp.log_probs_from_logits(logits * 2, labels, backend=backend, **options)
        assert isinstance(out, clp.LogProbs) and out.logsumexp is not None
        return out

    out = graph(logits, labels)
    (gradient,) = torch.autograd.grad(out.logsumexp.sum() + out.log_probs.sum(), logits)
    ones = {"grad_log_probs": torch.ones(4, 1), "grad_logsumexp": torch.ones(4)}
    true = reference(logits.detach() * 2, labels[:, None], **ones)
    assert isinstance(out, clp.LogProbs) and out._fields == ("log_probs", "logsumexp", "argmax", "sum_p_squared")
    assert torch.equal(out.argmax, true.argmax)
    for name in ("logsumexp", "sum_p_squared"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(true, name), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient.double(), 2 * true.gradient, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_eager_is_inlined_for_the_compiler_to_fuse():
    logits, labels = inputs(2, 5)
    labels[0, 1] = -100

    @torch.compile(fullgraph=True)
    def loss(logits, labels, temperature):
        out = clp.log_probs_from_logits(
            logits * 2, labels, temperature=temperature, return_entropy=True, backend="eager"
        )
        return out.log_probs, out[1]

    log_probs, entropy = loss(logits, labels, 0.7)
    g, h = torch.randn(2, 5), torch.randn(2, 5)
    (gradient,) = torch.autograd.grad([log_probs, entropy], logits, [g, h])
    true = reference(logits.detach() * 2, labels[..., None], 0.7, grad_log_probs=g[..., None], grad_entropy=h)
    torch.testing.assert_close(log_probs.double(), true.log_probs[..., 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), true.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient.double(), 2 * true.gradient, atol=1e-5, rtol=0)
    assert (log_probs <= 0).all()


def test_no_rows_and_a_second_derivative():
    inside = compiled(lambda x, y: clp.log_probs_from_logits(x * 2, y, return_entropy=True))
    logits, labels = inputs(0, 3)
    out = inside(logits, labels)
    (gradient,) = torch.autograd.grad(out[0].sum() + out[1].sum(), logits)
    assert out[0].shape == (0, 3) and gradient.shape == logits.shape
    logits, labels = inputs(2, 3)

    def differentiate_twice():
        (gradient,) = torch.autograd.grad(inside(logits, labels)[0].sum(), logits, create_graph=True)
        gradient.sum().backward()

    with pytest.raises((clp.LogProbsError, RuntimeError), match="create_graph=False|double backward"):
        differentiate_twice()  # torch refuses it of any graph, before our own error


class Model(torch.nn.Module):
    def forward(self, logits, labels):
        return clp.log_probs_from_logits(logits * 2, labels, temperature=0.7, return_argmax=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export_saves_and_loads_the_operator(strict):
    logits, labels = inputs(4)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(Model(), (logits, labels), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    logits, labels = inputs(7)
    out = loaded(logits, labels)
    assert isinstance(out, clp.LogProbs)
    torch.testing.assert_close(out, Model()(logits, labels), atol=0, rtol=0)
    gradient = torch.autograd.grad(out.log_probs.sum(), logits, create_graph=False)
    assert torch.equal(*gradient, *torch.autograd.grad(Model()(logits, labels).log_probs.sum(), logits))
    with pytest.raises(clp.LogProbsError, match="double backward"):
        torch.autograd.grad(loaded(logits, labels).log_probs.sum(), logits, create_graph=True)


def test_fake_tensors_have_shapes_and_dtypes():
    real_logits, real_labels = inputs(4)
    with FakeTensorMode() as mode:
        logits, labels = mode.from_tensor(real_logits), mode.from_tensor(real_labels)
        for backend in ("auto", "compiled", "eager"):
            out = clp.log_probs_from_logits(
                logits, labels, backend=backend, out_dtype=torch.bfloat16, temperature=0.7, **EVERYTHING
            )
            assert all(part.shape == (4,) for part in out) and out.argmax.dtype == torch.int64
            assert out.log_probs.dtype == out.entropy.dtype == torch.bfloat16
            (gradient,) = torch.autograd.grad(out.log_probs.sum() + out.logsumexp.sum(), logits)
            assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
        with pytest.raises(clp.BackendUnavailable):
            clp.log_probs_from_logits(logits, labels, backend="fastest")
    assert clp.log_probs_from_logits(logits, labels).shape == (4,)  # fake tensors outside of their mode


def test_more_logits_than_32_bits_count_are_traced():
    """Without memory: 2^32 of them, and more than 2^31 of a slice; on a GPU, whose autograd needs one, by operator."""
    rows, vocab, operators = 2**20, 4096, torch.ops.compiled_logprobs
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            logits = torch.empty(2, rows // 2, vocab, dtype=torch.bfloat16, device=device)
            labels = torch.empty(2, rows // 2 - 1, 3, dtype=torch.int64, device=device)
            part = logits.narrow(1, 0, rows // 2 - 1)
            options = -100, [True] * 4, False, True, False, False, torch.float32, "auto"
            log_probs, stats, *others = operators.log_probs(part, labels, None, *options)
            assert log_probs.shape == labels.shape and stats.shape == (3, rows - 2) and log_probs.device.type == device
            assert all(other.shape == part.shape[:-1] for other in others) and others[2].dtype == torch.int64
            given = labels, None, stats, log_probs, others[0], others[1], *options
            gradient = operators.log_probs_backward(part, *given)
            assert gradient.shape == part.shape and gradient.is_contiguous() and gradient.device.type == device
            assert operators.log_probs_backward_(gradient, *given) is None
        logits, labels = logits.cpu().requires_grad_(), labels.cpu()

        @compiled
        def graph(logits, labels):
            return clp.log_probs_from_logits(logits[:, :-1], labels, temperature=0.7).sum()

        (gradient,) = torch.autograd.grad(graph(logits, labels), logits)
        assert gradient.shape == logits.shape and gradient.dtype == torch.bfloat16


def test_a_vmap_inside_a_graph_has_the_right_numbers():
    """Where outside of one it is refused: torch goes through it entry by entry."""
    logits, labels = torch.randn(2, 3, VOCAB, requires_grad=True), torch.randint(VOCAB, (2, 3))
    (true,) = torch.autograd.grad(clp.log_probs_from_logits(logits, labels).sum(), logits)
    for fullgraph, backend, inplace in ((False, "auto", False), (True, "cpp", True)):
        call = partial(clp.log_probs_from_logits, backend=backend, inplace_backward=inplace)
        graph = compiled(lambda x, y, call=call: torch.vmap(call)(x * 1.0, y), fullgraph=fullgraph)
        out = graph(logits, labels)
        torch.testing.assert_close(out, clp.log_probs_from_logits(logits, labels), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), logits)[0], true, atol=1e-6, rtol=0)


def test_forward_mode_inside_a_graph_is_refused():
    logits, labels = inputs(3)
    logits = logits.detach()

    def tangent(x):
        return torch.func.jvp(lambda x: clp.log_probs_from_logits(x, labels), (x,), (x,))[1]

    with pytest.raises(Exception, match="log_probs_from_logits|inside torch.func.grad, vmap or another"):
        torch.compile(tangent, backend="aot_eager")(logits)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, logits)
        with pytest.raises(Exception, match="log_probs_from_logits"):
            torch.compile(lambda x: clp.log_probs_from_logits(x, labels), backend="aot_eager")(dual)
