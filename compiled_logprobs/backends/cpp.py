"""C++ kernels for CPUs, compiled on first use: all threads read the logits, once, however few rows there are.

Shapes: N rows, V vocabulary, K labels a row.
"""

import ctypes
import sys
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from compiled_logprobs.backends.base import Backend
from compiled_logprobs.backends.cpp_build import is_kept, shared_library, why_not_compile
from compiled_logprobs.backends.fingerprint import digest_of
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted, clean, clean_upstream, finish
from compiled_logprobs.operation.formula import Saved
from compiled_logprobs.problem import Problem

SOURCE = Path(__file__).with_name("cpp_kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARTIAL_FLOATS = 4
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
        library, logits, cleaned, entropy = self._loaded(), inputs.logits, clean(inputs), wanted.entropy
        labels = cleaned.labels
        rows = _Rows.of(logits, labels, cleaned.temperature)
        leading = logits.shape[:-1]
        log_probs = logits.new_empty(labels.shape, dtype=torch.float32)
        m, log_s, *entropies = logits.new_empty(2 + entropy, *leading, 1, dtype=torch.float32)
        tiles = -(-rows.vocab // ctypes.c_int64.in_dll(library, "tile").value)
        partials = logits.new_empty(rows.n, tiles, PARTIAL_FLOATS, dtype=torch.float32)
        library.log_probs_forward(
            *(DTYPES[logits.dtype], logits.data_ptr(), rows, partials.data_ptr(), log_probs.data_ptr()),
            *(m.data_ptr(), log_s.data_ptr(), entropies[0].data_ptr() if entropy else None),
        )
        h = entropies[0].squeeze(-1) if entropy else None
        return finish(cleaned, wanted, log_probs, m.squeeze(-1), log_s.squeeze(-1), h)

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        logits, cleaned = inputs.logits, clean(inputs)
        labels, upstream = cleaned.labels, clean_upstream(cleaned, upstream)
        saved = Saved(logits, labels, cleaned.temperature, tuple(stats.unbind(0)), cleaned.dropped)
        rows = _Rows.of(logits, labels, saved.temperature)
        gradient = logits if inplace else logits.new_empty(logits.shape)
        at_labels = logits.new_empty(labels.shape)
        self._loaded().log_probs_backward(
            *(
                DTYPES[logits.dtype],
                logits.data_ptr(),
                rows,
                _Upstream.of(saved, upstream),
                gradient.data_ptr(),
                at_labels.data_ptr(),
            )
        )
        return gradient

    def fingerprint(self) -> str:
        return digest_of(Path(__file__), SOURCE)

    def _loaded(self) -> ctypes.CDLL:
        if self._broken is not None:
            raise BackendUnavailable(self._broken)
        try:
            return _library()
        except BackendUnavailable as error:
            self._broken = str(error)  # compiling once more would fail once more
            raise


class _Rows(ctypes.Structure):
    """`Rows` of cpp_kernels.cpp."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("labels_per_row", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
        ("threads", ctypes.c_int64),
    )

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, temperature: float | Tensor) -> "_Rows":
        offsets = _offsets(logits) if logits.ndim > 2 else None
        temperatures = temperature.contiguous() if isinstance(temperature, Tensor) else None
        rows = cls(
            n=logits.numel() // logits.shape[-1],
            vocab=logits.shape[-1],
            labels_per_row=labels.shape[-1],
            stride=logits.stride(0),
            offsets=None if offsets is None else offsets.data_ptr(),
            labels=labels.data_ptr(),
            temperatures=None if temperatures is None else temperatures.data_ptr(),
            temperature=temperature if temperatures is None else 1.0,
            threads=1 if logits.numel() <= ALONE else torch.get_num_threads(),
        )
        rows.kept = offsets, labels, temperatures  # a pointer keeps nothing alive
        return rows


class _Upstream(ctypes.Structure):
    """`Upstream` of cpp_kernels.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("m", "log_s", "entropy", "ignored", "grad_log_probs", "grad_entropy")
    )

    @classmethod
    def of(cls, saved: Saved, upstream: Upstream) -> "_Upstream":
        m, log_s, *entropy = (residual.contiguous() for residual in saved.residuals)
        tensors = {
            "m": m,
            "log_s": log_s,
            "entropy": entropy[0] if entropy else None,
            "ignored": saved.ignored.contiguous(),
            "grad_log_probs": upstream.log_probs.contiguous(),
            "grad_entropy": None if upstream.entropy is None else upstream.entropy.contiguous(),
        }
        pointers = cls(**{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()})
        pointers.kept = tensors
        return pointers


def _offsets(logits: Tensor) -> Tensor:
    """Where each row begins, in elements: [N] int64."""
    offsets = torch.zeros((), dtype=torch.int64, device=logits.device)
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device=logits.device) * stride
    return offsets.reshape(-1)


@cache
def _library() -> ctypes.CDLL:
    library = shared_library(SOURCE, _flags())
    pointer = ctypes.c_void_p
    rows, upstream = ctypes.POINTER(_Rows), ctypes.POINTER(_Upstream)
    library.log_probs_forward.argtypes = (ctypes.c_int32, pointer, rows, *[pointer] * 5)
    library.log_probs_backward.argtypes = (ctypes.c_int32, pointer, rows, upstream, pointer, pointer)
    library.log_probs_forward.restype = library.log_probs_backward.restype = None
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
