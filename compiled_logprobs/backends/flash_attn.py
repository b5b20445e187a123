"""flash-attn's Triton cross entropy, negated: the cross entropy of a token is minus its log-probability.

The kernels are those of the installed flash-attn, loaded from their file without the package's `__init__`, which
imports a compiled extension that a torch upgrade often breaks. They are launched here rather than by flash-attn's
autograd function, which allocates the gradient of each launch itself: logits with more than one stride between rows
take several launches, and their gradients would have to be copied together.

Shapes: ... leading dimensions, N the last of these and so the rows of one launch, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends.base import Backend
from compiled_logprobs.backends.fingerprint import digest_of
from compiled_logprobs.operation import contract
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted, clean, clean_upstream, finish
from compiled_logprobs.problem import Layout, Problem, layout_of

FORWARD_BLOCK = 16 * 1024
BACKWARD_BLOCK = 4 * 1024
"""The largest blocks of columns, as in flash-attn's own launches."""

NEVER = -1
"""An `ignore_index` that no label equals; ignored labels are seen to outside the kernels."""


class FlashAttn(Backend):
    """flash-attn's Triton cross entropy, negated."""

    name = "flash_attn"
    summary = "flash-attn's Triton cross entropy, negated"
    row_invariant = True  # a program a row, whose blocks follow from V

    def __init__(self) -> None:
        self._warm: set[tuple[object, ...]] = set()

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda":  # which is what torch calls ROCm, too
            return "needs a CUDA or ROCm device"
        if problem.dtype == torch.float64:
            return "computes in float32; float64 logits are for eager"
        if problem.entropy or problem.argmax or problem.sum_p_squared:
            return "computes log-probabilities and their logsumexp alone"
        if problem.logsumexp and problem.needs_grad:
            return "has no gradient of the logsumexp"
        if problem.labels_per_row != 1:
            return f"takes one label a row, not {problem.labels_per_row}"
        if problem.temperature == "per_token":
            return "takes one temperature for all rows, not one a token"
        if problem.masked_logits:
            return f"returns NaN for rows whose first {FORWARD_BLOCK} columns are all masked out (flash-attention#1930)"
        if problem.vocab == 1:
            return "flash-attn's kernel does not compile for rows of one column"
        loaded = _load()
        return loaded if isinstance(loaded, str) else None

    def is_warm(self, problem: Problem) -> bool:
        # Triton compiles once for each combination of what is a multiple of 16 and what is not, and where a row or a
        # gradient is not aligned, the combination follows from more than a Problem tells.
        if not problem.aligned or problem.vocab * problem.dtype.itemsize % 16 != 0:
            return False
        directions = ["forward", "in-place" if problem.inplace_backward else "backward"]
        needed = directions if problem.needs_grad else directions[:1]
        return all(_key(direction, problem.vocab, problem.dtype, problem.layout) in self._warm for direction in needed)

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        logits, rows = inputs.logits, clean(inputs)
        kernel = kernel_module().cross_entropy_fwd_kernel
        losses, lse, z_losses = (_aligned_empty(logits.shape[:-1], torch.float32, logits.device) for _ in range(3))
        y = _aligned(rows.labels.squeeze(-1))
        with _device_of(logits):
            for launch in _launches(logits):
                kernel[(logits.shape[-2],)](
                    loss_ptr=losses[launch],
                    lse_ptr=lse[launch],
                    z_loss_ptr=z_losses[launch],
                    logits_ptr=logits[launch],
                    labels_ptr=y[launch],
                    logits_row_stride=_row_stride(logits),
                    SPLIT=False,
                    PRECOMPUTED_LSE=False,
                    **_settings(logits.shape[-1], rows.temperature, FORWARD_BLOCK),
                )
        self._remember("forward", logits)
        # The kernels divide by the temperature before they take the logarithm of the sum: log s is 0 relative to that.
        m = lse * inputs.temperature
        return finish(rows, wanted, losses.neg_().unsqueeze(-1), m, torch.zeros_like(m))

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        kernels = kernel_module()
        from compiled_logprobs.backends import flash_attn_rows  # imports triton

        logits, rows = inputs.logits, clean(inputs)
        upstream = clean_upstream(rows, upstream)
        vocab, settings = logits.shape[-1], _settings(logits.shape[-1], rows.temperature, BACKWARD_BLOCK)
        blocks = -(-vocab // settings["BLOCK_SIZE"])
        gradient = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        grad_losses = _aligned(-upstream.log_probs.squeeze(-1))
        y, lse = _aligned(rows.labels.squeeze(-1)), _aligned(stats[0] / inputs.temperature + stats[1])
        ignored = _aligned(rows.dropped)
        with _device_of(logits):
            for launch in _launches(logits):
                kernels.cross_entropy_bwd_kernel[(logits.shape[-2], blocks)](
                    dlogits_ptr=gradient[launch],
                    dloss_ptr=grad_losses[launch],
                    logits_ptr=logits[launch],
                    lse_ptr=lse[launch],
                    labels_ptr=y[launch],
                    logits_row_stride=_row_stride(logits),
                    dlogits_row_stride=_row_stride(gradient),
                    dloss_row_stride=1,
                    **settings,
                )
                flash_attn_rows.zero_ignored_rows[(logits.shape[-2],)](
                    gradient[launch], ignored[launch], vocab, _row_stride(gradient), BLOCK=flash_attn_rows.BLOCK
                )
        self._remember("in-place" if inplace else "backward", logits)
        return gradient

    def fingerprint(self) -> str:
        digest = digest_of(Path(__file__), Path(__file__).with_name("flash_attn_rows.py"), Path(contract.__file__))
        return f"{digest}, flash-attn {_flash_attn_version()}, triton {_triton_version()}"

    def _remember(self, direction: str, logits: Tensor) -> None:
        layout, aligned = layout_of(logits)
        if aligned:
            self._warm.add(_key(direction, logits.shape[-1], logits.dtype, layout))


def _key(direction: str, vocab: int, dtype: torch.dtype, layout: Layout) -> tuple[object, ...]:
    return direction, vocab, dtype, layout


def _settings(vocab: int, temperature: float | Tensor, largest_block: int) -> dict[str, Any]:
    """What both kernels are launched with; blocks and warps are flash-attn's own choices."""
    assert not isinstance(temperature, Tensor), "why_not refuses a temperature per token"
    block = min(1 << (vocab - 1).bit_length(), largest_block)
    return {
        "smoothing": 0.0,
        "logit_scale": 1.0 / temperature,
        "lse_square_scale": 0.0,
        "ignore_index": NEVER,
        "total_classes": vocab,
        "class_start_idx": 0,
        "n_cols": vocab,
        "BLOCK_SIZE": block,
        "num_warps": 4 if block < 2048 else 8 if block < 8192 else 16,
    }


def _launches(logits: Tensor) -> Iterator[tuple[int, ...]]:
    """Indices [...] of the [N, V] that have one stride from row to row."""
    return product(*(range(size) for size in logits.shape[:-2]))


def _device_of(logits: Tensor) -> AbstractContextManager[Any]:
    """The device to launch on, which Triton takes from the context; nothing for tensors on the CPU."""
    context: AbstractContextManager[Any] = torch.cuda.device_of(logits)  # type: ignore[no-untyped-call]  # torch's gap
    return context


def _row_stride(logits: Tensor) -> int:
    # A single row may have any stride, and Triton would compile anew for some of them.
    return logits.stride(-2) if logits.shape[-2] > 1 else logits.shape[-1]


def _aligned_empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [..., N], in which each [N] starts at a multiple of 16 bytes."""
    whole = -(-shape[-1] // 16) * 16  # elements, and so enough for any dtype
    return torch.empty(*shape[:-1], whole, dtype=dtype, device=device)[..., : shape[-1]]


def _aligned(vectors: Tensor) -> Tensor:
    """`vectors` [..., N], copied unless each [N] starts at a multiple of 16 bytes.

    flash-attn aligns labels because Triton has loaded wrong ones where they were not (its commit bedf8774); for the
    other vectors it saves compiling once more for each alignment.
    """
    steps = [step * vectors.element_size() for step in vectors.stride()[:-1]]
    if all(address % 16 == 0 for address in (vectors.data_ptr(), *steps)):
        return vectors
    return _aligned_empty(vectors.shape, vectors.dtype, vectors.device).copy_(vectors)


def kernel_module() -> ModuleType:
    loaded = _load()
    assert not isinstance(loaded, str), loaded
    return loaded


@lru_cache(maxsize=1)
def _load() -> ModuleType | str:
    """flash-attn's module of the cross entropy, executed apart from its package; or why there is none."""
    try:
        package = find_spec("flash_attn")  # looks for it, and does not execute it
        if package is None:
            return "flash-attn is not installed: pip install flash-attn"
        folders = [Path(folder) for folder in package.submodule_search_locations or ()]
        files = [file for folder in folders if (file := folder / "ops" / "triton" / "cross_entropy.py").is_file()]
        spec = spec_from_file_location("_flash_attn_cross_entropy", files[0]) if files else None
        if spec is None or spec.loader is None:
            return "the flash_attn package that is installed has no ops/triton/cross_entropy.py"
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        if "PRECOMPUTED_LSE" not in module.cross_entropy_fwd_kernel.arg_names:
            return f"needs the kernels of flash-attn 2.7 or newer, and this is {_flash_attn_version()}"
    except Exception as error:  # noqa: BLE001  foreign code, and what it imports, may raise anything
        return f"flash-attn's kernel cannot be loaded: {type(error).__name__}: {error}"
    return module


def _flash_attn_version() -> str:
    try:
        return version("flash-attn")
    except PackageNotFoundError:
        return "none"


def _triton_version() -> str:
    try:
        import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]  # no stubs, and optional
    except ImportError:
        return "none"
    return str(triton.__version__)
