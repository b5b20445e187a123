"""The first call of a large problem, which runs the gate, wherever users may make it; and captures, which must not."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import compiled_logprobs as clp
from compiled_logprobs.api import functions as api
from compiled_logprobs.backends.compiled import Compiled
from compiled_logprobs.backends.cpp import Cpp
from compiled_logprobs.choose import auto, memory, rule
from compiled_logprobs.operation.reference import reference

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


def test_a_capture_neither_tunes_nor_takes_what_is_not_warm(monkeypatch):
    """As on a GPU whose stream is being captured."""
    logits, labels = inputs()
    clp.log_probs_from_logits(logits[: ROWS - 1].detach(), labels[: ROWS - 1])  # remembered, of the same bucket
    assert_decided()
    before = dict(memory.MEMORY.choices)
    for module in (api, auto):
        monkeypatch.setattr(module, "is_capturing", lambda problem: True)
    monkeypatch.setattr(rule, "check_backend", lambda *a, **k: pytest.fail("the gate ran during a capture"))
    for backend in (Compiled, Cpp):
        monkeypatch.setattr(backend, "is_warm", lambda self, problem: False)
    monkeypatch.setattr(Cpp, "forward", lambda *a, **k: pytest.fail("it would have to be built"))
    for x in (logits, logits.detach()):
        assert torch.equal(clp.log_probs_from_logits(x, labels), clp.log_probs_from_logits(x, labels, backend="eager"))
    assert memory.MEMORY.choices == before
    with pytest.raises(clp.BackendUnavailable, match="cannot compile while a CUDA graph is captured. Call warm"):
        clp.log_probs_from_logits(logits, labels, backend="compiled")
    with (
        clp.autotune(row_invariant=True),  # of whose backend nothing is known then
        pytest.raises(clp.BackendUnavailable, match="no backend has served .* with row_invariant=True yet"),
    ):
        clp.log_probs_from_logits(logits, labels)


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
