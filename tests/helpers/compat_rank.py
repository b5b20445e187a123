"""One of two ranks that call the functions of `compat` with their columns of the logits, or their part of the tokens.

The truth is the statement of each original (`compat_originals.py`) of the whole, in float64. RANK, WORLD_SIZE and
METHOD (where to meet) say which rank this is.
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from compiled_logprobs.compat import liger, nemo_rl, slime, torchtitan
from compiled_logprobs.errors import InputError
from tests.helpers.compat_originals import ORIGINALS
from tests.helpers.ranks import report

RANK = int(os.environ["RANK"])
B, S, VOCAB = 2, 9, 34
T, COLUMNS = B * S, VOCAB // 2
BOUNDS = (RANK * COLUMNS, (RANK + 1) * COLUMNS)
EPS = torch.finfo(torch.float32).eps

_generator = torch.Generator().manual_seed(3)
X = 4 * torch.randn(B, S, VOCAB, generator=_generator)
TOKENS = torch.randint(VOCAB, (B, S), generator=_generator)
SOME_IGNORED = TOKENS.masked_fill(torch.rand(B, S, generator=_generator) < 0.3, -100)
KEEP = torch.rand(T, VOCAB, generator=_generator) < 0.4
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0, 0, 1]])
CUTS = torch.tensor([0, 8, 8, 12, T - 2])
"""Of packed sequences, of which one is empty, and of padding behind them."""


def slime_of(f: Callable[..., Any], x: Tensor, group: Any, keep: bool, entropy: bool = True) -> Any:
    """slime's own names; each rank passes its part of the mask."""
    mask = KEEP[:, slice(*BOUNDS) if x.shape[-1] == COLUMNS else slice(None)] if keep else None
    return f(x.flatten(0, 1), TOKENS.flatten(), group, entropy, log_prob_keep_mask=mask)


