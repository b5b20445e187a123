"""The first call of a large problem, which runs the gate, wherever users may make it; and captures, which must not."""

from contextlib import nullcontext
from functools import partial
from threading import Thread

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import compiled_logprobs as clp
from compiled_logprobs.api import call
from compiled_logprobs.arguments import has_saved_tensor_hooks
from compiled_logprobs.backends.compiled import Compiled
from compiled_logprobs.backends.cpp import Cpp
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.choose import auto, memory, rule, tune
from compiled_logprobs.operation.reference import reference
from tests.helpers.host_syncs import without_host_syncs

ROWS, VOCAB = 1024, 1101


def inputs():
    return torch.randn(ROWS, VOCAB, requires_grad=True), torch.randint(VOCAB, (ROWS,))


def assert_decided():
    assert {choice.backend for choice in memory.MEMORY.choices.values()} == {"cpp"}


MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "anomaly": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_a_mode_of_torch_changes_no_bit(mode):
    logits, labels = inputs()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with MODES[mode]():
        out = clp.log_probs_from_logits(logits, labels)
        if out.requires_grad:
            out.sum().backward()
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers stay theirs
    assert torch.equal(out, clp.log_probs_from_logits(logits, labels, backend="cpp"))
    assert_decided()


@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, decided):
    logits, labels = inputs()
    if decided:
        clp.log_probs_from_logits(logits * 2.0, labels)
    checkpoint(lambda x: clp.log_probs_from_logits(x * 2.0, labels).sum(), logits, use_reentrant=reentrant).backward()
    true = reference(logits.detach() * 2.0, labels[:, None], grad_log_probs=torch.ones(ROWS, 1))
    torch.testing.assert_close(logits.grad.double(), 2 * true.gradient, atol=1e-5, rtol=0)
    assert_decided()


@pytest.fixture
def served(monkeypatch, mode) -> list[str]:
    """Whose forward ran; outside of `autotune` blocks a new problem would be measured, which fails the test."""
    mode("tune")
    monkeypatch.setattr(tune, "Tuner", lambda *_, **__: pytest.fail("it measured"))
    ran: list[str] = []

    def noted(forward, name):
        return lambda self, *arguments: ran.append(name) or forward(self, *arguments)

    for backend in (Cpp, Eager):
        monkeypatch.setattr(backend, "forward", noted(backend.forward, backend.name))
    return ran


def call_before(logits, labels, reentrant):
    """With the gradient and without; only without where a torch before 2.7 would take that for the forward."""
    with clp.autotune("off"):
        clp.log_probs_from_logits(logits.detach(), labels)
        if not reentrant or not has_saved_tensor_hooks(otherwise=True):
            clp.log_probs_from_logits(logits, labels)


def let_eager_serve(logits, labels):
    """In the mode "lookup", as if that had been measured; in the mode "off" it is cpp."""
    for x in (logits, logits.detach()):
        problem = clp.explain(x, labels).problem
        memory.MEMORY.hold(problem, memory.Choice("eager", "ranks"))


def backward_in_a_thread(loss):
    with clp.autotune("tune"):
        thread = Thread(target=loss.backward)
        thread.start()
        thread.join()


BACKWARD = {"outside of the block": lambda loss: loss.backward(), "in another thread": backward_in_a_thread}


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_takes_what_the_last_forward_took(reentrant, backward, served):
    logits, labels = inputs()
    call_before(logits, labels, reentrant)
    let_eager_serve(logits, labels)
    for mode, name in {"lookup": "eager", "off": "cpp"}.items():
        logits.grad = None
        with clp.autotune(mode):
            loss = checkpoint(partial(clp.log_probs_from_logits, labels=labels), logits, use_reentrant=reentrant).sum()
        served.clear()
        BACKWARD[backward](loss)
        assert served == [name]
        true = reference(logits.detach(), labels[:, None], grad_log_probs=torch.ones(ROWS, 1))
        torch.testing.assert_close(logits.grad.double(), true.gradient, atol=1e-5, rtol=0)


