"""The `flash_attn` backend on CPU tensors, with flash-attn's real kernels in Triton's interpreter.

A program, which tests spawn with TRITON_INTERPRET=1: prints what it measured, and fails with an AssertionError.

Shapes: A x B rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.backends import register_backend
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.backends.flash_attn import FlashAttn, kernel_module
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.operation.autograd import ForwardBackward, compute
from compiled_logprobs.problem import Problem
from tests.helpers.triton_interpreter import like_a_gpu

IGNORE = -100


class InterpretedFlashAttn(FlashAttn):
    """The backend, allowed on the CPU."""

    def why_not(self, problem: Problem) -> str | None:
        device = "cuda" if problem.device_type == "cpu" else problem.device_type
        return super().why_not(problem._replace(device_type=device))


FLASH_ATTN, EAGER = InterpretedFlashAttn(), Eager()


class Case(NamedTuple):
    """Inputs with every kind of row: ordinary, shifted, ignored and full of NaN or inf, and with an invalid label."""

    padded: Tensor
    """[A, B + 1, V]; the logits are [:, :-1], whose rows are two strides apart."""
    labels: Tensor
    """[A, B, 1]"""
    upstream: Tensor
    """[A, B, 1]"""
    temperature: float


class Measured(NamedTuple):
    log_probs: Tensor
    gradient: Tensor
    """[A, B, V]"""


def make_case(dtype: torch.dtype, vocab: int, temperature: float, shape: tuple[int, int] = (3, 5)) -> Case:
    padded = (4 * torch.randn(shape[0], shape[1] + 1, vocab)).to(dtype)
    padded[0, 0] += 100
    labels = torch.randint(vocab, (*shape, 1))
    labels[0, 2], labels[0, 3] = 0, vocab - 1
    padded[0, 1, 1::3], labels[0, 1] = torch.nan, IGNORE
    padded[0, 4, ::2], labels[0, 4] = torch.inf, IGNORE
    labels[-1, 0] = vocab
    return Case(padded, labels, torch.randn(*shape, 1), temperature)


def run(backend: ForwardBackward, case: Case, *, inplace: bool = False) -> Measured:
    leaf = case.padded.clone().requires_grad_()
    padded = leaf.clone()
    log_probs, _ = compute(backend, padded[:, :-1], case.labels, case.temperature, inplace_backward=inplace)
    log_probs.backward(case.upstream)
    assert same_bits(padded[:, -1], case.padded[:, -1]), "wrote outside the logits"
    if inplace:
        assert same_bits(padded[:, :-1], leaf.grad[:, :-1]), "the gradient is not in the logits"
    else:
        assert same_bits(padded, case.padded), "changed the logits"
    return Measured(log_probs.detach(), leaf.grad[:, :-1])


def expected(case: Case) -> Measured:
    """In float64, with torch's own functions."""
    ignored = case.labels == IGNORE
    invalid = (case.labels < 0) & ~ignored | (case.labels >= case.padded.shape[-1])
    x = case.padded[:, :-1].double().masked_fill(ignored, 0.0).requires_grad_()
    log_p = torch.log_softmax(x / case.temperature, -1).gather(-1, case.labels.masked_fill(ignored | invalid, 0))
    log_p = torch.where(invalid, torch.nan, log_p).masked_fill(ignored, 0.0)
    log_p.backward(case.upstream.double())
    return Measured(log_p.detach(), torch.where(invalid, torch.nan, x.grad))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def error(measured: Tensor, truth: Tensor) -> float:
    assert torch.equal(measured.isnan(), truth.isnan()), "NaN in other places than in float64"
    return (measured.double() - truth).abs().nan_to_num(0.0).max().item()


def check_values(dtype: torch.dtype, vocab: int, temperature: float) -> None:
    case = make_case(dtype, vocab, temperature)
    truth, flash, eager = expected(case), run(FLASH_ATTN, case), run(EAGER, case)
    in_place = run(FLASH_ATTN, case, inplace=True)
    assert same_bits(in_place.log_probs, flash.log_probs) and same_bits(in_place.gradient, flash.gradient)
    assert flash.gradient[0, 1].abs().sum() == 0 and flash.gradient[0, 4].abs().sum() == 0, "ignored rows are not 0"

    largest = case.padded.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() / temperature
    rounding = 2 * torch.finfo(torch.float32).eps * largest
    figures = []
    for measured, plain, true in zip(flash, eager, truth, strict=True):
        mine, eagers = error(measured, true), error(plain, true)
        figures += [mine, eagers]
        assert mine <= max(2 * eagers, rounding), f"error {mine:.2e}, eager {eagers:.2e}, rounding {rounding:.2e}"
    name = f"{str(dtype).removeprefix('torch.')} V={vocab} T={temperature}"
    print(f"{name:25}" + "".join(f"{figure:12.2e}" for figure in figures), flush=True)


