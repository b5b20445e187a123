"""A vocabulary, a model's parameters or its batch, split over real ranks of gloo.

What they go through is in `tests/helpers/shard_rank.py` and `tests/helpers/fsdp_rank.py`.
"""

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

import compiled_logprobs as clp
from tests.helpers.ranks import go_through


@pytest.mark.slow
def test_four_ranks_and_pairs_of_them_have_the_numbers_of_the_whole(tmp_path):
    go_through("shard_rank", 4, 7, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="without this function too the gradients that torch 2.8 gives on a CPU are not those of the whole",
)
def test_a_model_that_is_sharded_or_replicated_has_the_loss_and_gradients_of_the_whole(tmp_path):
    """By FSDP2 and by DDP, under checkpoints and in place too."""
    go_through("fsdp_rank", 2, 1, tmp_path)


def test_a_graph_is_broken_for_a_split_vocabulary():
    """The other rank says nothing, as if it had no columns; outside it is the same."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        labels, leaf = torch.tensor([1, 4, -100]), torch.randn(3, 5, requires_grad=True)
        part = {"group": distributed.group.WORLD, "vocab_start_index": 0, "vocab_size": 5}

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
    finally:
        distributed.destroy_process_group()


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