def test_a_recomputation_after_another_forward_without_the_gradient_takes_its_own(served):
    """As a trainer computes the log-probabilities of a reference model before its backward."""
    logits, labels = inputs()
    with clp.autotune("off"):
        loss = checkpoint(partial(clp.log_probs_from_logits, labels=labels), logits, use_reentrant=False).sum()
    let_eager_serve(logits, labels)
    with torch.no_grad():
        clp.log_probs_from_logits(logits, labels)
    assert served[-1] == "eager"
    loss.backward()
    assert served[-1] == "cpp"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_of_rows_that_have_to_be_invariant_needs_no_block_and_checks_nothing(
    reentrant, served, monkeypatch
):
    logits, labels = inputs()
    with clp.autotune(row_invariant=True):
        loss = checkpoint(partial(clp.log_probs_from_logits, labels=labels), logits, use_reentrant=reentrant).sum()
        monkeypatch.setattr(rule, "check_backend", lambda *_, **__: pytest.fail("it checked"))
    count = len(served)
    loss.backward()
    assert served[count - 1 :] == ["cpp", "cpp"]
    (gradient,) = torch.autograd.grad(clp.log_probs_from_logits(logits, labels, backend="cpp").sum(), logits)
    assert torch.equal(logits.grad, gradient)


@pytest.mark.parametrize("reentrant", [False, True])
def test_where_the_forward_fell_back_to_eager_the_recomputation_takes_eager(reentrant, served, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such instruction")

    logits, labels = inputs()
    call_before(logits, labels, reentrant)
    monkeypatch.setattr(Cpp, "forward", fails)
    call = partial(clp.log_probs_from_logits, labels=labels)
    with clp.autotune("off"), pytest.warns(RuntimeWarning, match="'cpp' failed"):
        loss = checkpoint(call, logits, use_reentrant=reentrant).sum()
    monkeypatch.setattr(Cpp, "forward", lambda *_: pytest.fail("it is set aside"))
    loss.backward()
    assert served[-1] == "eager" and logits.grad.isfinite().all()


def test_a_call_that_is_new_in_a_backward_pass_does_not_measure(served):
    """Of a function of somebody's that recomputes by itself, for the first time."""
    labels = torch.randint(VOCAB, (ROWS,))

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            ctx.save_for_backward(logits)
            return logits.sum()

        @staticmethod
        def backward(ctx, _):
            with torch.enable_grad():
                logits = ctx.saved_tensors[0].detach().requires_grad_()
                clp.log_probs_from_logits(logits, labels).sum().backward()
            return logits.grad

    logits = torch.randn(ROWS, VOCAB, requires_grad=True)
    Recomputed.apply(logits).backward()
    assert served[-1] == "cpp" and logits.grad.isfinite().all()
    assert {mode for _, mode, _ in memory.MEMORY.choices} == {"lookup"}  # so that a forward may measure it yet


def test_selective_checkpoints_keep_or_recompute_it():
    logits, labels = inputs()
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mul.Tensor])
    call = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    call(lambda x: clp.log_probs_from_logits(x * 2.0, labels).sum(), logits).backward()
    (gradient,) = torch.autograd.grad(clp.log_probs_from_logits(logits * 2.0, labels, backend="eager").sum(), logits)
    assert torch.equal(logits.grad, gradient)


def test_what_forwards_took_is_kept_within_bounds_though_choices_are_forgotten(monkeypatch):
    monkeypatch.setattr(memory, "_MOST_HOT", 4)
    process, first = memory.MEMORY, clp.Problem("cpu", 1, 7, torch.float32)
    for rows in range(1, 100):
        problem = first._replace(rows=rows)
        process.keep(problem, None, (f"backend {rows}", Eager()))
        process.forget(problem)
        assert process.last_forward(problem)[0] == process.last_forward(problem._replace(needs_grad=True), False)[0]
        assert len(process.hot) + len(process.cold) <= 10
    assert process.last_forward(first) is None


