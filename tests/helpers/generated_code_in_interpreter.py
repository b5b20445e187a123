"""The kernels that Inductor generates for the `compiled` backend on a GPU, on CPU tensors in Triton's interpreter.

A program, which tests spawn with TRITON_INTERPRET=1: prints what it checked, and fails with an AssertionError.

Shapes: N rows, V vocabulary.
"""

import warnings
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from torch._inductor.runtime import triton_helpers
from triton.runtime import interpreter

from compiled_logprobs.backends import compiled, compiled_code, register_backend
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.operation.contract import Inputs
from compiled_logprobs.problem import Problem
from tests.gpu_code.data_sheets import data_sheet
from tests.gpu_code.generated_code import generate, load, tuner_of
from tests.helpers.triton_interpreter import like_a_gpu

GPU = data_sheet("sm_90")

apply_reduction = interpreter.ReduceOps.apply_impl
key_of = compiled.key_of


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
        grid = tuple(
            triton.cdiv(named[f"{x}numel"], self.blocks[f"{x.upper()}BLOCK"]) for x in "xy" if f"{x}numel" in named
        )
        self.function[grid](*arguments, **self.blocks)


class CompiledForAGPU:
    """What stands for torch.compile: generates for a GPU, and runs here."""

    def __init__(self, function, name: str, device_type: str) -> None:
        self.function, self.direction, self.calls = function, name.partition("_")[0], {}

    def __call__(self, **arguments: Tensor):
        logits, stats = arguments["logits"], arguments.get("stats")
        kind = logits.stride(), None if stats is None else stats.stride(0) == stats[0].numel()
        if kind not in self.calls:
            key = key_of(Inputs(logits, arguments["labels"], arguments["temperature"], -100))
            key = key._replace(device_type="cuda", aligned=False)
            mark = partial(compiled_code.mark, hints=compiled_code.hints_for(key, logits, self.direction))
            on_gpu = {name: a.to("meta") if a.ndim else a for name, a in arguments.items()}
            generated = generate(self.function, on_gpu, GPU, mark)
            self.calls[kind] = generated, load(generated, Interpreted, "cpu")
        generated, call = self.calls[kind]
        results = iter(
            [r for r in call([eval(e, {"L": arguments}) for e in generated.inputs]) if isinstance(r, Tensor)]
        )
        return fill(self.function, arguments, results)


def fill(function, arguments, results):
    """`results` where `function` returns tensors: generated code leaves out what is None."""
    shapes = {name: torch.zeros_like(a) for name, a in arguments.items()}
    return [None if each is None else next(results) for each in function(**shapes)]


def key_on_a_gpu(inputs: Inputs) -> compiled_code.Key:
    starts_aligned = inputs.logits.data_ptr() % 16 == 0
    return key_of(inputs)._replace(device_type="cuda", aligned=False, starts_aligned=starts_aligned)


if __name__ == "__main__":
    torch.manual_seed(0)
    warnings.simplefilter("ignore", RuntimeWarning)  # of numpy: NaN and infinity are among what is tested
    register_backend("interpreted", compiled.Compiled())
    plain = Problem("cpu", rows=5, vocab=2311, dtype=torch.float32, needs_grad=True, aligned=False)
    with (
        like_a_gpu(),
        patch.object(interpreter.ReduceOps, "apply_impl", reduce),
        patch.object(compiled, "compile_function", CompiledForAGPU),
        patch.object(compiled, "key_of", key_on_a_gpu),
    ):
        for problem in (
            plain._replace(labels_per_row=3, temperature="number", masked_logits=True),
            plain._replace(entropy=True, dtype=torch.bfloat16, layout="slice"),
            plain._replace(inplace_backward=True, temperature="per_token", dtype=torch.float16),
        ):
            report = check_backend("interpreted", problem)
            assert report.passed, [check.detail for check in report.checks if not check.passed]
            print(f"gate, {problem} ({problem.details()}): passed {len(report.checks)} checks", flush=True)