def padded(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return f(TOKENS, MASK, x.flatten(0, 1)[: int(MASK.sum())], 4)


def packed(f: Callable[..., Tensor], x: Tensor, group: Any, bounds: tuple[int, int], **options: Any) -> Tensor:
    return f(x.view(1, T, -1), TOKENS.view(1, T), CUTS, 7, *bounds, group, **options)


CALLS: dict[str, Callable[[Callable[..., Any], Tensor, Any, tuple[int, int]], Any]] = {
    "areal.gather_logprobs": lambda f, x, group, bounds: f(x, TOKENS, 0.7, group),
    "areal.gather_logprobs_entropy": lambda f, x, group, bounds: f(x, TOKENS, 0.7, group),
    "slime.calculate_log_probs_and_entropy": lambda f, x, group, bounds: slime_of(f, x, group, False),
    "slime.calculate_log_probs_and_entropy of all": lambda f, x, group, bounds: slime_of(f, x, None, False),
    "slime.calculate_log_probs_and_entropy with a mask": lambda f, x, group, bounds: slime_of(f, x, group, True),
    "nemo_rl.get_next_token_logprobs_from_logits": lambda f, x, group, bounds: f(TOKENS, x, None, RANK, group),
    "nemo_rl.from_parallel_logits_to_logprobs": lambda f, x, group, bounds: f(x, TOKENS, *bounds, group),
    "nemo_rl.from_parallel_logits_to_logprobs_packed_sequences": lambda f, x, group, bounds: packed(
        f, x, group, bounds
    ),
    "nemo_rl.DistributedLogprob.apply": lambda f, x, group, bounds: f(x, TOKENS, *bounds, group, False),
    "nemo_rl.ChunkedDistributedLogprob.apply": lambda f, x, group, bounds: f(x, TOKENS, *bounds, 4, group, False),
    "nemo_rl.ChunkedDistributedEntropy.apply": lambda f, x, group, bounds: f(x, 4, group),
    "skyrl.from_parallel_logits_to_logprobs": lambda f, x, group, bounds: f(x, TOKENS, *bounds, group),
    "skyrl.from_parallel_logits_to_logprobs_packed_sequences": lambda f, x, group, bounds: packed(
        f, x, group, bounds, sub_seq_lengths=[[7, 0], [4, 3]]
    ),
    "skyrl.vocab_parallel_entropy": lambda f, x, group, bounds: f(x),
    "verl.vocab_parallel_log_probs_from_logits": lambda f, x, group, bounds: f(x, SOME_IGNORED),
    "verl.vocab_parallel_log_probs_from_logits_response_rmpad": lambda f, x, group, bounds: padded(f, x),
    "verl.vocab_parallel_entropy": lambda f, x, group, bounds: f(x),
    "verl.vocab_parallel_entropy_with_chunking": lambda f, x, group, bounds: f(x),
    "verl.vocab_parallel_sum_pi_squared": lambda f, x, group, bounds: f(x),
    "roll.vocab_parallel_logprobs": lambda f, x, group, bounds: f(x, TOKENS),
    "roll.vocab_parallel_entropy": lambda f, x, group, bounds: f(x),
    "megatron.vocab_parallel_cross_entropy": lambda f, x, group, bounds: f(x, SOME_IGNORED),
    "megatron.fused_vocab_parallel_cross_entropy": lambda f, x, group, bounds: f(x, SOME_IGNORED, group),
    "torchtitan.compute_logprobs": lambda f, x, group, bounds: f(x, SOME_IGNORED, return_entropy=True),
    "torchtitan.cross_entropy_loss": lambda f, x, group, bounds: f(x.flatten(0, 1), SOME_IGNORED.flatten()),
}


def ours(name: str) -> Callable[..., Any]:
    module, *names = name.split()[0].split(".")
    return reduce(getattr, names, import_module(f"compiled_logprobs.compat.{module}"))


def each_has_the_numbers_of_the_whole_vocabulary() -> None:
    for name, call in CALLS.items():
        local, whole = X[..., slice(*BOUNDS)].clone().requires_grad_(), X.double().requires_grad_()
        got = call(ours(name), local * 1, distributed.group.WORLD, BOUNDS)
        compare(name, got, call(ORIGINALS[name.split()[0]], whole, None, (0, VOCAB)), local, whole, slice(*BOUNDS))
    local, whole = X[..., slice(*BOUNDS)].clone().requires_grad_(), X.double().requires_grad_()
    got = liger.LigerVocabParallelCrossEntropy()(local, SOME_IGNORED, distributed.group.WORLD)
    compare("liger", got, ORIGINALS["megatron.vocab_parallel_cross_entropy"](whole, SOME_IGNORED), local, whole)


def compare(name: str, got: Any, true: Any, leaf: Tensor, whole: Tensor, part: Any = slice(*BOUNDS)) -> None:
    """Values on each rank, the same bits on both, and the gradient of this rank's `part` of the last dimension."""
    got, true = (list(results) if isinstance(results, tuple) else [results] for results in (got, true))
    generator, pairs = torch.Generator().manual_seed(5), []
    for ours, theirs in zip(got, true, strict=True):
        error = (ours.detach().double() - theirs.detach()).abs() / theirs.detach().abs().clamp(min=1)
        assert ours.shape == theirs.shape and ours.dtype == torch.float32, name
        assert float(error.max()) < 64 * EPS, f"{name}: off by {float(error.max())}"
        of_first = ours.detach().clone()
        distributed.broadcast(of_first, 0)
        assert torch.equal(of_first, ours), f"{name}: other bits than on the first rank"
        assert ours.requires_grad == theirs.requires_grad, name
        if ours.requires_grad:
            pairs.append((ours, theirs, torch.randn(theirs.shape, generator=generator)))
    if pairs:
        torch.autograd.backward([ours for ours, _, _ in pairs], [g for *_, g in pairs])
        torch.autograd.backward([theirs for _, theirs, _ in pairs], [g.double() for *_, g in pairs])
        error = (leaf.grad - whole.grad[..., part]).abs()
        assert float(error.max()) < 256 * EPS, f"{name}: a gradient off by {float(error.max())}"


def each_has_the_numbers_of_the_whole_weight() -> None:
    """Hidden states' gradients add up to the whole, or are those of this rank's part of the sequence."""
    group, width = distributed.group.WORLD, 16
    h, w = torch.randn(B, S + 1, width, generator=_generator), torch.randn(width, VOCAB, generator=_generator)
    labels = torch.randint(VOCAB, (B, S + 1), generator=_generator)
    mine = slice(5 * RANK, 5 * RANK + 5)

    def verl(f: Callable[..., Any], h: Tensor, w: Tensor, group: Any, bounds: tuple[int, int]) -> Any:
        return f(h, w.T, labels, 0.7, "none", group)

    def skyrl(f: Callable[..., Any], h: Tensor, w: Tensor, group: Any, bounds: tuple[int, int]) -> Any:
        return f(h, w.T, labels, *bounds, group, temperature=0.7)

    def nemo(f: Callable[..., Any], h: Tensor, w: Tensor, group: Any, bounds: tuple[int, int]) -> Any:
        return f(h.transpose(0, 1), w.T, False, labels, *bounds, group)

    for name, call in {
        "verl.linear_cross_entropy": verl,
        "skyrl.from_parallel_hidden_to_logprobs": skyrl,
        "nemo_rl.from_parallel_hidden_states_to_logprobs": nemo,
    }.items():
        is_split = call is nemo
        states = (h[:, mine] if is_split else h).clone().requires_grad_()
        local, whole = w[:, slice(*BOUNDS)].clone().requires_grad_(), w.double().requires_grad_()
        exact = h.double().requires_grad_()
        got, true = (
            call(ours(name), states, local, group, BOUNDS),
            call(ORIGINALS[name], exact, whole, None, (0, VOCAB)),
        )
        compare(name, got, true, local, whole)
        of_hidden = states.grad.clone()
        if not is_split:
            distributed.all_reduce(of_hidden)
        expected = exact.grad[:, mine] if is_split else exact.grad
        torch.testing.assert_close(of_hidden.double(), expected, rtol=1e-5, atol=1e-5, msg=name)
    with pytest.raises(InputError, match="a cp_group of 2 ranks; None or"):
        nemo_rl.from_parallel_hidden_states_to_logprobs(h, w.T, False, labels, 0, VOCAB, None, cp_group=group)


def slimes_none_is_all_ranks() -> None:
    full = torch.tensor([[1, 2, 3, 4, 0.5, -1]])
    log_probs, entropy = slime.calculate_log_probs_and_entropy(
        full[:, 3 * RANK : 3 * RANK + 3], torch.tensor([1]), None, with_entropy=True
    )
    torch.testing.assert_close(log_probs, torch.tensor([[-2.4637]]), rtol=0, atol=5e-5)
    torch.testing.assert_close(entropy, torch.tensor([1.0469]), rtol=0, atol=5e-5)


def context_parallel_ranks_have_two_pieces_of_each_sequence() -> None:
    """All tokens' numbers on each rank, of whole columns; the gradients of both are added up for this rank's tokens."""
    world, pieces = distributed.group.WORLD, [RANK, 3 - RANK]

    def pick(rows: Tensor, length: int) -> Tensor:
        return torch.cat([rows.unflatten(1, (4, length // 4))[:, piece] for piece in pieces], dim=1)

    tokens = TOKENS[:, :7]  # one fewer than there are positions
    cases = {
        "nemo_rl.from_parallel_logits_to_logprobs": (tokens, [8]),
        "skyrl.from_parallel_logits_to_logprobs": (tokens, [8]),
        "nemo_rl.from_parallel_logits_to_logprobs_packed_sequences": (TOKENS.view(1, T)[:, :16], [8, 0, 4, 4]),
        "skyrl.from_parallel_logits_to_logprobs_packed_sequences": (TOKENS.view(1, T)[:, :16], [8, 0, 4, 4]),
    }
    states, head = X[:, :8], torch.eye(VOCAB)
    of_rank, of_all = pick(states, 8).requires_grad_(), states.double().requires_grad_()
    name = "skyrl.from_parallel_hidden_to_logprobs"
    got = ours(name)(of_rank, head, tokens, 0, VOCAB, None, cp_group=world)
    true = ORIGINALS[name](of_all, head.double(), tokens, 0, VOCAB, None)
    assert float((got - true).abs().max()) < 64 * EPS * 20, name
    got.sum().backward()
    true.sum().backward()
    assert float((of_rank.grad - 2 * pick(of_all.grad, 8)).abs().max()) < 256 * EPS, name
    for name, (labels, lengths) in cases.items():
        x = X[:, :8] if len(lengths) == 1 else X.view(1, T, VOCAB)[:, :16]
        local = torch.cat([pick(part, part.shape[1]) for part in x.split(lengths, 1) if part.shape[1]], 1)
        local, whole = local.requires_grad_(), x.double().requires_grad_()
        starts = torch.tensor([0, *lengths]).cumsum(0)
        more = () if len(lengths) == 1 else (starts, 7)
        got = ours(name)(local, labels, *more, 0, VOCAB, None, cp_group=world)
        true = ORIGINALS[name](whole[:, : labels.shape[1]], labels, *more, 0, VOCAB, None)
        whole.retain_grad()
        upstream = torch.randn(true.shape, generator=torch.Generator().manual_seed(5))
        assert float((got - true).abs().max()) < 64 * EPS * 20, name
        got.backward(upstream)
        true.backward(upstream.double())
        grads = [pick(part, part.shape[1]) for part in whole.grad.split(lengths, 1) if part.shape[1]]
        assert float((local.grad - 2 * torch.cat(grads, 1)).abs().max()) < 256 * EPS, name
        pre_rolled = "nemo_rl" in name and len(lengths) > 1
        if pre_rolled:
            rolled = [pick(part.roll(-1, 1), part.shape[1]) for part in labels.split(lengths, 1) if part.shape[1]]
            again = ours(name)(
                local, torch.cat(rolled, 1), *more, 0, VOCAB, None, cp_group=world, target_is_pre_rolled=True
            )
            assert torch.equal(again, got), name


def torchtitan_has_unequal_columns() -> None:
    """18 of 35, and 17, as a DTensor and as a plain part."""
    labels, name = SOME_IGNORED.flatten(), "torchtitan.compute_logprobs"
    x = torch.nn.functional.pad(X, (0, 1)).flatten(0, 1)
    mine = slice(18 * RANK, 18 + 17 * RANK)
    logits, whole = distribute_tensor(x, MESH, [Shard(1)]).requires_grad_(), x.double().requires_grad_()
    local = logits.to_local()
    local.retain_grad()
    again = DTensor.from_local(local, MESH, [Shard(1)], run_check=False, shape=x.shape, stride=x.stride())
    true = ORIGINALS[name](whole, labels, return_entropy=True)
    compare(name, torchtitan.compute_logprobs(again, labels, return_entropy=True), true, local, whole, mine)
    loss = torchtitan.cross_entropy_loss(x[:, mine], labels, global_vocab_size=VOCAB + 1)
    torch.testing.assert_close(loss.double(), -true[0].sum().detach())


if __name__ == "__main__":
    signal.alarm(200)  # rather than to hang: the test says what is missing
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=RANK, world_size=2, init_method=os.environ["METHOD"])
    MESH = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sys.modules["megatron.core.parallel_state"] = SimpleNamespace(
        model_parallel_is_initialized=lambda: True, get_tensor_model_parallel_group=lambda: distributed.group.WORLD
    )
    sys.modules["torchtitan.distributed.utils"] = SimpleNamespace(get_spmd_backend=lambda: "spmd_types")
    sys.modules["torchtitan.distributed.spmd_types"] = SimpleNamespace(
        spmd_mesh_size={"tp": 2}.__getitem__, current_spmd_mesh=lambda: MESH
    )
    report(
        each_has_the_numbers_of_the_whole_vocabulary,
        each_has_the_numbers_of_the_whole_weight,
        slimes_none_is_all_ranks,
        context_parallel_ranks_have_two_pieces_of_each_sequence,
        torchtitan_has_unequal_columns,
    )
    os._exit(0)