def test_a_capture_takes_what_is_warm_and_neither_tunes_checks_nor_compiles(monkeypatch):
    """As on a GPU whose stream is being captured."""
    logits, labels = inputs()
    for x in (logits, logits.detach()):  # remembered, of the same bucket
        clp.log_probs_from_logits(x[: ROWS - 1], labels[: ROWS - 1])
    assert_decided()
    before = dict(memory.MEMORY.choices)
    for module in (call, auto):
        monkeypatch.setattr(module, "is_capturing", lambda problem: True)
    monkeypatch.setattr(rule, "check_backend", lambda *a, **k: pytest.fail("the gate ran during a capture"))
    expected = clp.log_probs_from_logits(logits, labels, backend="cpp")
    for x in (logits, logits.detach()):
        assert torch.equal(clp.log_probs_from_logits(x, labels), expected)
    with pytest.raises(clp.BackendUnavailable, match="no backend has served 7 x 1101 .* Call warm"):
        clp.log_probs_from_logits(logits[:7], labels[:7])  # of another bucket, though few enough for what is ready
    loss = checkpoint(partial(clp.log_probs_from_logits, labels=labels), logits, use_reentrant=False).sum()
    loss.backward()
    for backend in (Compiled, Cpp):
        monkeypatch.setattr(backend, "is_warm", lambda self, problem: False)
    monkeypatch.setattr(Cpp, "forward", lambda *a, **k: pytest.fail("it would have to be built"))
    with pytest.raises(clp.BackendUnavailable, match="'cpp', which serves such problems, has not run .* Call warm"):
        clp.log_probs_from_logits(logits, labels)
    with pytest.raises(clp.BackendUnavailable, match="cannot compile while a CUDA graph is captured. Call warm"):
        clp.log_probs_from_logits(logits, labels, backend="compiled")
    with (
        clp.autotune(row_invariant=True),  # of whose backend nothing is known then
        pytest.raises(clp.BackendUnavailable, match="no backend has served .* with row_invariant=True in this process"),
    ):
        clp.log_probs_from_logits(logits, labels)
    clp.log_probs_from_logits(logits, labels, backend="eager")
    assert memory.MEMORY.choices == before


