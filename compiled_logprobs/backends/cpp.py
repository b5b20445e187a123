"""C++ kernels for CPUs, compiled on first use: all threads read the logits, once, however few rows there are.

Shapes: N rows, V vocabulary, K labels a row.
"""

import ctypes
import struct
import sys
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from compiled_logprobs.backends.base import Backend
from compiled_logprobs.backends.cpp_build import is_kept, shared_library, why_not_compile
from compiled_logprobs.backends.fingerprint import digest_of
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted
from compiled_logprobs.problem import Problem

SOURCE, VECTORS = (Path(__file__).with_name(name) for name in ("cpp_kernels.cpp", "cpp_vectors.h"))
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-ffp-contract=off")
"""Nothing is contracted but what says so, since a row has the same bits whatever else is computed of it."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CALL = [f"=6qd11q{2 * dimensions}q" for dimensions in range(64)]
"""The layout of a `Call` of cpp_kernels.cpp, by the number of leading dimensions."""
ALONE = 32768
"""Logits up to which a second thread takes longer to wake than it saves."""


class Cpp(Backend):
    """C++ kernels over ATen's vectors."""

    name = "cpp"
    summary = "C++ kernels for CPUs, compiled on first use: one pass forward, one backward"
    row_invariant = True  # the sums of a tile know nothing of other rows

    def __init__(self) -> None:
        self._broken: str | None = None

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return "is for CPUs"
        if problem.dtype not in DTYPES:
            return "computes in float32; float64 logits are for eager"
        return self._broken or _why_not_here()

    def is_warm(self, problem: Problem) -> bool:
        return self._broken is None and (_library.cache_info().currsize > 0 or _is_kept())

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        library, rows = self._loaded(), inputs.labels.shape[:-1]
        log_probs = torch.empty_like(inputs.labels, dtype=torch.float32)  # a microsecond less than new_empty
        results = Results(
            log_probs,
            log_probs.new_empty((3 if wanted.entropy else 2, *rows)),
            log_probs.new_empty(rows) if wanted.entropy else None,
            log_probs.new_empty(rows) if wanted.logsumexp else None,
            log_probs.new_empty(rows, dtype=torch.int64) if wanted.argmax else None,
            log_probs.new_empty(rows) if wanted.sum_p_squared else None,
        )
        library.log_probs_forward(_packed(inputs, results, None))
        return results

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        gradient = inputs.logits if inplace else inputs.logits.new_empty(inputs.logits.shape)
        g, entropy, logsumexp = upstream
        self._loaded().log_probs_backward(_packed(inputs, Results(g, stats, entropy, logsumexp), gradient))
        return gradient

    def fingerprint(self) -> str:
        return digest_of(Path(__file__), SOURCE, VECTORS)

    def _loaded(self) -> ctypes.CDLL:
        if self._broken is not None:
            raise BackendUnavailable(self._broken)
        try:
            return _library()
        except BackendUnavailable as error:
            self._broken = str(error)  # compiling once more would fail once more
            raise


def _packed(inputs: Inputs, rows: Results, gradient: Tensor | None) -> bytes:
    """A `Call` of cpp_kernels.cpp: one argument, since ctypes converts each by itself."""
    logits, labels, temperature, ignore_index = inputs
    log_probs, stats, entropy, logsumexp, argmax, sum_p_squared = rows
    number, per_token = (1.0, temperature.data_ptr()) if isinstance(temperature, Tensor) else (temperature, 0)
    *sizes, vocab = logits.shape
    return struct.pack(
        CALL[len(sizes)],
        DTYPES[logits.dtype],
        1 if logits.numel() <= ALONE else torch.get_num_threads(),
        vocab,
        labels.shape[-1],
        labels.element_size(),
        ignore_index,
        number,
        per_token,
        logits.data_ptr(),
        labels.data_ptr(),
        stats.data_ptr(),
        log_probs.data_ptr(),
        0 if entropy is None else entropy.data_ptr(),
        0 if logsumexp is None else logsumexp.data_ptr(),
        0 if argmax is None else argmax.data_ptr(),
        0 if sum_p_squared is None else sum_p_squared.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        len(sizes),
        *sizes,
        *logits.stride()[:-1],
    )


@cache
def _library() -> ctypes.CDLL:
    library = shared_library(SOURCE, _flags())
    for function in (library.log_probs_forward, library.log_probs_backward):
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    return library


@cache
def _is_kept() -> bool:
    """Whether an earlier process has compiled it, so that only loading is left: asked once, to be as good as loaded."""
    return is_kept(SOURCE, _flags())


def _flags() -> tuple[str, ...]:
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = "DEFAULT" if capability == "NO AVX" else capability
    return (*FLAGS, f"-DCPU_CAPABILITY={vectors}", f"-DCPU_CAPABILITY_{vectors}")


@lru_cache(maxsize=1)
def _why_not_here() -> str | None:
    if sys.platform != "linux":
        return f"is tested on Linux only, and this is {sys.platform}"
    if why_not_compile() is None:
        return None  # it is compiled by the first call
    try:
        _library()
    except BackendUnavailable as error:
        return str(error)
    return None
