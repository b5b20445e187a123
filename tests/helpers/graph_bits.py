"""A call inside a user's graph beside the same call outside, and what torch says of the operators."""

from typing import Any

import torch

from compiled_logprobs import log_probs_from_logits


def check_in_a_graph(backend: str, vocab: int, **options: Any) -> None:
    """`backend` has the same bits inside as outside, of values and gradient, whole and sliced."""

    def call(hidden: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        whole = log_probs_from_logits(hidden * 2, labels, temperature=0.7, backend=backend, **options)
        part = log_probs_from_logits((hidden * 2)[:, :-1], labels[:, 1:], backend=backend, **options)
        return [*whole, *part] if options else [whole, part]

    hidden, labels = torch.randn(2, 3, vocab, requires_grad=True), torch.randint(vocab, (2, 3))
    labels[0, 1] = -100

    def run(function: Any) -> list[torch.Tensor]:
        results = function(hidden, labels)
        through = [result for result in results if result.requires_grad]
        return [*results, *torch.autograd.grad([result.sum() for result in through], hidden)]

    inside = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, expected in zip(run(inside), run(call), strict=True):
        torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)

    operators, fixed = torch.ops.compiled_logprobs, (-100, [bool(options)] + [False] * 3, False, True, False, False)
    labels = labels.clamp(min=0)  # of a row that is ignored, statistics may be anything
    logits, temperature = (hidden * 2).detach(), torch.tensor(0.7, dtype=torch.float64)
    call_with = *fixed, torch.float32, backend
    torch.library.opcheck(operators.log_probs, (hidden, labels, temperature, *call_with))
    log_probs, stats, *_ = operators.log_probs(logits, labels, temperature, *call_with)
    saved = logits, labels, temperature, stats, log_probs
    torch.library.opcheck(operators.log_probs_backward, (*saved, None, None, *call_with))
    print(f"{backend}: the same bits in a graph, and well-formed operators", flush=True)
