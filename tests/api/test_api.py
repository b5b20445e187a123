"""The public functions: results, options, errors, and what they leave alone."""

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.operation.contract import Inputs, Wanted, clean, finish
from compiled_logprobs.operation.reference import reference

VOCAB = 257
each_backend = pytest.mark.parametrize("backend", ["eager", "cpp", pytest.param("compiled", marks=pytest.mark.slow)])


def problem(*rows: int, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, k: int | None = None):
    """Logits and labels. What is compiled for one test serves others that ask for the same vocabulary, dtype and k."""
    logits = (3 * torch.randn(*rows, vocab)).to(dtype)
    labels = torch.randint(vocab, rows if k is None else (*rows, k))
    return logits, labels


def assert_near(computed, true, atol=1e-5):
    torch.testing.assert_close(computed.double(), true, atol=atol, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32_or_have_the_dtype_that_is_asked_for(dtype):
    logits, labels = problem(2, 5, dtype=dtype)
    out = clp.log_probs_from_logits(logits, labels)
    assert out.shape == (2, 5) and out.dtype == torch.float32
    assert_near(out, reference(logits, labels[..., None]).log_probs[..., 0], 5e-6)
    assert torch.equal(out, clp.log_probs_from_logits(logits, labels.int()))
    assert torch.equal(out.to(dtype), clp.log_probs_from_logits(logits, labels, out_dtype=None))


SHAPES = {"a sequence": (2, 1), "a token": (2, 5), "a position": (5,), "one": ()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_k_labels_a_row_the_entropy_and_temperatures(shape):
    logits, labels = problem(2, 5, k=3)
    temperature = torch.rand(shape) + 0.5
    result = clp.log_probs_from_logits(logits, labels, return_entropy=True, temperature=temperature)
    assert isinstance(result, clp.LogProbs)
    true = reference(logits, labels, temperature.expand(2, 5))
    assert result.log_probs.shape == (2, 5, 3) and result.entropy.shape == (2, 5)
    assert_near(result.log_probs, true.log_probs)
    assert_near(result.entropy, true.entropy)


def test_float64_is_computed_in_float64_by_eager():
    logits, labels = problem(3, dtype=torch.float64)
    logits.requires_grad_()
    out = clp.log_probs_from_logits(logits, labels, out_dtype=None)
    assert out.dtype == torch.float64
    true = reference(logits, labels[:, None], grad_log_probs=torch.ones(3, 1))
    assert_near(out, true.log_probs[:, 0], 1e-13)
    assert_near(torch.autograd.grad(out.sum(), logits)[0], true.gradient, 1e-13)
    with pytest.raises(clp.BackendUnavailable, match="computes in float32; float64 logits are for eager"):
        clp.log_probs_from_logits(logits, labels, backend="compiled")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_minus_the_log_probability(reduction, dtype):
    logits, labels = problem(6, dtype=dtype)
    labels[2] = -100
    logits.requires_grad_()
    ours = clp.cross_entropy_from_logits(logits, labels, reduction=reduction)
    torchs = torch.nn.functional.cross_entropy(logits.float(), labels, reduction=reduction)
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (ours, torchs)))
    assert (ours >= 0).all() and not torch.signbit(ours).any()


def test_reductions_of_ignored_labels_alone_and_unknown_ones():
    logits, _ = problem(3)
    labels = torch.full((3,), -100)
    assert clp.cross_entropy_from_logits(logits, labels).isnan()
    assert clp.cross_entropy_from_logits(logits, labels, reduction="sum") == 0
    with pytest.raises(clp.InputError, match="got reduction='avg'; 'mean', 'sum' or 'none' is valid."):
        clp.cross_entropy_from_logits(logits, labels, reduction="avg")


def test_the_entropy_alone_and_one_token_alone():
    logits, _ = problem(2, 3)
    logits.requires_grad_()
    out = clp.entropy_from_logits(logits, temperature=2.0)
    p = torch.distributions.Categorical(logits=logits / 2.0)
    torch.testing.assert_close(out, p.entropy())
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (out, p.entropy()))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    token = clp.log_probs_from_logits(logits[0, 0], torch.tensor(4))  # without leading dimensions
    torch.testing.assert_close(token, logits[0, 0].log_softmax(-1)[4])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_no_rows_still_carry_a_gradient_function(shape):
    logits = torch.randn(*shape, VOCAB, requires_grad=True)
    out, entropy = clp.log_probs_from_logits(logits, torch.zeros(shape, dtype=torch.int64), return_entropy=True)
    assert out.shape == shape and entropy.shape == shape and out.grad_fn is not None
    (out.sum() + entropy.sum()).backward()
    assert logits.grad.shape == logits.shape


