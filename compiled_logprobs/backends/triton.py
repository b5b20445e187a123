"""Hand-written Triton kernels for CUDA and ROCm: two launches forward, one backward, whatever is asked for.

`triton_kernels.py` and `triton_gradient.py` have the kernels; here they are launched. N and strides are arguments that
Triton does not look at, so that each combination of V, K, dtype and options is compiled once.

Shapes: ... leading dimensions (rows), N rows in all, V vocabulary, K labels a row.
"""

import math
from collections.abc import Iterator
from ctypes import c_float
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.backends.base import Backend
from compiled_logprobs.backends.fingerprint import digest_of
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted, wanted_by
from compiled_logprobs.problem import Problem, as_it_lies, layout_of

CHUNK = 16384
"""Columns that a program takes forward, at most. Another number gives other bits."""
VECTORS = 128
"""How many vectors of 8 columns a program reads at a time: one a thread."""
BLOCK = 4096
"""Columns that a program takes backward."""
LOG2_E = c_float(math.log2(math.e)).value
MOST_LABELS = 1024
"""Of a row: one program holds them all."""
LEAST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU; the kernels are assembled for nothing older."""


class Constants(NamedTuple):
    """What kernels are specialised on, in both directions."""

    V: int
    K: int
    KP: int
    SLICED: bool
    PER_TOKEN: bool


class Triton(Backend):
    """Hand-written Triton kernels."""

    name = "triton"
    summary = "hand-written Triton kernels: two launches forward, one backward; skips ignored rows"
    row_invariant = True  # chunks of a row are fixed, and their sums do not depend on how it lies in memory

    def __init__(self) -> None:
        self._warm: set[tuple[object, ...]] = set()

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda":  # which is what torch calls ROCm, too
            return "needs a CUDA or ROCm device"
        if problem.dtype == torch.float64:
            return "computes in float32; float64 logits are for eager"
        if problem.labels_per_row > MOST_LABELS:
            return f"takes up to {MOST_LABELS} labels a row, not {problem.labels_per_row}"
        return _why_no_kernels() or _why_not_this_device()

    def is_warm(self, problem: Problem) -> bool:
        sliced, per_token = problem.layout == "slice", problem.temperature == "per_token"
        key = _key(problem.dtype, problem.vocab, problem.labels_per_row, sliced, per_token)
        is_warm = ("forward", wanted_by(problem), problem.aligned, *key) in self._warm
        if not problem.needs_grad or not is_warm:
            return is_warm
        whole = problem.aligned and as_it_lies(problem._replace(layout="flat")).aligned
        if not whole and not problem.inplace_backward:
            return False  # where logits and gradient start matters then, which a problem does not tell
        # Whether a gradient will come through the others is not known; whoever warms up does what they do later.
        return any(
            ("backward", *through, problem.inplace_backward, whole, *key) in self._warm
            for through in product((False, True), repeat=2)
        )

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        from compiled_logprobs.backends import triton_kernels  # imports triton

        logits, labels, temperature, _ = inputs
        shape, bits = _constants_of(inputs), _over(temperature, LOG2_E)
        rows, count = logits.shape[:-1], logits.shape[:-1].numel()
        aligned = layout_of(logits)[1]
        vectors = min(VECTORS, _power_of_2(-(-shape.V // 8)))
        chunks = -(-shape.V // CHUNK)
        steps = -(-shape.V // (chunks * vectors * 8))
        warps = max(1, vectors // _warp_size())

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=logits.device)

        fields = {"ENTROPY": wanted.entropy, "SQUARES": wanted.sum_p_squared, "ARGMAX": wanted.argmax}
        partial = empty(count, 2 + sum(fields.values()), chunks)
        log_probs, stats = empty(*labels.shape), empty(3 if wanted.entropy else 2, *rows)
        entropy = empty(*rows) if wanted.entropy else None
        logsumexp = empty(*rows) if wanted.logsumexp else None
        argmax = empty(*rows, dtype=torch.int64) if wanted.argmax else None
        sum_p_squared = empty(*rows) if wanted.sum_p_squared else None
        others = [stats if each is None else each for each in (entropy, logsumexp, argmax, sum_p_squared)]
        common = {**shape._asdict(), **fields, "C": chunks, "enable_fp_fusion": False}
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]  # torch's gap
            for part, strides in _launches(logits):
                n = part.shape[:-1].numel()
                triton_kernels.reduce_chunks[(n * chunks,)](
                    *(part, labels, temperature, bits, partial, *strides, inputs.ignore_index),
                    **common,
                    R=vectors,
                    STEPS=steps,
                    UNROLL=1 if torch.version.hip else steps,  # unrolled for an MI300, it takes 306 registers
                    ALIGNED=aligned,
                    num_warps=warps,
                )
                triton_kernels.combine_chunks[(n,)](
                    *(part, labels, temperature, bits, partial, log_probs, stats, *others),
                    *(strides[0], count, *strides[1:], inputs.ignore_index),
                    **common,
                    CP=_power_of_2(chunks),
                    LOGSUMEXP=wanted.logsumexp,
                    num_warps=1,
                )
        self._warm.add(("forward", wanted, aligned, *_key_of(inputs)))
        return Results(log_probs, stats, entropy, logsumexp, argmax, sum_p_squared)

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        from compiled_logprobs.backends import triton_gradient  # imports triton

        logits, labels, temperature, _ = inputs
        shape, bits = _constants_of(inputs), _over(temperature, LOG2_E)
        inverse_t = _over(temperature, 1.0)
        gradient = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        vector = 16 // logits.element_size()
        whole = shape.V % vector == 0 and layout_of(logits)[1]
        peeled = not whole and (inplace or _lie_alike(logits, gradient))
        block = min(BLOCK, _power_of_2(shape.V))
        blocks = -(-shape.V // block)
        g_entropy, g_logsumexp = (stats if each is None else each for each in (upstream.entropy, upstream.logsumexp))
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]  # torch's gap
            for part, strides in _launches(logits):
                triton_gradient.differentiate[(part.shape[:-1].numel() * blocks,)](
                    *(part, labels, temperature, bits, inverse_t, stats, upstream.log_probs, g_entropy, g_logsumexp),
                    *(part if inplace else gradient, strides[0], stats[0].numel(), *strides[1:], inputs.ignore_index),
                    **shape._asdict(),
                    BLOCKS=blocks,
                    BLOCK=block,
                    VECTOR=vector,
                    INPLACE=inplace,
                    ALIGNED=whole,
                    PEELED=peeled,
                    ENTROPY=upstream.entropy is not None,
                    LOGSUMEXP=upstream.logsumexp is not None,
                    enable_fp_fusion=False,
                    num_warps=max(1, min(4, block // 1024)),
                )
        through = upstream.entropy is not None, upstream.logsumexp is not None
        self._warm.add(("backward", *through, inplace, whole, *_key_of(inputs)))
        return gradient

    def fingerprint(self) -> str:
        files = ("triton.py", "triton_kernels.py", "triton_gradient.py")
        digest = digest_of(*(Path(__file__).with_name(name) for name in files))
        return f"{digest}, triton {_triton_version()}"


def _key(dtype: torch.dtype, vocab: int, labels_per_row: int, sliced: bool, per_token: bool) -> tuple[object, ...]:
    """What kernels of both directions are compiled for; they are for a dtype of labels, too, which no problem tells."""
    return dtype, vocab, labels_per_row, sliced, per_token


def _key_of(inputs: Inputs) -> tuple[object, ...]:
    shape = _constants_of(inputs)
    return _key(inputs.logits.dtype, shape.V, shape.K, shape.SLICED, shape.PER_TOKEN)


def _constants_of(inputs: Inputs) -> Constants:
    labels_per_row = inputs.labels.shape[-1]
    return Constants(
        inputs.logits.shape[-1],
        labels_per_row,
        _power_of_2(labels_per_row),
        inputs.logits.ndim > 2,
        isinstance(inputs.temperature, Tensor),
    )


def _launches(logits: Tensor) -> Iterator[tuple[Tensor, tuple[int, int, int, int]]]:
    """Parts [N, V] or [A, B, V] of `logits`; of each the number of its first row, B, and the strides of A and B."""
    for index in product(*(range(size) for size in logits.shape[:-3])):
        part = logits[index]
        first = 0
        for place, size in zip(index, logits.shape, strict=False):
            first = first * size + place
        inner = part.shape[-2]
        yield part, (first * part.shape[:-1].numel(), inner, part.stride(0), part.stride(-2))


def _lie_alike(logits: Tensor, gradient: Tensor) -> bool:
    """Whether each row of `logits` starts as many bytes after a multiple of 16 as that of `gradient` [..., V]."""
    size = logits.element_size()
    steps = zip(logits.stride()[:-1], gradient.stride()[:-1], strict=True)
    return (logits.data_ptr() - gradient.data_ptr()) % 16 == 0 and all((a - b) * size % 16 == 0 for a, b in steps)


def _over(temperature: float | Tensor, number: float) -> float:
    """`number` / T, rounded as the kernels round it for each row where there is a T for each."""
    return 0.0 if isinstance(temperature, Tensor) else number / c_float(temperature).value


def _power_of_2(number: int) -> int:
    """The next."""
    return 1 << (number - 1).bit_length()


def _warp_size() -> int:
    return 64 if torch.version.hip else 32


@lru_cache(maxsize=1)
def _why_no_kernels() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    try:
        from compiled_logprobs.backends import triton_gradient  # noqa: F401  to see whether it can be
    except Exception as error:  # noqa: BLE001  triton, and what it imports, may raise anything
        return f"its kernels cannot be loaded: {type(error).__name__}: {error}"
    return None


def _why_not_this_device() -> str | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if capability >= LEAST_CAPABILITY:
        return None
    least = ".".join(map(str, LEAST_CAPABILITY))
    return f"needs compute capability {least} or newer, and this device has {capability[0]}.{capability[1]}"


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
