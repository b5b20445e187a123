"""What surrounds the kernel of a small call: which operations of torch it takes, and that values are looked at last."""

import pytest
import torch
from torch.autograd.profiler import profile, record_function

import compiled_logprobs as clp
from compiled_logprobs.backends.eager import Eager

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's profiler takes it
LOGITS, LABELS = torch.randn(6, 33), torch.randint(33, (6, 1))


@pytest.fixture
def kernels(monkeypatch):
    """Marks where the kernels begin and end, which run as ever."""

    def marked(direction):
        kernel = getattr(Eager, direction)

        def call(*arguments, **options):
            with record_function(direction):
                return kernel(*arguments, **options)

        monkeypatch.setattr(Eager, direction, call)

    marked("forward")
    marked("backward")
    monkeypatch.setattr("compiled_logprobs.choose.rule.built_in_for", lambda problem: ["eager"])  # whatever is ready


def operations(call) -> list[str]:
    """The operations of torch outside of the kernels, and where these come in."""
    call()  # from now on the choice is remembered
    with profile() as events:
        call()
    named, over = [], 0
    for event in sorted(events.function_events, key=lambda event: event.time_range.start):
        if event.time_range.start >= over and event.name.startswith(("aten::", "forward", "backward")):
            named.append(event.name.removeprefix("aten::"))
            over = event.time_range.end
    return named


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_before_the_kernel_nothing_is_computed_and_afterwards_one_sum(backend, kernels):
    after = ["sum", "item"]

    def call(labels=LABELS):
        return clp.log_probs_from_logits(LOGITS, labels, backend=backend)

    assert operations(call) == ["forward", *after]
    flat = LABELS.flatten()
    assert operations(lambda: call(labels=flat)) == ["reshape", "forward", "resize_", *after]


def test_with_a_gradient_nothing_but_the_graph_is_added(kernels):
    logits, upstream = LOGITS.clone().requires_grad_(), torch.rand(6, 1)

    def call():
        torch.autograd.grad(clp.log_probs_from_logits(logits, LABELS), logits, upstream)

    assert operations(call) == ["detach", "forward", "detach", "sum", "item", "backward"]


def test_values_are_looked_at_only_where_a_result_is_nan(monkeypatch):
    looked = []
    monkeypatch.setattr("compiled_logprobs.api.functions.check_values", lambda *_: looked.append(1))
    logits, labels = LOGITS.clone(), LABELS.clone()
    logits[0, 1] = -torch.inf
    labels[0] = 1
    labels[1] = -100
    assert clp.log_probs_from_logits(logits, labels)[:2].tolist() == [[-torch.inf], [0.0]] and not looked
    labels[2] = 33
    assert clp.log_probs_from_logits(logits, labels)[2].isnan() and looked == [1]


def test_logits_that_are_nan_are_no_error_and_a_temperature_counts_where_a_label_does():
    logits, labels = LOGITS.clone(), LABELS[:, 0].clone()
    logits[3] = torch.nan
    labels[1] = -100
    temperature = torch.ones(6)
    temperature[1] = -1.0
    out = clp.log_probs_from_logits(logits, labels, temperature=temperature)
    assert out.isnan().tolist() == [False, False, False, True, False, False] and out[1] == 0
    temperature[4] = 0.0
    with pytest.raises(clp.InputError, match=r"got temperature\[4\] = 0; numbers from 1.18e-38"):
        clp.log_probs_from_logits(logits, labels, temperature=temperature)
    with pytest.raises(clp.InputError, match=r"got temperature\[0\] = -1; numbers"):
        clp.log_probs_from_logits(logits, labels, temperature=torch.tensor([-1.0]))
    with pytest.raises(clp.InputError, match=r"got temperature = -1; numbers"):
        clp.entropy_from_logits(logits[:3], temperature=torch.tensor(-1.0))


def test_forward_mode_derivatives_are_refused():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(LOGITS, torch.ones_like(LOGITS))
        with pytest.raises(Exception, match="jvp"):
            clp.log_probs_from_logits(dual, LABELS)