class Recorder:
    """Stands for a kernel: launches it, and keeps what it was launched with, but for tensors."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.launches.append({name: value for name, value in named.items() if not isinstance(value, Tensor)})
            self.kernel[grid](*args, **kwargs)

        return launch


def check_against_flash_attns_own_function(vocab: int) -> None:
    """The backend launches the kernels as flash-attn itself does, and so gets the same bits."""
    module = kernel_module()
    recorders = {
        name: Recorder(getattr(module, name)) for name in ("cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel")
    }
    vars(module).update(recorders)
    leaf = torch.randn(3, vocab, requires_grad=True)
    labels = torch.randint(vocab, (3,))
    losses, _ = module.cross_entropy_loss(leaf, labels, logit_scale=1 / 0.7, ignore_index=-1)
    losses.backward(-torch.ones(3))
    theirs, leaf.grad = leaf.grad, None
    log_probs, _ = compute(FLASH_ATTN, leaf, labels.unsqueeze(-1), 0.7)
    log_probs.backward(torch.ones(3, 1))
    vars(module).update({name: recorder.kernel for name, recorder in recorders.items()})
    assert torch.equal(log_probs.squeeze(-1), -losses.clamp(min=0)) and torch.equal(leaf.grad, theirs)
    for name, recorder in recorders.items():
        own, ours = recorder.launches
        assert own == ours, f"{name} is launched with {ours}, by flash-attn with {own}"
    print(f"V={vocab}: bits and launch settings are those of flash-attn's own function")


def check_reasons() -> None:
    plain = Problem("cpu", rows=15, vocab=5000, dtype=torch.bfloat16)
    assert FLASH_ATTN.why_not(plain) is None
    assert FlashAttn().why_not(plain) == "needs a CUDA or ROCm device"
    for change in (
        {"dtype": torch.float64},
        {"entropy": True},
        {"labels_per_row": 3},
        {"temperature": "per_token"},
        {"masked_logits": True},
        {"vocab": 1},
    ):
        reason = FLASH_ATTN.why_not(plain._replace(**change))
        assert reason and not reason.endswith(".")
        print(f"{change}: {reason}")


def check_that_masked_logits_are_refused_with_reason() -> None:
    logits = torch.randn(1, 32771)
    logits[:, :16384] = -torch.inf
    log_probs, _ = compute(FLASH_ATTN, logits, torch.tensor([[20000]]))
    assert log_probs.isnan().all(), "flash-attention#1930 is mended: masked logits need not be refused any more"


def check_that_the_gate_lets_it_pass(dtype: torch.dtype) -> None:
    register_backend("interpreted_flash_attn", FLASH_ATTN)
    for change in (
        {},
        {"needs_grad": True, "temperature": "number"},
        {"needs_grad": True, "inplace_backward": True, "layout": "other"},
        {"needs_grad": True, "layout": "rows", "aligned": False},
    ):
        problem = Problem("cpu", rows=8, vocab=20011, dtype=dtype)._replace(**change)
        report = check_backend("interpreted_flash_attn", problem)
        assert report.passed, [check.detail for check in report.checks if not check.passed]
        print(f"gate, {problem} ({problem.details() or 'forward'}): passed {len(report.checks)} checks", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    check_reasons()
    with like_a_gpu():
        check_that_masked_logits_are_refused_with_reason()
        for vocab in (7, 2048, 5000, 32771):
            check_against_flash_attns_own_function(vocab)
        print(f"{'largest error':25}{'log-prob':>12}{'(eager)':>12}{'gradient':>12}{'(eager)':>12}")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for vocab in (7, 5000, 32771):  # 32771: three blocks forward, nine backward
                check_values(dtype, vocab, temperature=0.7)
            check_values(dtype, 5000, temperature=1.0)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            check_that_the_gate_lets_it_pass(dtype)
