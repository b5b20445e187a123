"""One rank of two that train a small model by FSDP2 and by DDP: prints what went wrong, as JSON: null, or a traceback.

RANK, WORLD_SIZE and METHOD (where to meet) say which one.
"""

import json
import os
import signal
import traceback
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import compiled_logprobs as clp

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ROWS, HIDDEN, VOCAB = 32, 16, 1042


class Model(nn.Module):
    """The loss of [B, T] tokens, each with the label of the next: embedding, a layer, a head, of which the weight alone
    is used `from_hidden`."""

    def __init__(self, backend: str, checkpoints: bool, inplace: bool, from_hidden: bool = False) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.how, self.checkpoints = {"backend": backend, "inplace_backward": inplace}, checkpoints
        self.from_hidden = from_hidden

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self.from_hidden:
            out = clp.log_probs_from_hidden(
                hidden[:, :-1], self.head.weight, labels[:, 1:], temperature=0.7, return_entropy=True
            )
            return out.log_probs + 0.1 * out.entropy
        logits = self.head(hidden)[:, :-1]
        out = clp.log_probs_from_logits(logits, labels[:, 1:], temperature=0.7, return_entropy=True, **self.how)
        return out.log_probs + 0.1 * out.entropy

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.layer(self.embedding(tokens)))
        if self.checkpoints:
            return checkpoint(self.losses, hidden, tokens, use_reentrant=False).mean()
        return self.losses(hidden, tokens).mean()


def loss_and_gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    loss = model(tokens)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [loss.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients)]


def shard(model: Model) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (model.layer, model) if model.from_hidden else (model.layer, model.head, model):
        fully_shard(module, mesh=mesh)  # a head that is not called itself is gathered with what calls
    return model


def compare(spread: Callable[[Model], nn.Module], *options: str | bool, compiles: bool = False) -> None:
    """Each rank has its part of the batch; the mean over the ranks is what one process has for all of it."""
    torch.manual_seed(0)
    whole, part, tokens = Model(*options), Model(*options), torch.randint(VOCAB, (2 * RANKS, ROWS))
    part.load_state_dict(whole.state_dict())
    model = spread(part)
    if compiles:
        whole.compile(fullgraph=True, backend="aot_eager")
        model.compile(backend="aot_eager")
    expected = loss_and_gradients(whole, tokens)
    got = loss_and_gradients(model, tokens[2 * RANK : 2 * RANK + 2])
    distributed.all_reduce(got[0])
    got[0] /= RANKS
    for a, b in zip(got, expected, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


if __name__ == "__main__":
    signal.alarm(100)  # rather than to hang
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=RANK, world_size=RANKS, init_method=os.environ["METHOD"])
    try:
        for options in product(("auto", "eager"), (False, True), (False, True)):
            compare(shard, *options)
            compare(DistributedDataParallel, *options)
        for checkpoints, compiles in product((False, True), (False, True)):
            compare(shard, "auto", checkpoints, False, True, compiles=compiles)
        failure = None
    except Exception:  # noqa: BLE001  whatever it is, it is printed
        failure = traceback.format_exc()
    print(json.dumps({"FSDP2 and DDP": failure}), flush=True)
    os._exit(0)
