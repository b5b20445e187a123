"""One rank of four, or of two groups of two, that hold parts of a vocabulary: goes through scenarios, and prints what
went wrong in each, as JSON: null, or a traceback.

RANK, WORLD_SIZE and METHOD (where to meet) say which one.
"""

import os
import signal
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

import compiled_logprobs as clp
from compiled_logprobs.operation.reference import reference
from tests.helpers.ranks import report

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
VOCAB, ROWS, TEMPERATURE, SOFTCAP = 1042, 24, 0.7, 1.0
EPS = torch.finfo(torch.float32).eps
BOUND = 32
"""Of an error, in eps(float32) * max(1, |value|): twice what holds for one rank."""


def inputs(
    labels_per_row: int, dtype: torch.dtype, *, vocab: int = VOCAB, special: bool = True
) -> tuple[Tensor, Tensor]:
    """The same on all ranks: whole logits [ROWS, VOCAB] and labels [ROWS, K] below `vocab`, some rows ignored."""
    generator = torch.Generator().manual_seed(7)
    x, half = 3 * torch.randn(ROWS, VOCAB, generator=generator), VOCAB // 2
    y = torch.randint(vocab, (ROWS, labels_per_row), generator=generator)
    y[7], y[8, 0] = -100, -100
    x[9:12] += 1e4
    x[12:15] -= 1e4
    if special:
        x[0] = -torch.inf  # everywhere
        x[1, 3] = torch.nan
        x[2, :half] = -torch.inf  # on the first ranks
        x[3, half:] = -torch.inf
        x[4, :half], x[4, 2] = -torch.inf, torch.nan  # in a part of nothing else but -inf
        x[5, half:], x[5, -1] = -torch.inf, torch.nan
        x[6, 5] = torch.inf
        y[2:4] = half + 10
    return x.to(dtype), y


def bounds(ranks: int, rank: int, kind: str) -> tuple[int, int]:
    """The columns of a rank: equal parts, or 1, 2, ... and the rest, or none on the last rank."""
    width = VOCAB // ranks if VOCAB % ranks == 0 else None
    if kind == "equal" and width:
        return rank * width, (rank + 1) * width
    edges = [0, *(100 * (r + 1) ** 2 for r in range(ranks - 1)), VOCAB]
    if kind == "none on the last":
        edges[-2] = VOCAB
    return edges[rank], edges[rank + 1]


def assert_near(got: Tensor, true: Tensor, what: str, dtype: torch.dtype = torch.float32) -> None:
    got = got.detach().double()
    assert got.shape == true.shape, f"{what}: {got.shape} for {true.shape}"
    assert torch.equal(got.isnan(), true.isnan()), f"{what}: NaN in rows {(got.isnan() != true.isnan()).nonzero()}"
    assert torch.equal(got[got.isinf()], true[got.isinf()]), f"{what}: another infinity"
    error = (got - true).abs()[true.isfinite()]
    limit = (BOUND * EPS + torch.finfo(dtype).eps * (dtype != torch.float32)) * true.abs()[true.isfinite()].clamp(min=1)
    assert bool((error <= limit).all()), f"{what}: off by {float(error.max())}"


def assert_same_on(group: distributed.ProcessGroup, *tensors: Tensor) -> None:
    bits = torch.cat([tensor.detach().flatten().nan_to_num(123.0) for tensor in tensors])
    of_first = bits.clone()
    distributed.broadcast(of_first, group=group, group_src=0)
    assert torch.equal(bits, of_first), "other bits than on the first rank"


def every_result_and_gradient_is_that_of_the_whole() -> None:
    compare("compiled", PAIR, "equal", 1, torch.float32)  # once, since it compiles
    for backend in ("eager", "cpp"):
        for group, kind in ((PAIR, "equal"), (WORLD, "unequal"), (WORLD, "none on the last")):
            for count in (1, 3):
                compare(backend, group, kind, count, torch.float32)
        compare(backend, PAIR, "unequal", 1, torch.bfloat16)
    per_token = torch.linspace(0.5, 2.0, ROWS)
    of_each = ("eager", "cpp")[RANK % 2]
    compare(of_each, WORLD, "unequal", 3, torch.float32, temperature=per_token, ignore_index=5, masked_logits=True)
    compare(of_each, WORLD, "unequal", 1, torch.float16, out_dtype=torch.float16)


