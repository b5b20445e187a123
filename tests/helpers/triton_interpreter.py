"""Run real Triton kernels on CPU tensors, in a process that was started with TRITON_INTERPRET=1.

Triton decides when a kernel is defined whether it is interpreted, so a test spawns such a process. The interpreter (of
triton 3.7) then differs from a GPU in five ways that matter here; `like_a_gpu` mends them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import numpy as np
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("start this process with TRITON_INTERPRET=1 in its environment")

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

convert_argument = interpreter._implicit_cvt
cast = interpreter.InterpreterBuilder.cast_impl
_prepared: set[str] = set()


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _exp2(x):
    return tl.exp2(x)


@triton.jit
def _log(x):
    return tl.log(x)


def _convert_argument(argument):
    """A number is a float32 argument. The interpreter hands it on as a literal, which takes the dtype of what it meets:
    a float16 logit times a number is then rounded to float16, and a bfloat16 one fails."""
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
    return convert_argument(argument)


def _cast(builder, source, target_type):
    """float32 to bfloat16 rounds to nearest. The interpreter truncates."""
    if (source.dtype.scalar, target_type.scalar) != (tl.float32, tl.bfloat16):
        return cast(builder, source, target_type)
    rounded = torch.tensor(source.data).to(torch.bfloat16).view(torch.int16)
    return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)


def _call(self, *arguments, **options):
    """A call of one device function by another. Half of the interpreter's time is that it prepares the language anew
    for each, as it did when the kernel was launched; what Triton's own functions see stays prepared."""
    if self.fn.__globals__.get("tl") is not tl and self.fn.__module__ not in _prepared:
        _prepared.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **options)


def _max(builder, a, b):
    """A GPU's maximum of NaN and a number is the number, unless NaN is asked for; numpy's is NaN."""
    return builder.binary_op(a, b, np.fmax)


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Kernels launched within it compute what they would on a GPU, up to float32 rounding."""
    with (
        # Launchers select a device by its index, which is None for the CPU, and which torch without CUDA refuses.
        patch.object(torch.cuda, "device", lambda index: nullcontext()),
        # libdevice is NVIDIA's bitcode; what stands for it in the interpreter returns None.
        patch.object(libdevice, "exp", _exp),
        patch.object(libdevice, "exp2", _exp2),
        patch.object(libdevice, "log", _log),
        patch.object(interpreter, "_implicit_cvt", _convert_argument),
        patch.object(interpreter.InterpreterBuilder, "cast_impl", _cast),
        patch.object(interpreter.InterpreterBuilder, "create_maxnumf", _max),
        patch.object(interpreter.InterpretedFunction, "__call__", _call),
        np.errstate(invalid="ignore", divide="ignore"),  # NaN and infinity are among what is tested
    ):
        yield
