"""The kernels that Inductor generates for the `compiled` backend on a GPU, on CPU tensors in Triton's interpreter.

A program, which tests spawn with TRITON_INTERPRET=1: prints what it checked, and fails with an AssertionError.

Shapes: N rows, V vocabulary.
"""

import warnings
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from torch._inductor.runtime import triton_helpers
from triton.runtime import interpreter

from compiled_logprobs.backends import compiled, register_backend
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.operation import formula
from compiled_logprobs.problem import Problem, layout_of
from tests.gpu_code.data_sheets import data_sheet
from tests.gpu_code.generated_code import Generated, generate, load, tuner_of
from tests.helpers.triton_interpreter import like_a_gpu

GPU = data_sheet("sm_90")


apply_reduction = interpreter.ReduceOps.apply_impl


def reduce(self, input):
    """Inductor's own maximum, which hands on NaN as numpy's does: the interpreter would take its elements one by
    one."""
    if self.combine_fn is triton_helpers.maximum:
        return self.min_max(input[0], val_reduce_op=np.max)
    return apply_reduction(self, input)


class Interpreted:
    """A kernel, launched as Inductor launches it, in the first configuration that the autotuner would try."""

    def __init__(self, name: str, source: str) -> None:
        tuner = tuner_of(name, source, GPU)
        self.function, self.blocks = tuner.fn, tuner.configs[0].kwargs

    def run(self, *arguments, stream: int) -> None:
        names = [name for name in self.function.arg_names if name not in self.blocks]
        named = dict(zip(names, arguments, strict=True))
        grid = (triton.cdiv(named["xnumel"], self.blocks["XBLOCK"]),)
        self.function[grid](*arguments, **self.blocks)


def allocate(shape, stride, dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype)


class InterpretedCompiled(Backend):
    """The `compiled` backend as it is on a GPU, run here: the same functions, dynamic sizes and hints."""

    name = "interpreted"
    summary = "generated Triton kernels in the interpreter"

    def __init__(self) -> None:
        self.calls: dict[object, tuple[Generated, object]] = {}

    def forward(self, logits, labels, temperature, *, entropy):
        t = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature)
        key, hints = self.key(logits, labels, t), None
        if compiled.reads_blocks("cuda", key.vocab):
            hints = compiled.hints_for(logits)
        arguments = {"logits": logits, "labels": labels, "temperature": t}
        log_probs, *rest = self.run(("forward", key, entropy), arguments, hints)
        return (log_probs, rest[0], tuple(rest[1:])) if entropy else (log_probs, None, tuple(rest[-2:]))

    def backward(self, saved, upstream, *, inplace) -> Tensor:
        logits, labels, temperature, residuals, ignored = saved
        t = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature)
        key = self.key(logits, labels, t)
        arguments = {"logits": logits, "labels": labels, "temperature": t, "m": residuals[0], "log_s": residuals[1]}
        arguments |= {"ignored": ignored, "grad_log_probs": upstream.log_probs}
        if upstream.entropy is not None:
            arguments |= {"entropy": residuals[2], "grad_entropy": upstream.entropy}
        gradient, *at_labels = self.run(("backward", key, inplace), arguments, None)
        if at_labels and at_labels[0] is not None:
            formula.write_label_columns(gradient, labels, at_labels[0])
        return gradient

    def key(self, logits: Tensor, labels: Tensor, temperature: Tensor) -> compiled.Key:
        layout, aligned = layout_of(logits)
        return compiled.Key(
            "cuda", logits.shape[-1], logits.dtype, labels.shape[-1], temperature.ndim > 0, layout, aligned
        )

    def run(self, which, arguments, hints):
        one_row = len(arguments["logits"]) == 1
        logits = arguments["logits"]
        if one_row:  # as `compiled` does
            arguments = {name: torch.cat([a, a]) if a.ndim else a for name, a in arguments.items()}
        signature = (*which, *arguments, arguments["logits"].stride())
        if signature not in self.calls:
            direction, key, option = which
            build = compiled.forward_function if direction == "forward" else compiled.backward_function
            leading = arguments["logits"].ndim - 1
            shapes = {
                name: torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
                for name, a in arguments.items()
            }
            generated = generate(build(key, option), shapes, GPU, lambda fakes: compiled.mark(fakes, leading, hints))
            self.calls[signature] = generated, load(generated, Interpreted, allocate)
        generated, call = self.calls[signature]
        results = call([eval(expression, {"L": arguments}) for expression in generated.inputs])
        if not one_row:
            return results
        results = tuple(result[:1] if isinstance(result, Tensor) else result for result in results)
        if which[0] == "backward" and which[2]:  # in place
            results = (logits.copy_(results[0]), *results[1:])
        return results


if __name__ == "__main__":
    torch.manual_seed(0)
    warnings.simplefilter("ignore", RuntimeWarning)  # of numpy: NaN and infinity are among what is tested
    register_backend("interpreted", InterpretedCompiled())
    plain = Problem("cpu", rows=5, vocab=2311, dtype=torch.float32, aligned=False)
    with like_a_gpu(), patch.object(interpreter.ReduceOps, "apply_impl", reduce):
        for problem in (
            plain._replace(layout="other"),
            plain._replace(needs_grad=True, labels_per_row=3, temperature="number", masked_logits=True),
            plain._replace(needs_grad=True, entropy=True, dtype=torch.bfloat16),
            plain._replace(needs_grad=True, inplace_backward=True, temperature="per_token", dtype=torch.float16),
        ):
            report = check_backend("interpreted", problem)
            assert report.passed, [check.detail for check in report.checks if not check.passed]
            print(f"gate, {problem} ({problem.details() or 'forward'}): passed {len(report.checks)} checks", flush=True)