def compare(
    backend: str,
    group: distributed.ProcessGroup,
    kind: str,
    count: int,
    dtype: torch.dtype,
    *,
    temperature: float | Tensor = TEMPERATURE,
    ignore_index: int = -100,
    out_dtype: torch.dtype = torch.float32,
    masked_logits: bool = False,
) -> None:
    x, y = inputs(count, dtype)
    y = y.masked_fill(y == -100, ignore_index)
    start, end = bounds(group.size(), group.rank(), kind)
    generator = torch.Generator().manual_seed(1)
    g, h, z = (torch.randn(*shape, generator=generator).to(out_dtype) for shape in ((ROWS, count), (ROWS,), (ROWS,)))
    leaf = x[:, start:end].clone().requires_grad_()
    part = leaf * 1
    before = part.detach().clone()
    where = {} if kind == "equal" else {"vocab_start_index": start, "vocab_size": VOCAB}
    options = {
        "temperature": temperature,
        "masked_logits": masked_logits,
        "out_dtype": out_dtype,
        "backend": backend,
        "group": group,
        **where,
    }
    out = clp.log_probs_from_logits(
        part,
        y,
        ignore_index=ignore_index,
        return_entropy=True,
        return_logsumexp=True,
        return_sum_p_squared=True,
        **options,
    )
    torch.autograd.backward([out.log_probs, out.entropy, out.logsumexp], [g, h, z])
    assert torch.equal(part.nan_to_num(), before.nan_to_num()), "the logits were changed"
    upstream = {"grad_log_probs": g.float(), "grad_entropy": h.float(), "grad_logsumexp": z.float()}
    true = reference(x, y, temperature, ignore_index=ignore_index, **upstream)
    what = f"{backend}, {kind}, {count} labels, {dtype}"
    for name in ("log_probs", "entropy", "logsumexp", "sum_p_squared"):
        assert_near(getattr(out, name), getattr(true, name), f"{name} of {what}", out_dtype)
    if kind == "none on the last":
        counts = (y != ignore_index).any(-1)
        alone = clp.entropy_from_logits(part, **options)
        assert_near(alone[counts], true.entropy[counts], f"entropy alone of {what}")
    assert_near(leaf.grad, true.gradient[:, start:end], f"gradient of {what}", dtype)
    assert_same_on(group, *out)


def from_hidden_states_it_is_that_of_the_whole_too() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, 32, generator=generator)
    weight, bias = 0.5 * torch.randn(VOCAB, 32, generator=generator), torch.randn(VOCAB, generator=generator)
    y = torch.randint(VOCAB, (ROWS, 2), generator=generator)
    y[3:7] = -100
    g, h = torch.randn(ROWS, 2, generator=generator), torch.randn(ROWS, generator=generator)
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = SOFTCAP * torch.tanh(torch.nn.functional.linear(*exact) / SOFTCAP)
    true = reference(logits.detach(), y, TEMPERATURE, grad_log_probs=g, grad_entropy=h)
    of_hidden, of_weight, of_bias = torch.autograd.grad(logits, exact, true.gradient)
    for backend, group, kind in (
        ("chunked_vocab", PAIR, "equal"),
        ("chunked_vocab", PAIR, "none on the last"),
        ("whole", WORLD, "unequal"),
        ("auto", WORLD, "none on the last"),
    ):
        start, end = bounds(group.size(), group.rank(), kind)
        own = [x.clone().requires_grad_() for x in (hidden, weight[start:end], bias[start:end])]
        where = {} if kind == "equal" else {"vocab_start_index": start, "vocab_size": VOCAB}
        out = clp.log_probs_from_hidden(
            *own[:2],
            y,
            bias=own[2],
            temperature=TEMPERATURE,
            softcap=SOFTCAP,
            return_entropy=True,
            backend=backend,
            group=group,
            **where,
        )
        torch.autograd.backward([out.log_probs, out.entropy], [g, h])
        what = f"{backend}, {kind}"
        for name in ("log_probs", "entropy"):
            torch.testing.assert_close(getattr(out, name).double(), getattr(true, name), rtol=1e-5, atol=1e-5, msg=what)
        torch.testing.assert_close(own[0].grad.double(), of_hidden, rtol=1e-5, atol=3e-5)
        torch.testing.assert_close(own[1].grad.double(), of_weight[start:end], rtol=1e-5, atol=3e-5)
        torch.testing.assert_close(own[2].grad.double(), of_bias[start:end], rtol=1e-5, atol=3e-5)
        assert_same_on(group, *out, own[0].grad)


