"""The public functions: results, options, errors, and what they leave alone."""

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.operation.reference import reference

ALL = ("eager", "cpp", "compiled")


def problem(*rows: int, vocab: int = 257, dtype: torch.dtype = torch.float32, k: int | None = None):
    logits = (3 * torch.randn(*rows, vocab)).to(dtype)
    labels = torch.randint(vocab, rows if k is None else (*rows, k))
    return logits, labels


@pytest.mark.parametrize("backend", ALL)
def test_log_probs_agree_with_float64(backend):
    logits, labels = problem(2, 5)
    out = clp.log_probs_from_logits(logits, labels, backend=backend)
    assert out.shape == (2, 5) and out.dtype == torch.float32
    assert (out <= 0).all()
    torch.testing.assert_close(out.double(), reference(logits, labels[..., None]).log_probs[..., 0], atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_k_labels_a_row_and_entropy(backend):
    logits, labels = problem(2, 5, k=3)
    labels[0, 0] = labels[0, 0, 0]  # repeats
    result = clp.log_probs_from_logits(logits, labels, return_entropy=True, temperature=0.7, backend=backend)
    assert isinstance(result, clp.LogProbs)
    true = reference(logits, labels, 0.7)
    assert result.log_probs.shape == (2, 5, 3) and result.entropy.shape == (2, 5)
    torch.testing.assert_close(result.log_probs.double(), true.log_probs, atol=5e-6, rtol=0)
    torch.testing.assert_close(result.entropy.double(), true.entropy, atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_out_dtype_none_is_that_of_the_logits(backend, dtype):
    logits, labels = problem(3, dtype=dtype)
    assert clp.log_probs_from_logits(logits, labels, backend=backend).dtype == torch.float32
    assert clp.log_probs_from_logits(logits, labels, backend=backend, out_dtype=None).dtype == dtype


def test_float64_is_computed_in_float64_by_eager():
    logits, labels = problem(3, dtype=torch.float64)
    logits.requires_grad_()
    out = clp.log_probs_from_logits(logits, labels, out_dtype=None)
    assert out.dtype == torch.float64
    true = reference(logits, labels[:, None], grad_log_probs=torch.ones(3, 1))
    torch.testing.assert_close(out, true.log_probs[:, 0], atol=1e-13, rtol=0)
    (gradient,) = torch.autograd.grad(out.sum(), logits)
    torch.testing.assert_close(gradient, true.gradient, atol=1e-13, rtol=0)
    with pytest.raises(clp.BackendUnavailable, match="computes in float32; float64 logits are for eager"):
        clp.log_probs_from_logits(logits, labels, backend="compiled")


def test_one_token_without_leading_dimensions():
    logits = torch.randn(11)
    out = clp.log_probs_from_logits(logits, torch.tensor(4))
    assert out.shape == ()
    torch.testing.assert_close(out, logits.log_softmax(-1)[4])


def test_int32_labels():
    logits, labels = problem(4)
    one = clp.log_probs_from_logits(logits, labels.int())
    assert torch.equal(one, clp.log_probs_from_logits(logits, labels))


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


def test_the_mean_over_ignored_labels_alone_is_nan():
    logits, _ = problem(3)
    labels = torch.full((3,), -100)
    assert clp.cross_entropy_from_logits(logits, labels).isnan()
    assert clp.cross_entropy_from_logits(logits, labels, reduction="sum") == 0


def test_entropy_alone():
    logits, _ = problem(2, 3)
    logits.requires_grad_()
    out = clp.entropy_from_logits(logits, temperature=2.0)
    p = torch.distributions.Categorical(logits=logits / 2.0)
    torch.testing.assert_close(out, p.entropy())
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (out, p.entropy()))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ALL)
def test_a_temperature_a_token(backend):
    logits, labels = problem(2, 3)
    for temperature in (torch.tensor([[0.5], [2.0]]), torch.rand(2, 3) + 0.5, torch.tensor(0.7), torch.rand(3) + 0.5):
        out = clp.log_probs_from_logits(logits, labels, temperature=temperature, backend=backend)
        true = reference(logits, labels[..., None], temperature.expand(2, 3)).log_probs[..., 0]
        torch.testing.assert_close(out.double(), true, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_no_rows_still_carry_a_gradient_function(backend, shape):
    logits = torch.randn(*shape, 7, requires_grad=True)
    out, entropy = clp.log_probs_from_logits(
        logits, torch.zeros(shape, dtype=torch.int64), return_entropy=True, backend=backend
    )
    assert out.shape == shape and entropy.shape == shape and out.grad_fn is not None
    (out.sum() + entropy.sum()).backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("backend", ALL)
def test_ignored_rows_are_exactly_zero_whatever_they_hold(backend):
    logits, labels = problem(4)
    logits[1] = torch.nan
    logits[2] = torch.inf
    labels[1:3] = -7
    logits.requires_grad_()
    out, entropy = clp.log_probs_from_logits(logits, labels, ignore_index=-7, return_entropy=True, backend=backend)
    assert (out[1:3] == 0).all() and (entropy[1:3] == 0).all() and not out.isnan().any()
    (gradient,) = torch.autograd.grad(out.sum() + entropy.sum(), logits)
    assert (gradient[1:3] == 0).all() and not gradient.isnan().any()


def test_entropy_is_ignored_only_where_all_labels_are():
    logits, labels = problem(2, k=2)
    labels[0, 1] = labels[1, 0] = labels[1, 1] = -100
    out, entropy = clp.log_probs_from_logits(logits, labels, return_entropy=True)
    assert out[0, 1] == 0 and out[0, 0] < 0 and entropy[0] > 0 and entropy[1] == 0


@pytest.mark.parametrize("backend", ALL)
def test_views_are_taken_as_they_are(backend):
    """The commonest slice in RL, padded rows, an expanded batch, and a transposed one, which is copied."""
    base = torch.randn(3, 6, 257)
    padded = torch.randn(6, 300)[:, :257]
    swapped = torch.randn(257, 6).t()
    for logits in (base[:, :-1], base[:, 1:], padded, base[:, -1:], base[:1].expand(3, 6, 257), swapped):
        logits = logits.detach().requires_grad_()
        labels = torch.randint(257, logits.shape[:-1])
        out = clp.log_probs_from_logits(logits, labels, backend=backend)
        g = torch.randn(out.shape)
        true = reference(logits, labels[..., None], grad_log_probs=g[..., None])
        torch.testing.assert_close(out.double(), true.log_probs[..., 0], atol=1e-5, rtol=0)
        (gradient,) = torch.autograd.grad(out, logits, g)
        torch.testing.assert_close(gradient.double(), true.gradient, atol=1e-5, rtol=0)


def test_named_backends_run_or_raise():
    logits, labels = problem(2, vocab=256)
    with pytest.raises(clp.BackendUnavailable) as error:
        clp.log_probs_from_logits(logits, labels, backend="flash_attn")
    assert str(error.value) == (
        "backend 'flash_attn' cannot run 2 x 256 float32 on cpu: needs a CUDA or ROCm device.\n"
        "Backends that can: cpp, compiled, eager. Name one of them, or use backend='auto'."
    )
    with pytest.raises(
        clp.BackendUnavailable, match="backend 'fastest' is unknown. Registered: cpp, compiled, flash_attn, eager"
    ):
        clp.log_probs_from_logits(logits, labels, backend="fastest")


# --- errors -----------------------------------------------------------------------------------------------------------


def wrong_calls():
    x, y = torch.randn(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64)
    bad = y.clone()
    bad[1, 2] = 9999
    negative = torch.ones(2, 5)
    negative[0, 3] = -1.0
    return {
        "logits of another type": (([1.0], y), {}, "got logits of type list; a torch.Tensor [..., V] is valid."),
        "integer logits": (
            (x.long(), y),
            {},
            "got logits of dtype int64; float32, bfloat16, float16, float64 are valid. Convert them, e.g. logits.float().",
        ),
        "no vocabulary": ((torch.randn(2, 5, 0), y), {}, "got logits of shape [2, 5, 0]; [..., V] with a vocabulary V"),
        "a number as logits": ((torch.tensor(1.0), y), {}, "got logits of shape []; [..., V] with a vocabulary V"),
        "labels of another type": ((x, 3), {}, "got labels of type int; a torch.Tensor of integers is valid."),
        "float labels": (
            (x, y.float()),
            {},
            "got labels of dtype float32; int64 and int32 are valid. Use labels.long().",
        ),
        "labels of another shape": (
            (x, y[:, :-1]),
            {},
            "got labels of shape [2, 4] for logits of shape [2, 5, 7]; [2, 5] and [2, 5, K] are valid. Shift or slice",
        ),
        "no labels a row": (
            (x, y[..., None][..., :0]),
            {},
            "got labels of shape [2, 5, 0] for logits of shape [2, 5, 7]",
        ),
        "labels elsewhere": ((x, y.to("meta")), {}, "got labels on meta and logits on cpu; one device is valid."),
        "label out of range": (
            (x, bad),
            {},
            "got labels[1, 2] = 9999; 0 to 6 (the vocabulary has 7) and ignore_index=-100 are valid. "
            "Correct it, or mark positions that do not count with ignore_index.",
        ),
        "ignore_index": (
            (x, y),
            {"ignore_index": 1.5},
            "got ignore_index=1.5; an integer of 64 bits is valid, e.g. -100.",
        ),
        "temperature 0": ((x, y), {"temperature": 0.0}, "got temperature=0.0; a number from 1.18e-38 to 3.4e+38"),
        "temperature < 0": ((x, y), {"temperature": -1}, "got temperature=-1; a number from"),
        "temperature NaN": ((x, y), {"temperature": float("nan")}, "got temperature=nan; a number from"),
        "temperature as text": ((x, y), {"temperature": "hot"}, "got temperature='hot'; a number from"),
        "temperature tensor of integers": (
            (x, y),
            {"temperature": y},
            "got a temperature tensor of dtype int64; a floating dtype is valid.",
        ),
        "temperature tensor with a gradient": (
            (x, y),
            {"temperature": torch.ones(2, 5, requires_grad=True)},
            "got a temperature tensor that requires a gradient; only logits get one. Pass temperature.detach()",
        ),
        "temperature tensor of another shape": (
            (x, y),
            {"temperature": torch.ones(2)},
            "got a temperature tensor of shape [2] for logits of shape [2, 5, 7]; a shape broadcastable to [2, 5] is valid "
            "(one temperature a token). For one a sequence use temperature.unsqueeze(-1).",
        ),
        "temperature tensor with a bad value": (
            (x, y),
            {"temperature": negative},
            "got temperature[0, 3] = -1; numbers from 1.18e-38 to 3.4e+38 are valid.",
        ),
        "temperature tensor elsewhere": (
            (x, y),
            {"temperature": torch.ones(2, 5, device="meta")},
            "got a temperature tensor on meta and logits on cpu; one device is valid.",
        ),
        "out_dtype": ((x, y), {"out_dtype": torch.int64}, "got out_dtype=torch.int64; torch.float32, torch.bfloat16"),
        "leaf in place": (
            (x.clone().requires_grad_(), y),
            {"inplace_backward": True},
            "got inplace_backward=True for logits that are a leaf (or a view of one) and require a gradient",
        ),
        "view of a leaf in place": (
            (x.clone().requires_grad_()[:, :], y),
            {"inplace_backward": True},
            "got inplace_backward=True for logits that are a leaf (or a view of one) and require a gradient",
        ),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_bad_input_is_answered_with_what_was_got_what_is_valid_and_what_to_do(name):
    arguments, options, message = wrong_calls()[name]
    with pytest.raises(clp.InputError) as error:
        clp.log_probs_from_logits(*arguments, **options)
    assert message in str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, clp.LogProbsError)


def test_an_unknown_reduction():
    with pytest.raises(clp.InputError, match="got reduction='avg'; 'mean', 'sum' or 'none' is valid."):
        clp.cross_entropy_from_logits(*problem(2), reduction="avg")


# --- gradients and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ALL)
def test_logits_and_labels_keep_every_bit(backend):
    logits, labels = problem(4, dtype=torch.bfloat16)
    kept, kept_labels = logits.clone(), labels.clone()
    logits.requires_grad_()
    out, entropy = clp.log_probs_from_logits(logits, labels, return_entropy=True, temperature=0.5, backend=backend)
    version = logits._version
    (out.sum() + entropy.sum()).backward()
    assert torch.equal(logits, kept) and torch.equal(labels, kept_labels) and logits._version == version


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("through", ["log_probs", "entropy", "both"])
def test_gradients_come_from_either_result(backend, through):
    logits, labels = problem(3)
    logits.requires_grad_()
    out, entropy = clp.log_probs_from_logits(logits, labels, return_entropy=True, temperature=1.5, backend=backend)
    g = torch.randn(3) if through != "entropy" else None
    h = torch.randn(3) if through != "log_probs" else None
    loss = (0 if g is None else (out * g).sum()) + (0 if h is None else (entropy * h).sum())
    (gradient,) = torch.autograd.grad(loss, logits)
    true = reference(logits, labels[:, None], 1.5, grad_log_probs=None if g is None else g[:, None], grad_entropy=h)
    torch.testing.assert_close(gradient.double(), true.gradient, atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_double_backward_is_refused_inside_backward(backend):
    logits, labels = problem(3)
    logits.requires_grad_()
    out = clp.log_probs_from_logits(logits, labels, backend=backend)
    with pytest.raises(clp.LogProbsError, match="double backward .* is not differentiable itself"):
        torch.autograd.grad(out.sum(), logits, create_graph=True)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_gradient_is_the_gradient_in_the_memory_of_the_logits(backend, dtype):
    leaf, labels = problem(2, 4, dtype=dtype)
    leaf.requires_grad_()
    ordinary = torch.autograd.grad(clp.log_probs_from_logits(leaf * 2, labels, backend=backend).sum(), leaf)[0]
    logits = leaf * 2
    address, version = logits.data_ptr(), logits._version
    seen = []
    logits.register_hook(seen.append)
    clp.log_probs_from_logits(logits, labels, inplace_backward=True, backend=backend).sum().backward()
    assert seen[0].data_ptr() == address and logits._version > version
    assert torch.equal(leaf.grad, ordinary)


@pytest.mark.parametrize("backend", ALL)
def test_in_place_leaves_the_positions_between_the_slices_alone(backend):
    leaf, labels = problem(2, 5)
    leaf.requires_grad_()
    whole = leaf * 1.0
    kept = whole.detach().clone()
    clp.log_probs_from_logits(whole[:, :-1], labels[:, :-1], inplace_backward=True, backend=backend).sum().backward()
    assert torch.equal(whole[:, -1], kept[:, -1]) and not torch.equal(whole[:, 0], kept[:, 0])


@pytest.mark.parametrize("backend", ALL)
def test_whoever_saved_the_logits_hears_of_an_in_place_gradient(backend):
    leaf, labels = problem(3)
    leaf.requires_grad_()
    logits = leaf * 1.0
    other = (logits * logits).sum()  # saves the logits
    clp.log_probs_from_logits(logits, labels, inplace_backward=True, backend=backend).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("backend", ALL)
def test_a_second_in_place_backward_names_the_remedy(backend):
    leaf, labels = problem(3)
    leaf.requires_grad_()
    out = clp.log_probs_from_logits(leaf * 1.0, labels, inplace_backward=True, backend=backend).sum()
    out.backward(retain_graph=True)
    with pytest.raises(clp.LogProbsError, match="Set inplace_backward=False where backward runs more than once"):
        out.backward()


def test_a_second_ordinary_backward_gives_the_same_gradient():
    logits, labels = problem(3)
    logits.requires_grad_()
    out = clp.log_probs_from_logits(logits, labels).sum()
    first, second = (torch.autograd.grad(out, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_logits_changed_before_backward_raise():
    leaf, labels = problem(3)
    leaf.requires_grad_()
    logits = leaf * 1.0
    out = clp.log_probs_from_logits(logits, labels)
    logits.div_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ALL)
def test_overlapping_memory_takes_the_ordinary_path(backend):
    leaf = torch.randn(1, 7, requires_grad=True)
    labels = torch.randint(7, (4,))
    logits = (leaf * 1.0).expand(4, 7)
    kept = logits.detach().clone()
    clp.log_probs_from_logits(logits, labels, inplace_backward=True, backend=backend).sum().backward()
    assert torch.equal(logits, kept)
    true = reference(logits, labels[:, None], grad_log_probs=torch.ones(4, 1)).gradient.sum(0, keepdim=True)
    torch.testing.assert_close(leaf.grad.double(), true, atol=1e-5, rtol=0)


# --- values that are not looked at --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ALL)
def test_an_invalid_row_is_nan_where_no_value_is_looked_at(backend):
    """`compute` never looks at values, as on an accelerator; the CPU check comes before it."""
    from compiled_logprobs.backends import get_backend
    from compiled_logprobs.operation.autograd import compute

    logits, labels = problem(5, k=2)
    labels[1, 0], labels[2, 1] = 257, -1
    labels[4] = -100
    temperature = torch.tensor([1.0, 1.0, 1.0, -2.0, 0.0])
    logits.requires_grad_()
    out, entropy = compute(get_backend(backend), logits, labels, temperature, entropy=True)
    assert out.isnan().any(-1).tolist() == [False, True, True, True, False]
    assert entropy.isnan().tolist() == [False, True, True, True, False]
    (gradient,) = torch.autograd.grad(out.sum() + entropy.sum(), logits)
    assert gradient.isnan().all(-1).tolist() == [False, True, True, True, False]
    assert not gradient[[0, 4]].isnan().any() and (gradient[4] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_minus_infinite_logits_count_as_in_float64(backend):
    logits, _ = problem(4)
    logits[0, :100] = -torch.inf
    logits[1, 5] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    labels = torch.tensor([[7, 200], [5, 6], [0, 1], [0, 1]])
    logits.requires_grad_()
    out, entropy = clp.log_probs_from_logits(logits, labels, return_entropy=True, masked_logits=True, backend=backend)
    assert out[0, 0] == -torch.inf and out[0, 1].isfinite() and out[1, 0] == -torch.inf
    assert out[2].isnan().all() and entropy[2].isnan()
    assert out[3].tolist() == [0.0, -torch.inf] and entropy[3] == 0
    h = 3 * torch.ones(4)  # large enough to overflow a probability of 0 times the most negative float32
    g = torch.ones(4, 2)
    (gradient,) = torch.autograd.grad([out, entropy], logits, [g, h])
    true = reference(logits, labels, grad_log_probs=g, grad_entropy=h).gradient
    torch.testing.assert_close(gradient.double(), true, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("labels_per_row", [None, 3])
def test_labels_and_temperatures_may_lie_in_memory_as_they_like(backend, labels_per_row):
    """Megatron's [s, b] seen as [b, s]: nothing is contiguous, and backends may go by pointers."""
    many = () if labels_per_row is None else (labels_per_row,)
    leaf = torch.randn(9, 4, 50, requires_grad=True)
    labels = torch.randint(50, (*many, 9, 4)).permute(*((2, 1, 0) if many else (1, 0)))
    temperature = (torch.rand(9, 4) + 0.5).T
    upstream = torch.randn(*many, 9, 4).permute(*((2, 1, 0) if many else (1, 0)))
    logits = leaf.transpose(0, 1)
    out, entropy = clp.log_probs_from_logits(
        logits, labels, temperature=temperature, return_entropy=True, backend=backend
    )
    (gradient,) = torch.autograd.grad([out, entropy], logits, [upstream, upstream.reshape(4, 9, -1)[..., 0]])
    true = reference(
        logits.detach(),
        labels if many else labels.unsqueeze(-1),
        temperature,
        grad_log_probs=upstream if many else upstream.unsqueeze(-1),
        grad_entropy=upstream.reshape(4, 9, -1)[..., 0],
    )
    torch.testing.assert_close(out.double(), true.log_probs if many else true.log_probs[..., 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), true.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient.double(), true.gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_a_view_that_only_says_that_it_is_negated(backend):
    logits, labels = torch.randn(5, 31), torch.randint(31, (5,))
    out = clp.log_probs_from_logits(torch._neg_view(logits), labels, backend=backend)
    assert torch.equal(out, clp.log_probs_from_logits(-logits, labels, backend=backend))
