"""Which errors are no backend's own: out of memory, a real one above all, and faults of the device. They set nothing
aside."""

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import compiled_logprobs as clp
from compiled_logprobs.backends import get_backend
from compiled_logprobs.choose import memory
from compiled_logprobs.errors import is_out_of_memory, nothing_can_serve_after
from tests.helpers.stored_decisions import LARGE, decided, measured, publish

LOGITS, LABELS = torch.randn(LARGE.rows, LARGE.vocab), torch.zeros(LARGE.rows, dtype=torch.int64)
PETABYTE = 2**50


def raised(function):
    with pytest.raises(RuntimeError, match="memory") as caught:
        function()
    return caught.value


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def compiler_failed(inner: Exception) -> Exception:
    failed = BackendCompilerFailed.__new__(BackendCompilerFailed)  # whose arguments change from one torch to the next
    failed.inner_exception = inner
    return failed


class UnprintableError(RuntimeError):
    def __str__(self):
        raise ValueError("no words for it")


ROUND = ValueError("a")


OUT_OF_MEMORY = {
    "memory of the CPU, for real": raised(lambda: torch.empty(PETABYTE, dtype=torch.uint8)),
    "memory of Python": MemoryError(),
    "memory of CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "memory of Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "memory as the cause": caused(ValueError("it did not work"), MemoryError()),
    "memory in the compiler": compiler_failed(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    ),
    "memory in the compiler's cause": compiler_failed(caused(ValueError("no"), torch.OutOfMemoryError("no"))),
}
FAULTS = {
    "fault of torch": getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access was met"),
    "fault of Triton": RuntimeError("Triton Error [CUDA]: misaligned address"),
    "fault of ROCm": RuntimeError("HIP error: an illegal memory access was encountered"),
    "fault in the compiler": compiler_failed(RuntimeError("CUDA error: device-side assert triggered")),
}
OWN = {
    "plain": RuntimeError("it broke"),
    "of another kind": ValueError("out of memory is what this sentence is about, and CUDA error: too"),
    "unprintable": UnprintableError(),
    "going round": caused(ROUND, caused(ValueError("b"), ROUND)),
}
ALL = OUT_OF_MEMORY | FAULTS | OWN


@pytest.mark.parametrize("name", ALL)
def test_out_of_memory_and_faults_of_the_device_are_told_from_a_backends_own(name):
    assert is_out_of_memory(ALL[name]) == (name in OUT_OF_MEMORY)
    assert nothing_can_serve_after(ALL[name]) == (name not in OWN)


@pytest.fixture
def winner(mode, monkeypatch):
    """A backend that a profile has chosen, to be broken."""
    mode("lookup")
    publish(decided(chosen="cpp", candidates={"eager": measured("eager"), "cpp": measured("cpp")}))
    for other in ({"needs_grad": True}, {"rows": 2 * LARGE.rows}):
        publish(decided(LARGE._replace(**other), "cpp"))
    backend = get_backend("cpp")

    def breaks(step: str, error: Exception) -> None:
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(backend, step, fail)

    return breaks


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [MemoryError(), FAULTS["fault of Triton"]], ids=["memory", "fault"])
def test_what_is_no_backends_own_is_raised_as_it_is_and_sets_nothing_aside(winner, error):
    winner("forward", error)
    with pytest.raises(type(error)) as caught:
        clp.log_probs_from_logits(LOGITS, LABELS)
    assert caught.value is error and not memory.MEMORY.failures(LARGE)
    assert clp.explain(LOGITS, LABELS).backend == "cpp"


def test_what_backward_raises_is_raised_as_it_is_and_sets_nothing_aside(winner):
    error = RuntimeError("the gradient is in pieces")
    winner("backward", error)
    logits = LOGITS.clone().requires_grad_()
    result = clp.log_probs_from_logits(logits, LABELS)
    with pytest.raises(RuntimeError, match="the gradient is in pieces") as caught:
        result.sum().backward()
    assert caught.value is error and logits.grad is None
    assert not memory.MEMORY.set_aside
    assert clp.explain(logits, LABELS).backend == "cpp"


def test_a_failure_is_one_warning_and_eager_serves(winner):
    winner("forward", RuntimeError("the driver is gone"))
    with pytest.warns(RuntimeWarning, match="the driver is gone\neager serves the call") as warned:
        log_probs = clp.log_probs_from_logits(LOGITS, LABELS)
    assert len(warned) == 1 and torch.equal(log_probs, clp.log_probs_from_logits(LOGITS, LABELS, backend="eager"))
    assert clp.explain(LOGITS, LABELS).backend == "eager"


@pytest.mark.filterwarnings("error")
def test_where_warnings_are_errors_the_call_is_served_all_the_same(winner, capsys):
    winner("forward", RuntimeError("the driver is gone"))
    clp.log_probs_from_logits(LOGITS, LABELS)
    clp.log_probs_from_logits(LOGITS.repeat(2, 1), LABELS.repeat(2))  # of another bucket, where it fails, too
    assert len(memory.MEMORY.set_aside) == 2
    assert capsys.readouterr().err.count("the driver is gone\neager serves the call") == 1
