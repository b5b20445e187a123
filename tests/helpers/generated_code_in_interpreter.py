"""The kernels that Inductor generates for the `compiled` backend on a GPU, on CPU tensors in Triton's interpreter.

A program, which tests spawn with TRITON_INTERPRET=1: prints what it checked, and fails with an AssertionError.

Shapes: N rows, V vocabulary.
"""

import inspect
import warnings
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from torch._inductor.runtime import triton_helpers
from triton.runtime import interpreter

from compiled_logprobs.backends import compiled, register_backend
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.problem import Problem, layout_of
from tests.gpu_code.data_sheets import data_sheet
from tests.gpu_code.generated_code import generate, load, tuner_of
from tests.helpers.triton_interpreter import like_a_gpu

GPU = data_sheet("sm_90")

apply_reduction = interpreter.ReduceOps.apply_impl
key_of = compiled._key_of


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


class CompiledForAGPU:
    """What stands for torch.compile: generates for a GPU, and runs here."""

    def __init__(self, function, name: str, device_type: str) -> None:
        self.function, self.is_forward, self.calls = function, name.startswith("forward"), {}

    def __call__(self, *tensors: Tensor):
        arguments = dict(zip(inspect.signature(self.function).parameters, tensors, strict=False))
        logits = arguments["logits"]
        if logits.stride() not in self.calls:
            in_blocks = self.is_forward and compiled.reads_blocks("cuda", logits.shape[-1])
            hints = compiled.hints_for(logits) if in_blocks else None
            mark = partial(compiled.mark, leading=logits.ndim - 1, hints=hints)
            generated = generate(self.function, arguments, GPU, mark)
            self.calls[logits.stride()] = generated, load(generated, Interpreted, "cpu")
        generated, call = self.calls[logits.stride()]
        results = [r for r in call([eval(e, {"L": arguments}) for e in generated.inputs]) if isinstance(r, Tensor)]
        if not self.is_forward:
            return (*results, None)[:2]
        log_probs, *others = results
        return (log_probs, others[0], tuple(others[1:])) if len(others) > 2 else (log_probs, None, tuple(others))


def key_on_a_gpu(logits, labels, temperature) -> compiled.Key:
    return key_of(logits, labels, temperature)._replace(device_type="cuda", aligned=layout_of(logits)[1])


if __name__ == "__main__":
    torch.manual_seed(0)
    warnings.simplefilter("ignore", RuntimeWarning)  # of numpy: NaN and infinity are among what is tested
    register_backend("interpreted", compiled.Compiled())
    plain = Problem("cpu", rows=5, vocab=2311, dtype=torch.float32, needs_grad=True, aligned=False)
    with (
        like_a_gpu(),
        patch.object(interpreter.ReduceOps, "apply_impl", reduce),
        patch.object(compiled, "_compile", CompiledForAGPU),
        patch.object(compiled, "_key_of", key_on_a_gpu),
    ):
        for problem in (
            plain._replace(labels_per_row=3, temperature="number", masked_logits=True),
            plain._replace(entropy=True, dtype=torch.bfloat16, layout="slice"),
            plain._replace(inplace_backward=True, temperature="per_token", dtype=torch.float16),
        ):
            report = check_backend("interpreted", problem)
            assert report.passed, [check.detail for check in report.checks if not check.passed]
            print(f"gate, {problem} ({problem.details()}): passed {len(report.checks)} checks", flush=True)