def test_what_is_finished_is_never_a_positive_log_probability_or_a_negative_entropy():
    labels, m = torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4)
    log_probs = torch.tensor([[1.0], [torch.nan], [-1.0], [1e-7]])  # as rounding may have it
    inputs, wanted = Inputs(torch.zeros(4, 2), labels, 1.0, -100), Wanted(entropy=True)
    results = finish(clean(inputs), wanted, log_probs, m, m, entropy=-log_probs.squeeze(-1).abs())
    assert results.log_probs.isnan()[:, 0].tolist() == results.entropy.isnan().tolist() == [False, True, False, False]
    assert not (results.log_probs > 0).any() and not (results.entropy < 0).any()


VIEWS = {
    "slice of positions": lambda: torch.randn(3, 6, VOCAB)[:, :-1],
    "expanded batch": lambda: torch.randn(1, 6, VOCAB).expand(3, 6, VOCAB),
    "only said to be negated": lambda: torch._neg_view(torch.randn(6, VOCAB)),
}


@each_backend
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_taken_as_they_are(backend, view):
    """tests/api/test_contract.py has many more."""
    logits = VIEWS[view]().detach().requires_grad_()
    labels = torch.randint(VOCAB, logits.shape[:-1])
    out = clp.log_probs_from_logits(logits, labels, backend=backend)
    g = torch.randn(out.shape)
    true = reference(logits.resolve_neg(), labels[..., None], grad_log_probs=g[..., None])
    assert_near(out, true.log_probs[..., 0])
    assert_near(torch.autograd.grad(out, logits, g)[0], true.gradient)


def test_named_backends_run_or_raise():
    logits, labels = problem(2, vocab=256)
    with pytest.raises(clp.BackendUnavailable) as error:
        clp.log_probs_from_logits(logits, labels, backend="flash_attn")
    assert str(error.value) == (
        "backend 'flash_attn' cannot run 2 x 256 float32 on cpu: needs a CUDA or ROCm device.\n"
        "Backends that can: cpp, compiled, eager. Name one of them, or use backend='auto'."
    )
    with pytest.raises(
        clp.BackendUnavailable,
        match="backend 'fastest' is unknown. Registered: cpp, compiled, triton, flash_attn, eager",
    ):
        clp.log_probs_from_logits(logits, labels, backend="fastest")


def wrong_calls():
    x, y = torch.randn(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64)
    bad, negative, leaf = y.clone(), torch.ones(2, 5), x.clone().requires_grad_()
    bad[1, 2], negative[0, 3] = 9999, -1.0
    in_place = "got inplace_backward=True for logits that are a leaf (or a view of one) and require a gradient"
    return {
        "logits of another type": ([1.0], y, {}, "got logits of type list; a torch.Tensor [..., V] is valid."),
        "integer logits": (
            *(x.long(), y, {}),
            "got logits of dtype int64; float32, bfloat16, float16, float64 are valid. Convert them, e.g. "
            "logits.float().",
        ),
        "sparse logits": (
            x.to_sparse(),
            y,
            {},
            "got logits of layout torch.sparse_coo; torch.strided is valid. Use logits",
        ),
        "no vocabulary": (x[..., :0], y, {}, "got logits of shape [2, 5, 0]; [..., V] with a vocabulary V"),
        "a number as logits": (x[0, 0, 0], y, {}, "got logits of shape []; [..., V] with a vocabulary V"),
        "labels of another type": (x, 3, {}, "got labels of type int; a torch.Tensor of integers is valid."),
        "float labels": (x, y.float(), {}, "labels of dtype float32; int64 and int32 are valid. Use labels.long()."),
        "labels of another shape": (
            *(x, y[:, :-1], {}),
            "labels of shape [2, 4] for logits of shape [2, 5, 7]; [2, 5] and [2, 5, K] are valid. Shift or slice",
        ),
        "no labels a row": (
            x,
            y[..., None][..., :0],
            {},
            "got labels of shape [2, 5, 0] for logits of shape [2, 5, 7]",
        ),
        "labels elsewhere": (x, y.to("meta"), {}, "got labels on meta and logits on cpu; one device is valid."),
        "label out of range": (
            *(x, bad, {}),
            "got labels[1, 2] = 9999; 0 to 6 (the vocabulary has 7) and ignore_index=-100 are valid. "
            "Correct it, or mark positions that do not count with ignore_index.",
        ),
        "ignore_index": (x, y, {"ignore_index": 1.5}, "got ignore_index=1.5; an integer of 64 bits is valid, e.g."),
        "a switch as ignore_index": (x, y, {"ignore_index": True}, "got ignore_index=True; an integer of 64 bits is"),
        "temperature 0": (x, y, {"temperature": 0.0}, "got temperature=0.0; a number from 1.18e-38 to 3.4e+38"),
        "temperature NaN": (x, y, {"temperature": float("nan")}, "got temperature=nan; a number from"),
        "temperature as text": (x, y, {"temperature": "hot"}, "got temperature='hot'; a number from"),
        "temperatures elsewhere": (
            *(x, y, {"temperature": torch.ones(2, 5, device="meta")}),
            "got a temperature tensor on meta and logits on cpu; one device is valid. Use temperature.to('cpu')",
        ),
        "temperatures of integers": (x, y, {"temperature": y}, "got a temperature tensor of dtype int64; a floating"),
        "temperatures with a gradient": (
            *(x, y, {"temperature": leaf[..., 0]}),
            "requires a gradient; it gets none. Pass temperature.detach()",
        ),
        "temperatures of another shape": (
            *(x, y, {"temperature": torch.ones(2)}),
            "got a temperature tensor of shape [2] for logits of shape [2, 5, 7]; a shape broadcastable to [2, 5] is "
            "valid (one temperature a token). For one a sequence use temperature.unsqueeze(-1).",
        ),
        "a bad temperature": (x, y, {"temperature": negative}, "got temperature[0, 3] = -1; numbers from 1.18e-38"),
        "out_dtype": (x, y, {"out_dtype": torch.int64}, "got out_dtype=torch.int64; torch.float32, torch.bfloat16"),
        "leaf in place": (leaf, y, {"inplace_backward": True}, in_place),
        "view of a leaf in place": (leaf[:, :], y, {"inplace_backward": True}, in_place),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_bad_input_is_answered_with_what_was_got_what_is_valid_and_what_to_do(name):
    logits, labels, options, message = wrong_calls()[name]
    with pytest.raises(clp.InputError) as error:
        clp.log_probs_from_logits(logits, labels, **options)
    assert message in str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, clp.LogProbsError)


