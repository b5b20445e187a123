"""A policy-gradient step from hidden states, beside the same step from logits: memory and gradients.

python -m examples.from_hidden    # a few seconds on a CPU, from a checkout

The head has 32000 tokens, and half of the positions are prompts, whose rows are left out. Both steps start from the
same numbers. Their memory is what the process takes at its peak beside what it had before, gradients included, in a
second step: the first one loads and checks backends. Nothing is measured to choose them, which would take a minute.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from compiled_logprobs import autotune, log_probs_from_hidden
from compiled_logprobs.machine.clock import MIB, extra_peak_bytes

ROWS, HIDDEN, VOCAB = 2048, 128, 32_000
Step = Callable[[Tensor, nn.Linear, Tensor], Tensor]
LIMIT = 32 * MIB
"""What log_probs_from_hidden may take beside arguments, results and gradients."""


def from_logits(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """As it is often written."""
    log_p: Tensor = head(hidden).log_softmax(-1)
    return log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == -100, 0.0)


def from_hidden(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Without the logits."""
    with autotune("off"):
        log_probs = log_probs_from_hidden(hidden, head.weight, labels, memory_limit=LIMIT)
    assert isinstance(log_probs, Tensor)  # as no other result was asked for
    return log_probs


def main() -> None:
    """Take both steps, print what each took, and how far apart their gradients are."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(HIDDEN, VOCAB, bias=False), torch.randn(ROWS, HIDDEN)
    labels, advantages = torch.randint(VOCAB, (ROWS,)), torch.randn(ROWS)
    labels[::2] = -100
    gradients: list[tuple[Tensor, Tensor]] = []

    def run(step: Step, state: Tensor) -> None:
        head.weight.grad = state.grad = None
        loss = -(advantages * step(state, head, labels)).sum() / ROWS
        loss.backward()  # type: ignore[no-untyped-call]  # torch's gap

    for step in (from_hidden, from_logits):
        state = hidden.clone().requires_grad_()
        run(step, state)
        head.weight.grad = state.grad = None
        took = extra_peak_bytes(partial(run, step, state), "cpu")
        assert head.weight.grad is not None and state.grad is not None
        gradients.append((state.grad, head.weight.grad))
        print(f"{step.__name__}: {'unknown here' if took is None else f'{took / MIB:.0f} MiB'} at the peak")
    logits = ROWS * VOCAB * 4 / MIB
    apart = [((mine - plain).norm() / plain.norm()).item() for mine, plain in zip(*gradients, strict=True)]
    print(f"the logits alone: {logits:.0f} MiB; gradients apart by {max(apart):.1e} of their size")


if __name__ == "__main__":
    main()