@pytest.mark.parametrize("backend", ["auto", "eager", "cpp", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_capture_reads_no_value(backend, monkeypatch):
    """Forward, backward and inference, as on a GPU: what would wait for it is an error there."""
    logits, labels = inputs()
    temperature = torch.full((ROWS,), 0.7)

    def step():
        with torch.inference_mode():
            alone = clp.log_probs_from_logits(logits, labels, temperature=temperature, backend=backend)
        out = clp.log_probs_from_logits(logits, labels, temperature=temperature, backend=backend)
        return alone, out, *torch.autograd.grad(out.sum(), logits)

    expected = step()
    for module in (call, auto):
        monkeypatch.setattr(module, "is_capturing", lambda problem: True)
    with without_host_syncs():
        results = step()
    assert all(map(torch.equal, results, expected))
    with pytest.raises(AssertionError, match="aten::item"), without_host_syncs():
        logits.isnan().any().item()


class Tagged(torch.Tensor):
    """A tensor subclass of somebody's."""


def test_under_what_sees_each_operation_auto_is_eager_and_a_named_backend_is_not_replaced():
    logits, labels = inputs()
    with FlopCounterMode(display=False):
        auto = clp.log_probs_from_logits(logits, labels)
        with pytest.raises(clp.BackendUnavailable, match="needs a CUDA or ROCm device"):
            clp.log_probs_from_logits(logits, labels, backend="flash_attn")
        with pytest.raises(clp.InputError, match="0 to 1100"):
            clp.log_probs_from_logits(logits, labels + VOCAB)
    of_tagged = clp.log_probs_from_logits(logits.detach().as_subclass(Tagged), labels)
    for out in (auto, torch.Tensor(of_tagged)):
        assert torch.equal(out, clp.log_probs_from_logits(logits, labels, backend="eager"))


def test_function_transforms_are_refused_in_words():
    labels = torch.zeros(3, dtype=torch.int64)
    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(
            clp.InputError, match="got logits inside torch.func.grad, vmap or another of its transforms"
        ):
            transform(lambda x: clp.log_probs_from_logits(x, labels).sum())(torch.randn(3, 3, 7))
    x, refused = torch.randn(3, 7), "got {} inside torch.func.grad, vmap or another of its transforms"
    with pytest.raises(clp.InputError, match=refused.format("labels")):
        torch.vmap(lambda y: clp.log_probs_from_logits(x, y))(labels.expand(2, 3))
    with pytest.raises(clp.InputError, match=refused.format("a temperature tensor")):
        torch.vmap(lambda t: clp.log_probs_from_logits(x, labels, temperature=t))(torch.ones(2))


def test_what_a_transform_does_not_touch_is_served_by_eager(recwarn):
    x, labels = torch.randn(3, 7), torch.zeros(3, dtype=torch.int64)
    expected = clp.log_probs_from_logits(x, labels, backend="eager").sum()
    gradient = torch.func.grad(lambda scale: (scale * clp.log_probs_from_logits(x, labels)).sum())(torch.tensor(2.0))
    torch.testing.assert_close(gradient, expected)
    assert not recwarn.list  # no backend was set aside
    for backend in ("cpp", "compiled"):
        with pytest.raises(clp.BackendUnavailable, match=f"'{backend}' cannot run inside torch.func.grad, .* 'eager'"):
            torch.func.grad(lambda s, name=backend: s * clp.log_probs_from_logits(x, labels, backend=name).sum())(
                torch.tensor(2.0)
            )


@pytest.mark.parametrize("backend", ["auto", "eager", "cpp"])
def test_forward_mode_is_refused_in_words(backend):
    x, labels = torch.randn(3, 7), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(clp.InputError, match="got logits inside torch.func.grad, vmap or another of its transforms"):
        torch.func.jvp(lambda x: clp.log_probs_from_logits(x, labels, backend=backend), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(clp.LogProbsError, match="forward-mode .* has a backward alone. Use torch.autograd.grad"):
            clp.log_probs_from_logits(dual, labels, backend=backend)


@pytest.mark.parametrize("options", [{}, {"inplace_backward": True}], ids=["", "in place"])
@pytest.mark.parametrize("backend", ["auto", "eager", "cpp"])
def test_compiled_autograd_runs_the_backward_as_it_is(backend, options):
    x, labels = torch.randn(4, 33, requires_grad=True), torch.randint(33, (4,))
    call = partial(clp.log_probs_from_logits, labels=labels, backend=backend, return_entropy=True, **options)
    (expected,) = torch.autograd.grad(sum(map(torch.sum, call(x * 2.0))), x)
    loss = sum(map(torch.sum, call(x * 2.0)))
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss.backward(), backend="eager")()
    torch._dynamo.reset()
    assert torch.equal(x.grad, expected)


HOOKS = {
    "offload": torch.autograd.graph.save_on_cpu,
    "other memory": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor),
}


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_saved_may_lie_elsewhere_until_backward(inplace, hooks):
    x, labels = torch.randn(4, 33, requires_grad=True), torch.randint(33, (4,))
    (expected,) = torch.autograd.grad(clp.log_probs_from_logits(x * 2.0, labels).sum(), x)
    with HOOKS[hooks]():
        loss = clp.log_probs_from_logits(x * 2.0, labels, inplace_backward=inplace).sum()
    loss.backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.skipif(has_saved_tensor_hooks(otherwise=True), reason="this torch does not tell where hooks are in force")
@pytest.mark.parametrize("context", [*HOOKS.values(), nullcontext], ids=[*HOOKS, "checkpoint"])
def test_in_place_where_autograd_cannot_tell_others_the_logits_keep_their_values(context):
    """Others have saved them, whose gradients would be wrong in silence."""
    x, labels = torch.randn(4, 33, requires_grad=True), torch.randint(33, (4,))

    def loss(x, inplace=True):
        logits = x * 2.0
        return logits.logsumexp(-1).sum() + clp.log_probs_from_logits(logits, labels, inplace_backward=inplace).sum()

    (expected,) = torch.autograd.grad(loss(x, inplace=False), x)
    with context():
        out = checkpoint(loss, x, use_reentrant=False) if context is nullcontext else loss(x)
    out.backward()
    assert torch.equal(x.grad, expected)