def options_and_no_rows_from_hidden_states_are_those_of_the_whole() -> None:
    """A scale, and half precision by autocast; no label that counts, and none at all; the mean of a loss."""
    generator = torch.Generator().manual_seed(6)
    rows = 80  # more than a chunk
    hidden, weight = torch.randn(rows, 32, generator=generator), torch.randn(VOCAB, 32, generator=generator)
    y = torch.randint(VOCAB, (rows,), generator=generator)
    y[3:7] = -100
    start, end = bounds(RANKS, RANK, "unequal")
    where = {"group": WORLD, "vocab_start_index": start, "vocab_size": VOCAB}

    def check(some: slice, labels: Tensor, rtol: float, **options: object) -> None:
        own, whole = ([x.clone().requires_grad_() for x in (hidden[some], w)] for w in (weight[start:end], weight))
        loss = clp.cross_entropy_from_hidden(*own, labels, **where, **options)
        of_own = torch.autograd.grad(loss, own)
        true = clp.cross_entropy_from_hidden(*whole, labels, **{**options, "backend": "eager"})
        of_hidden, of_weight = torch.autograd.grad(true, whole)
        near = {"rtol": rtol, "atol": rtol * of_weight.abs().max().nan_to_num().item() + 1e-6, "equal_nan": True}
        torch.testing.assert_close((loss, *of_own), (true, of_hidden, of_weight[start:end]), **near)
        assert_same_on(WORLD, loss, of_own[0])

    everything = slice(rows)
    check(everything, y, 1e-5, logit_scale=2.0, softcap=3.0, backend="chunked_64")
    check(everything, y, 1e-5, reduction="sum", temperature=TEMPERATURE, backend=("eager", "chunked_64")[RANK % 2])
    check(everything, torch.full_like(y, -100), 1e-5, reduction="sum", backend="chunked_64")
    check(slice(0), y[:0], 1e-5, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        check(everything, y, 2e-2, backend="whole")


def padding_counts_as_no_column_and_gets_no_gradient() -> None:
    x, y = inputs(1, torch.float32, vocab=1000, special=False)
    start, end = bounds(2, PAIR.rank(), "equal")
    for inplace in (False, True):
        leaf = x[:, start:end].clone().requires_grad_()
        loss = clp.cross_entropy_from_logits(
            leaf * 1, y[:, 0], reduction="sum", group=PAIR, vocab_size=1000, inplace_backward=inplace
        )
        loss.backward()
        true = reference(x[:, :1000], y, grad_log_probs=-torch.ones(ROWS, 1))
        assert_near(loss, -true.log_probs.nan_to_num().sum(), "loss")
        whole = torch.nn.functional.pad(true.gradient, (0, VOCAB - 1000))
        assert_near(leaf.grad, whole[:, start:end], "gradient")


def a_dtensor_says_itself_what_it_holds() -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    x, y = inputs(1, torch.float32, special=False)
    mesh = init_device_mesh("cpu", (RANKS,))
    for placement in (Shard(1), Replicate()):  # 1042 columns over 4 ranks: 261, 261, 261, 259
        logits = distribute_tensor(x, mesh, [placement]).requires_grad_()
        out, entropy = clp.log_probs_from_logits(logits, y[:, 0], return_entropy=True)
        out.sum().backward()
        true = reference(x, y, grad_log_probs=torch.ones(ROWS, 1))
        assert_near(out, true.log_probs[:, 0], f"log_probs of {placement}")
        assert_near(entropy, true.entropy, f"entropy of {placement}")
        assert_near(logits.grad.full_tensor(), true.gradient, f"gradient of {placement}")
    square = init_device_mesh("cpu", (2, 2))
    out = clp.log_probs_from_logits(distribute_tensor(x, square, [Replicate(), Shard(1)]), y[:, 0])
    assert_near(out, true.log_probs[:, 0], "log_probs of two dimensions of a mesh")
    leaf = (x / RANKS).requires_grad_()
    summed = DTensor.from_local(leaf, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    out = clp.log_probs_from_logits(summed, y[:, 0])
    assert_near(out, true.log_probs[:, 0], "log_probs of partial sums")
    both = distribute_tensor(x, square, [Shard(0), Shard(1)])
    raises("to_local.. and the labels.* group=device_mesh.get_group", lambda: clp.entropy_from_logits(both))
    raises(
        "a DTensor with .*Shard.dim=0.*to_local",
        lambda: clp.entropy_from_logits(distribute_tensor(x, mesh, [Shard(0)])),
    )


def nothing_is_sent_but_one_maximum_and_one_sum() -> None:
    x, y = inputs(3, torch.float32)
    start, end = bounds(RANKS, RANK, "unequal")
    sent, real = [], distributed.all_reduce
    where = {"group": WORLD, "vocab_start_index": start, "vocab_size": VOCAB}
    hidden, weight = torch.randn(ROWS, 8).requires_grad_(), torch.randn(end - start, 8)

    def count(tensor: Tensor, op: distributed.ReduceOp.RedOpType, **options: object) -> object:
        sent.append((op, tensor.numel(), tensor.dtype))
        return real(tensor, op, **options)

    distributed.all_reduce = count
    try:
        leaf = x[:, start:end].clone().requires_grad_()
        out = clp.log_probs_from_logits(leaf, y, return_entropy=True, **where)
        out.log_probs.sum().backward()
        clp.log_probs_from_hidden(hidden, weight, y[:, 0].clamp(min=0), **where).sum().backward()
    finally:
        distributed.all_reduce = real
    op, dtype = distributed.ReduceOp, torch.float32
    from_logits = [(op.MAX, ROWS, dtype), (op.SUM, 5 * ROWS + 2, dtype)]
    from_hidden = [(op.MAX, ROWS, dtype), (op.SUM, 2 * ROWS + 2, dtype), (op.SUM, 8 * ROWS, dtype)]
    assert sent == from_logits + from_hidden, sent


def what_does_not_fit_is_an_error_on_all_ranks() -> None:
    x, y = inputs(1, torch.float32, special=False)
    start, end = bounds(RANKS, RANK, "unequal")
    part, y = x[:, start:end], y[:, 0]
    bad = y.clone()
    bad[3] = VOCAB
    whole = {"group": WORLD, "vocab_start_index": start, "vocab_size": VOCAB}
    raises(rf"labels\[3\] = {VOCAB}; 0 to {VOCAB - 1}", lambda: clp.log_probs_from_logits(part, bad, **whole))
    raises("parts of the vocabulary of 1042 columns", lambda: clp.log_probs_from_logits(part, y, group=WORLD))
    overlapping = {**whole, "vocab_start_index": start - 5 * (RANK == 2)}
    raises("parts of the vocabulary that overlap", lambda: clp.log_probs_from_logits(part, y, **overlapping))
    raises("return_argmax=True for", lambda: clp.log_probs_from_logits(part, y, return_argmax=True, **whole))
    alone = [distributed.new_group([rank]) for rank in range(RANKS)][RANK]
    of_one = {"group": alone, "vocab_start_index": 2, "vocab_size": VOCAB}
    raises("vocab_start_index=2 for .* on one of 1 ranks; an", lambda: clp.log_probs_from_logits(x, y, **of_one))
    raises("without vocab_size", lambda: clp.log_probs_from_logits(part, y, group=WORLD, vocab_start_index=start))
    empty = clp.log_probs_from_logits(part[:0].clone().requires_grad_(), y[:0], **whole)
    empty.sum().backward()
    ignored = clp.log_probs_from_logits(part, torch.full_like(y, -100), **whole)
    assert torch.equal(ignored, torch.zeros(ROWS)), ignored


def a_rank_that_raises_keeps_nobody_for_longer_than_the_timeout() -> None:
    group = distributed.new_group([0, 1], timeout=timedelta(seconds=2))
    if RANK > 1:
        return
    x, y = inputs(1, torch.float32, special=False)
    start, end = bounds(2, RANK, "equal")
    if RANK == 1:
        raises(
            "got logits of dtype int64", lambda: clp.log_probs_from_logits(x[:, start:end].long(), y[:, 0], group=group)
        )
        return
    with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out|[Cc]losed|[Rr]eset"):
        clp.log_probs_from_logits(x[:, start:end], y[:, 0], group=group)


def raises(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(clp.InputError, match=words):
        call()


if __name__ == "__main__":
    signal.alarm(200)  # rather than to hang: the test says what is missing
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=RANK, world_size=RANKS, init_method=os.environ["METHOD"])
    WORLD = distributed.group.WORLD
    PAIR = [distributed.new_group([0, 1]), distributed.new_group([2, 3])][RANK // 2]
    report(
        every_result_and_gradient_is_that_of_the_whole,
        padding_counts_as_no_column_and_gets_no_gradient,
        a_dtensor_says_itself_what_it_holds,
        from_hidden_states_it_is_that_of_the_whole_too,
        options_and_no_rows_from_hidden_states_are_those_of_the_whole,
        nothing_is_sent_but_one_maximum_and_one_sum,
        what_does_not_fit_is_an_error_on_all_ranks,
        a_rank_that_raises_keeps_nobody_for_longer_than_the_timeout,
    )
    os._exit(0)
