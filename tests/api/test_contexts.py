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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.autograd.detect_anomaly])
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_grad_modes_and_anomaly_detection(mode):
    logits, labels = inputs()
    with mode():
        out = clp.log_probs_from_logits(logits, labels)
        if out.requires_grad:
            out.sum().backward()
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


def test_the_random_numbers_of_the_caller_stay_theirs():
    logits, labels = inputs()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    clp.log_probs_from_logits(logits, labels)
    assert torch.equal(torch.rand(3), expected)
    assert_decided()


def test_a_default_device_and_autocast():
    logits, labels = inputs()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        out = clp.log_probs_from_logits(logits, labels)
    assert out.device.type == "cpu" and (out <= 0).all()
    assert_decided()


def test_a_capture_neither_tunes_nor_takes_what_is_not_warm(monkeypatch):
    """As on a GPU whose stream is being captured."""
    logits, labels = inputs()
    for module in (api, auto):
        monkeypatch.setattr(module, "is_capturing", lambda problem: True)
    monkeypatch.setattr(rule, "check_backend", lambda *a, **k: pytest.fail("the gate ran during a capture"))
    for backend in (Compiled, Cpp):
        monkeypatch.setattr(backend, "is_warm", lambda self, problem: False)
    out = clp.log_probs_from_logits(logits, labels)
    assert torch.equal(out, clp.log_probs_from_logits(logits, labels, backend="eager")) and not memory.MEMORY.choices
    with pytest.raises(
        clp.BackendUnavailable, match="cannot compile while a CUDA graph is captured. Call the function once"
    ):
        clp.log_probs_from_logits(logits, labels, backend="compiled")
    with (
        clp.autotune(row_invariant=True),  # of whose backend nothing is known then
        pytest.raises(clp.BackendUnavailable, match="no backend has served .* with row_invariant=True yet"),
    ):
        clp.log_probs_from_logits(logits, labels)


def test_a_named_backend_is_not_replaced_under_a_counter_of_operations():
    logits, labels = inputs()
    with FlopCounterMode(display=False):
        auto = clp.log_probs_from_logits(logits, labels)
        eager = clp.log_probs_from_logits(logits, labels, backend="eager")
        with pytest.raises(clp.BackendUnavailable, match="needs a CUDA or ROCm device"):
            clp.log_probs_from_logits(logits, labels, backend="flash_attn")
        with pytest.raises(clp.InputError, match="0 to 1100"):
            clp.log_probs_from_logits(logits, labels + VOCAB)
    assert torch.equal(auto, eager)


class Tagged(torch.Tensor):
    """A tensor subclass of somebody's."""


def test_a_tensor_subclass():
    logits, labels = inputs()
    out = clp.log_probs_from_logits(logits.detach().as_subclass(Tagged), labels)
    assert torch.equal(torch.Tensor(out), clp.log_probs_from_logits(logits, labels, backend="eager"))


@pytest.mark.parametrize(
    "transform",
    [
        lambda x, y: torch.func.grad(lambda z: clp.log_probs_from_logits(z, y).sum())(x),
        lambda x, y: torch.vmap(clp.log_probs_from_logits)(x, y),
    ],
    ids=["grad", "vmap"],
)
def test_function_transforms_are_refused_in_words(transform):
    with pytest.raises(clp.InputError, match="got logits inside torch.func.grad, vmap or another of its transforms"):
        transform(torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64))
