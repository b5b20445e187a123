"""From hidden states inside other people's graphs: torch.compile, torch.export, fake tensors."""

import io
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import compiled_logprobs as clp
from compiled_logprobs.api import hidden_graph

HIDDEN, VOCAB = 16, 300


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **how):
    """As a user's graph, traced with its backward; run without Inductor, which takes seconds to compile it."""
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", "dynamic": True, **how})


def inputs(rows: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Hidden states, weight, bias, and labels a part of which do not count."""
    shapes = (rows, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)
    tensors = [(torch.randn(shape) * 0.5).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(VOCAB, (rows,))
    labels[1::3] = -100
    return [*tensors, labels]


def everything(hidden, weight, bias, labels, temperature, backend) -> Any:
    options = {f"return_{name}": True for name in ("entropy", "logsumexp", "argmax")}
    return clp.log_probs_from_hidden(
        hidden * 2,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        logit_scale=0.5,
        softcap=20.0,
        backend=backend,
        **options,
    )


def with_gradients(function, given, *options) -> list[torch.Tensor]:
    results = function(*given, *options)
    through = [result for result in results if result.requires_grad]
    grads = [torch.linspace(-1, 2, result.numel()).view(result.shape) for result in through]
    return [*results, *torch.autograd.grad(through, [x for x in given if x.requires_grad], grads)]


def assert_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("backend", ["whole", "chunked_64", "chunked_vocab", "auto"])
def test_a_graph_has_the_same_bits_as_outside_and_is_hardly_compiled_again(backend):
    counter = CompileCounterWithBackend("aot_eager")
    inside = compiled(everything, backend=counter)
    for rows, temperature in ((70, 1.0), (133, 0.7), (133, torch.rand(133) + 0.5), (210, 1.3)):
        given = inputs(rows)
        expected = with_gradients(everything, given, temperature, backend)
        assert_same_bits(with_gradients(inside, given, temperature, backend), expected)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", ["whole", "chunked_64"])
def test_torch_finds_the_operators_well_formed(backend):
    hidden, weight, bias, labels = inputs(9 if backend == "whole" else 130)
    operators = torch.ops.compiled_logprobs
    temperature = torch.tensor(0.7, dtype=torch.float64)
    options = -100, 20.0, [True, False, False, False], False, True, True, None, torch.float32, backend
    torch.library.opcheck(operators.log_probs_from_hidden, (hidden, weight, bias, labels, temperature, *options))
    saved = hidden.detach(), weight.detach(), bias.detach(), labels, temperature
    log_probs, stats, kept, entropy, *_ = operators.log_probs_from_hidden(*saved, *options)
    grads = log_probs, entropy, None, [True, True, False]
    torch.library.opcheck(operators.log_probs_from_hidden_backward, (*saved, stats, kept, *grads, *options))


def loss(hidden, weight, labels, backend="auto"):
    return clp.cross_entropy_from_hidden(hidden * 2, weight, labels, backend=backend)


@pytest.mark.parametrize(("backend", "keeps"), [("whole", True), ("chunked_64", False)])
def test_logits_are_kept_beside_the_graph_where_the_backend_keeps_them(backend, keeps):
    """What goes from forward to backward is small, but for its memory; where that is lost on the way, as when it is
    copied, they are computed again, with the same bits."""
    hidden, weight, _, labels = inputs(200)
    logits = int((labels != -100).sum()) * VOCAB
    expected = torch.autograd.grad(loss(hidden, weight, labels, backend), (hidden, weight))
    inside = compiled(loss)
    for unpack in (lambda x: x, torch.clone):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: (saved.append(x), x)[1], unpack):
            result = inside(hidden, weight, labels, backend)
        assert max(x.numel() for x in saved) < logits
        assert any(x.untyped_storage().nbytes() == 4 * logits for x in saved) == keeps
        assert_same_bits(torch.autograd.grad(result, (hidden, weight)), expected)


def test_only_what_needs_a_gradient_gets_one(monkeypatch):
    asked = []
    run = hidden_graph.run_backward
    monkeypatch.setattr(hidden_graph, "run_backward", lambda *given: (asked.append(given[-1]), run(*given))[1])
    hidden, weight, bias, labels = inputs(20)
    inside = compiled(lambda x, w, b, y: clp.log_probs_from_hidden(x * 2, w, y, bias=b).sum())
    for needs in ((True, False, False), (False, True, True)):
        for x, is_needed in zip((hidden, weight, bias), needs, strict=True):
            x.requires_grad_(is_needed).grad = None
        inside(hidden, weight, bias, labels).backward()
        assert asked.pop() == needs
        assert [x.grad is not None for x in (hidden, weight, bias)] == list(needs)


def test_a_checkpoint_in_a_graph_gives_the_same_gradient():
    hidden, weight, _, labels = inputs(100)
    expected = torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
    inside = compiled(lambda x, w, y: checkpoint(loss, x, w, y, use_reentrant=False))
    assert_same_bits(torch.autograd.grad(inside(hidden, weight, labels), (hidden, weight)), expected)


def test_a_graph_looks_up_and_never_measures(monkeypatch):
    asked = []
    auto = hidden_graph.Auto
    monkeypatch.setattr(hidden_graph, "Auto", lambda *given: (asked.append(given), auto(*given))[1])
    hidden, weight, _, labels = inputs(20)
    compiled(loss)(hidden, weight, labels).backward()
    ((problem, _, tune),) = asked
    assert problem.needs_grad and problem.weight_grad and "does not measure" in tune(None, None)


def test_what_differentiates_by_autograd_does_not_serve_in_a_graph(monkeypatch):
    hidden, weight, _, labels = inputs(100)
    inside = compiled(loss)
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        with pytest.raises(
            clp.BackendUnavailable, match="by autograd.* Name another one of whole, [a-z0-9_, ]+64, eager"
        ):
            inside(hidden, weight, labels, "linear_cross_entropy")
        monkeypatch.setattr(hidden_graph.Auto, "chosen", "linear_cross_entropy")
    assert torch.equal(inside(hidden, weight, labels), loss(hidden, weight, labels, "whole"))


def test_what_is_wrong_is_said_when_the_graph_runs():
    hidden, weight, _, labels = inputs(20)
    limited = compiled(lambda x, w, y: clp.log_probs_from_hidden(x, w, y, memory_limit=1000))
    with pytest.raises(clp.InputError, match="memory_limit=1000 for 20 x 16 x 300 float32 on cpu"):
        limited(hidden, weight, labels)
    labels[0] = VOCAB
    out = compiled(lambda x, w, y: clp.log_probs_from_hidden(x, w, y))(hidden, weight, labels)
    assert out.isnan().nonzero().tolist() == [[0]]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, hidden, labels):
        return clp.log_probs_from_hidden(hidden * 2, self.head.weight, labels, temperature=0.7, return_argmax=True)


def test_export_saves_and_loads_the_operator():
    model = Model()
    hidden, _, _, labels = inputs(4)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(model, (hidden, labels), dynamic_shapes=({0: rows}, {0: rows}))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    hidden, _, _, labels = inputs(7)
    out = loaded(hidden, labels)
    assert isinstance(out, clp.LogProbs)
    assert_same_bits(out, model(hidden, labels))
    for _ in range(2):  # the second of which computes again what the first has written over
        gradient = torch.autograd.grad(out.log_probs.sum(), hidden, retain_graph=True)
        assert torch.equal(*gradient, *torch.autograd.grad(model(hidden, labels).log_probs.sum(), hidden))


def test_fake_tensors_have_shapes_and_dtypes():
    with FakeTensorMode() as fake:
        hidden, weight, bias, labels = (fake.from_tensor(x) for x in inputs(4, torch.bfloat16))
        out = clp.log_probs_from_hidden(hidden, weight, labels, bias=bias, return_entropy=True, return_argmax=True)
        assert all(part.shape == (4,) for part in out)
        assert [part.dtype for part in out] == [torch.float32, torch.float32, torch.int64]
        for x, gradient in zip(
            (hidden, weight, bias), torch.autograd.grad(out[0].sum(), (hidden, weight, bias)), strict=True
        ):
            assert gradient.shape == x.shape and gradient.dtype == x.dtype
        with pytest.raises(clp.BackendUnavailable, match="'fastest' is unknown"):
            loss(hidden, weight, labels, "fastest")


@pytest.mark.slow
def test_inductor_compiles_a_step_under_autocast():
    hidden, weight, _, labels = inputs(100)
    inside = compiled(loss, backend="inductor")
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss(hidden, weight, labels)
        result = inside(hidden, weight, labels)
    torch.testing.assert_close(result, expected)
    for got, true in zip(
        torch.autograd.grad(result, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, true)
