"""The `flash_attn` backend on CPU tensors, with flash-attn's real kernels in Triton's interpreter.

A program, which tests spawn with TRITON_INTERPRET=1: prints what it checked, and fails with an AssertionError.
"""

import torch

from compiled_logprobs.backends import register_backend
from compiled_logprobs.backends.flash_attn import FlashAttn, kernel_module
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.operation.autograd import compute
from compiled_logprobs.problem import Problem
from tests.helpers.graph_bits import check_in_a_graph
from tests.helpers.triton_interpreter import like_a_gpu


class InterpretedFlashAttn(FlashAttn):
    """The backend, allowed on the CPU."""

    def why_not(self, problem: Problem) -> str | None:
        return super().why_not(problem._replace(device_type="cuda"))


FLASH_ATTN = InterpretedFlashAttn()


def check_against_flash_attns_own_function(vocab: int) -> None:
    """The backend gets the same bits as flash-attn itself; in the gradient, up to the rounding of lse * T, which it
    saves."""
    leaf = torch.randn(3, vocab, requires_grad=True)
    labels = torch.randint(vocab, (3,))
    losses, _ = kernel_module().cross_entropy_loss(leaf, labels, logit_scale=1 / 0.7, ignore_index=-1)
    losses.backward(-torch.ones(3))
    theirs, leaf.grad = leaf.grad, None
    (log_probs,) = compute(FLASH_ATTN, leaf, labels.unsqueeze(-1), 0.7)
    log_probs.backward(torch.ones(3, 1))
    assert torch.equal(log_probs.squeeze(-1), -losses.clamp(min=0))
    torch.testing.assert_close(leaf.grad, theirs, rtol=1e-6, atol=1e-6)
    print(f"V={vocab}: bits are those of flash-attn's own function")


def check_reasons() -> None:
    plain = Problem("cpu", rows=15, vocab=5000, dtype=torch.bfloat16)
    assert FLASH_ATTN.why_not(plain) is None
    assert FlashAttn().why_not(plain) == "needs a CUDA or ROCm device"
    changes = {"dtype": torch.float64, "entropy": True, "labels_per_row": 3, "temperature": "per_token", "vocab": 1}
    for name, value in (changes | {"masked_logits": True}).items():
        assert FLASH_ATTN.why_not(plain._replace(**{name: value})), name


def check_that_the_gate_lets_it_pass() -> None:
    register_backend("interpreted_flash_attn", FLASH_ATTN)
    plain = Problem("cpu", rows=8, vocab=20011, dtype=torch.float32)  # two blocks forward, five backward
    for problem in (
        plain._replace(vocab=7),
        plain._replace(needs_grad=True, temperature="number"),
        plain._replace(needs_grad=True, inplace_backward=True, layout="slice"),
        plain._replace(needs_grad=True, inplace_backward=True, layout="slice", dtype=torch.bfloat16),
        plain._replace(needs_grad=True, layout="rows", aligned=False, dtype=torch.float16),
    ):
        report = check_backend("interpreted_flash_attn", problem)
        assert report.passed, [check.detail for check in report.checks if not check.passed]
        print(f"gate, {problem} ({problem.details() or 'forward'}): passed {len(report.checks)} checks", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    check_reasons()
    with like_a_gpu():
        logits = torch.randn(1, 32771)
        logits[:, :16384] = -torch.inf
        (log_probs,) = compute(FLASH_ATTN, logits, torch.tensor([[20000]]))
        assert log_probs.isnan().all(), "flash-attention#1930 is mended: masked logits need not be refused any more"
        for vocab in (7, 2048, 5000, 32771):
            check_against_flash_attns_own_function(vocab)
        check_that_the_gate_lets_it_pass()
        check_in_a_graph("interpreted_flash_attn", 311)
