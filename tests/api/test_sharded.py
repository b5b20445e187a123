"""A vocabulary, a model's parameters or its batch, split over real ranks of gloo.

What they go through is in `tests/helpers/shard_rank.py` and `tests/helpers/fsdp_rank.py`.
"""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import compiled_logprobs as clp
from tests.helpers.host_syncs import without_host_syncs
from tests.helpers.ranks import go_through


@pytest.fixture
def world():
    """Two ranks, of which this is the first; the other says nothing, as if it had no columns."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.slow
def test_four_ranks_and_pairs_of_them_have_the_numbers_of_the_whole(tmp_path):
    go_through("shard_rank", 4, 8, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="without this function too the gradients that torch 2.8 gives on a CPU are not those of the whole",
)
def test_a_model_that_is_sharded_or_replicated_has_the_loss_and_gradients_of_the_whole(tmp_path):
    """By FSDP2 and by DDP, under checkpoints and in place too."""
    go_through("fsdp_rank", 2, 1, tmp_path)


def test_a_graph_is_broken_for_a_split_vocabulary(world):
    """Outside it is the same."""
    labels, leaf = torch.tensor([1, 4, -100]), torch.randn(3, 5, requires_grad=True)
    part = {"group": world, "vocab_start_index": 0, "vocab_size": 5}

    def loss(logits):
        return 2 * clp.log_probs_from_logits(2 * logits, labels, **part)

    def values_and_gradient(function):
        result = function(leaf)
        return result, *torch.autograd.grad(result.sum(), leaf)

    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(values_and_gradient(compiled), values_and_gradient(loss), rtol=0, atol=0)
    weight = torch.randn(5, 5, requires_grad=True)

    def from_hidden(hidden):
        return 2 * clp.log_probs_from_hidden(2 * hidden, weight, labels, softcap=3.0, temperature=0.7, **part)

    compiled = torch.compile(from_hidden, backend="aot_eager")
    torch.testing.assert_close(values_and_gradient(compiled), values_and_gradient(from_hidden), rtol=0, atol=0)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf)


def test_a_split_vocabulary_can_be_captured(world, monkeypatch):
    """As on an accelerator: no value is read there, and no tensor made of the host's numbers."""
    logits, labels = torch.randn(6, 50, requires_grad=True), torch.tensor([3, 49, 0, 7, 20, -100])
    part = {"group": world, "vocab_start_index": 0, "return_entropy": True, "backend": "eager"}

    def step(vocab):
        out, entropy = clp.log_probs_from_logits(logits, labels, vocab_size=vocab, **part)
        return out, entropy, *torch.autograd.grad(out.sum() + entropy.sum(), logits)

    def refuse(*_, **__):
        raise AssertionError("numbers of the host are copied")

    expected = step(50)
    for owner, name in ((torch, "tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, refuse)
    with without_host_syncs():
        results = step(50)
        torn = step(51)  # a column that no rank has
    assert all(map(torch.equal, results, expected))
    assert all(result[:5].isnan().all() for result in torn)


def test_the_gradient_is_not_written_over_a_dtensor(world):
    """Whose version says nothing of that, so that what saved it would compute with the gradient."""
    x, labels = torch.randn(4, 10), torch.tensor([1, 4, 9, -100])

    def gradient(leaf, **options):
        logits = leaf.tanh()  # whose backward reads them
        (found,) = torch.autograd.grad(clp.log_probs_from_logits(logits, labels, **options).sum(), leaf)
        return found

    leaf = DTensor.from_local(x, init_device_mesh("cpu", (2,)), [Replicate()], run_check=False).requires_grad_()
    expected = gradient(x.clone().requires_grad_())
    assert torch.equal(gradient(leaf, inplace_backward=True).to_local(), expected)


def test_a_partial_dtensor_is_told_its_placements(world):
    mesh = init_device_mesh("cpu", (2, 1))
    partial = DTensor.from_local(torch.randn(4, 10), mesh, [Partial(), Shard(1)], run_check=False)
    with pytest.raises(clp.InputError, match=r"redistribute\(placements=\[Replicate\(\), Shard\(dim=1\)\]\) first"):
        clp.log_probs_from_logits(partial, torch.zeros(4, dtype=torch.int64))


def test_one_rank_takes_the_columns_of_a_padded_vocabulary():
    logits, labels = torch.randn(4, 100, requires_grad=True), torch.randint(90, (4,))
    out = clp.log_probs_from_logits(logits, labels, vocab_size=90)
    torch.testing.assert_close(out, clp.log_probs_from_logits(logits[:, :90], labels), rtol=0, atol=0)
    out.sum().backward()
    assert not logits.grad[:, 90:].any() and logits.grad[:, :90].all()
    with pytest.raises(clp.InputError, match=r"labels\[0\] = 95; 0 to 89"):
        clp.log_probs_from_logits(logits, labels.fill_(95), vocab_size=90)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"vocab_size": 101},
            "got vocab_size=101 for logits of 100 columns on one of 1 ranks; an integer from 1 to 100 is",
        ),
        ({"vocab_start_index": 0, "vocab_size": 90}, "got vocab_start_index=0 without group"),
        ({"group": "tp"}, "got group='tp'; a process group of torch.distributed is valid"),
        (
            {"group": distributed.GroupMember.NON_GROUP_MEMBER},
            "NON_GROUP_MEMBER.* Call on the ranks of the group alone",
        ),
    ],
)
def test_what_says_nothing_of_a_split_is_refused(options, words):
    with pytest.raises(clp.InputError, match=words):
        clp.log_probs_from_logits(torch.randn(4, 100), torch.randint(90, (4,)), **options)


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        ([1.0, 2.0], "logits of type list"),
        (torch.tensor(1.0), r"logits of shape \[\]"),
        (torch.ones(2).long(), "int64"),
    ],
)
def test_what_are_no_logits_is_refused_before_their_columns_are_counted(logits, words, world):
    for options in ({"group": world}, {"vocab_size": 2}):
        with pytest.raises(clp.InputError, match=words):
            clp.log_probs_from_logits(logits, torch.tensor(0), **options)
        with pytest.raises(clp.InputError, match=words):
            clp.entropy_from_logits(logits, **options)
