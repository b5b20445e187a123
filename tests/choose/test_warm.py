"""`warm`: the next call, and a capture, find ready what serves them, and nothing was measured."""

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.api import call
from compiled_logprobs.backends import get_backend
from compiled_logprobs.backends.compiled import Compiled
from compiled_logprobs.backends.cpp import Cpp
from compiled_logprobs.choose import auto, memory, rule, tune
from compiled_logprobs.operation.contract import Upstream
from tests.helpers.stored_decisions import CPU, LARGE, chosen, decided, publish

pytestmark = pytest.mark.usefixtures("elsewhere")
WITH_GRADIENT = LARGE._replace(needs_grad=True)


@pytest.fixture
def runs(monkeypatch, checks, mode) -> list[str | Upstream]:
    """What cpp was run for: it has to compile forward and backward, and notes which it has."""
    mode("tune")
    monkeypatch.setattr(tune, "Tuner", lambda *_, **__: pytest.fail("it measured"))
    seen: list[str | Upstream] = []
    forward, backward = Cpp.forward, Cpp.backward

    def noted_forward(self, inputs, wanted):
        seen.append("forward")
        return forward(self, inputs, wanted)

    def noted_backward(self, inputs, stats, upstream, *, inplace):
        seen.append(upstream)
        return backward(self, inputs, stats, upstream, inplace=inplace)

    def is_warm(self, problem):
        return "forward" in seen and (not problem.needs_grad or len(seen) > 1)

    for name, method in {"forward": noted_forward, "backward": noted_backward, "is_warm": is_warm}.items():
        monkeypatch.setattr(Cpp, name, method)
    return seen


@pytest.mark.parametrize("problem", [LARGE, WITH_GRADIENT], ids=["forward", "gradient"])
def test_the_next_call_and_a_capture_find_it_ready(problem, runs, monkeypatch):
    assert clp.warm(problem) == {problem: "cpp"}
    assert get_backend("cpp").is_warm(problem)
    count = len(runs)
    monkeypatch.setattr(rule, "context_of", lambda *_: pytest.fail("it chose anew"))
    logits = torch.randn(LARGE.rows, LARGE.vocab, requires_grad=problem.needs_grad)
    clp.log_probs_from_logits(logits, torch.zeros(LARGE.rows, dtype=torch.int64))
    assert len(runs) == count + 1
    monkeypatch.setattr(auto, "is_capturing", lambda problem: True)
    labels = torch.zeros(LARGE.rows, dtype=torch.int64)
    monkeypatch.setattr(rule, "check_backend", lambda *_, **__: pytest.fail("it checked"))
    out = clp.log_probs_from_logits(logits, labels)
    if problem.needs_grad:
        out.sum().backward()
    else:
        with torch.inference_mode():
            assert torch.equal(clp.log_probs_from_logits(logits + 0, labels + 0), out)
    assert runs[count + 1] == "forward" and len(runs) == count + 3


def test_every_way_for_a_gradient_to_come_is_run(runs):
    problem = WITH_GRADIENT._replace(entropy=True, temperature="per_token", labels_per_row=2, out_dtype=torch.bfloat16)
    slices = problem._replace(layout="slice", inplace_backward=True, entropy=False, temperature="number")
    with torch.inference_mode():
        assert clp.warm([problem, slices]) == {problem: "cpp", slices: "cpp"}
    alone, both, *at_the_other_start, in_slices, _ = (upstream for upstream in runs if upstream != "forward")
    assert len(at_the_other_start) == 2
    assert alone.entropy is None and both.entropy.shape == (problem.rows,)
    assert in_slices.log_probs.shape == (2, problem.rows // 2, 2)


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_rows_that_are_not_aligned_are_run_at_every_start_and_then_a_capture_finds_them_ready(
    backend, runs, monkeypatch
):
    """Also of a backend that does not say so, since where the logits start is not told by a problem."""
    starts = []
    noted = Cpp.forward

    def note_start(self, inputs, wanted):
        starts.append(inputs.logits.data_ptr() % 16)
        return noted(self, inputs, wanted)

    monkeypatch.setattr(Cpp, "is_warm", lambda self, problem: False)
    monkeypatch.setattr(Cpp, "forward", note_start)
    problems = [WITH_GRADIENT, WITH_GRADIENT._replace(layout="rows")]
    clp.warm(problems, backend=backend)
    assert starts == [0, 4] * 2
    for module in (auto, call):
        monkeypatch.setattr(module, "is_capturing", lambda problem: True)
    labels, logits = torch.zeros(LARGE.rows, dtype=torch.int64), torch.randn(LARGE.rows, LARGE.vocab + 1)
    of_rows = logits[:, 1:].requires_grad_()
    clp.log_probs_from_logits(of_rows.contiguous(), labels, backend=backend).sum().backward()
    with pytest.raises(clp.BackendUnavailable, match="has not run .* Call warm"):
        clp.log_probs_from_logits(of_rows, labels, backend=backend)  # whose strides may be any


def test_what_is_stored_or_named_is_what_is_run(runs):
    publish(decided(chosen="eager"))
    assert clp.warm(LARGE) == {LARGE: "eager"} and not runs
    assert clp.warm(LARGE, backend="cpp") == {LARGE: "cpp"} and set(runs) == {"forward"}
    with pytest.raises(clp.BackendUnavailable, match="needs a CUDA or ROCm device"):
        clp.warm(LARGE, backend="flash_attn")


def test_what_was_not_measured_serves_until_it_is(runs):
    clp.warm(LARGE)
    assert chosen() == ("cpp", "default rule")
    assert "warm(...) does not measure" in str(memory.MEMORY.choices)
    memory.MEMORY.hold(LARGE, memory.Choice("eager", "tuned here", decided()))
    assert chosen() == ("eager", "tuned here")


def test_one_of_several_ranks_warms_itself(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert clp.warm([LARGE], device=CPU) == {LARGE: "cpp"}


def test_where_it_fails_eager_is_ready(runs, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Cpp, "forward", fails)
    with pytest.warns(RuntimeWarning, match="backend 'cpp' failed on .* and is set aside"):
        assert clp.warm(WITH_GRADIENT) == {WITH_GRADIENT: "eager"}


def test_a_capture_is_too_late(monkeypatch):
    monkeypatch.setattr("compiled_logprobs.choose.warm.is_capturing", lambda problem: True)
    with pytest.raises(clp.LogProbsError, match=r"warm\(1024 x 1031 float32 on cpu\) would run .* before the capture"):
        clp.warm(LARGE)
    with pytest.raises(clp.InputError, match="problems and devices of types"):
        clp.warm(LARGE, device="meta")


@pytest.mark.slow
def test_what_has_to_be_compiled_is(monkeypatch):
    monkeypatch.setattr(Cpp, "why_not", lambda self, problem: "not now")
    problem = WITH_GRADIENT._replace(vocab=1033)
    assert clp.warm(problem) == {problem: "compiled"}
    assert get_backend("compiled").is_warm(problem) and isinstance(get_backend("compiled"), Compiled)