def test_double_backward_is_refused_inside_backward():
    logits, labels = problem(3)
    logits.requires_grad_()
    out = clp.log_probs_from_logits(logits, labels)
    with pytest.raises(clp.LogProbsError, match="double backward .* is not differentiable itself"):
        torch.autograd.grad(out.sum(), logits, create_graph=True)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_gradient_is_the_gradient_in_the_memory_of_the_logits(backend, dtype):
    """And the positions between the slices stay as they are."""
    leaf, labels = problem(2, 4, dtype=dtype)
    leaf.requires_grad_()
    shifted = labels[:, 1:]
    expected = clp.log_probs_from_logits((leaf * 2)[:, :-1], shifted, backend=backend).sum()
    (expected,) = torch.autograd.grad(expected, leaf)
    whole = leaf * 2
    kept, logits, seen = whole.detach().clone(), whole[:, :-1], []
    version = logits._version
    logits.register_hook(seen.append)
    clp.log_probs_from_logits(logits, shifted, inplace_backward=True, backend=backend).sum().backward()
    assert seen[0].data_ptr() == logits.data_ptr() and logits._version > version
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(whole[:, -1], kept[:, -1]) and not torch.equal(whole[:, 0], kept[:, 0])


def test_whoever_saved_the_logits_hears_of_an_in_place_gradient():
    leaf, labels = problem(3)
    leaf.requires_grad_()
    logits = leaf * 1.0
    other = (logits * logits).sum()  # saves the logits
    out = clp.log_probs_from_logits(logits, labels, inplace_backward=True).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with pytest.raises(clp.LogProbsError, match="Set inplace_backward=False where backward runs more than once"):
        out.backward()


def test_logits_changed_before_backward_raise():
    leaf, labels = problem(3)
    leaf.requires_grad_()
    logits = leaf * 1.0
    out = clp.log_probs_from_logits(logits, labels)
    logits.div_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_overlapping_memory_takes_the_ordinary_path():
    leaf = torch.randn(1, VOCAB, requires_grad=True)
    labels = torch.randint(VOCAB, (4,))
    logits = (leaf * 1.0).expand(4, VOCAB)
    kept = logits.detach().clone()
    clp.log_probs_from_logits(logits, labels, inplace_backward=True).sum().backward()
    assert torch.equal(logits, kept)
    true = reference(logits, labels[:, None], grad_log_probs=torch.ones(4, 1)).gradient.sum(0, keepdim=True)
    assert_near(leaf.grad, true)
