"""The Triton kernel of the `triton` backend, backward: one, with the whole contract.

A program takes a block of a row, and loads what holds for the row once. What stands in `triton_kernels.py` of ignored
rows, of exponents and of sums holds here, too.

Shapes: N rows, V vocabulary, K labels a row (padded to KP), S statistics of a row.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]  # it has no stubs and is optional
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]  # likewise

from compiled_logprobs.backends.triton_kernels import (
    LN_2,
    LOG2_E,
    bounded,
    is_valid,
    jit,
    labels_of,
    start_of,
    temperature_of,
)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gradient_at(  # type: ignore[no-untyped-def]
    x_ptr,
    labels_K_ptr,
    upstream_K_ptr,
    offsets,
    inside,
    columns,
    first,
    end,
    ignore_index,
    m,
    bits,
    inverse_t,
    constant,
    slope,
    K: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """(g_y + e (constant + slope d)) / T, with d and e as in `reduce_chunks`, for `columns` in [first, end)."""
    x = tl.load(x_ptr + offsets, mask=inside, eviction_policy="evict_first").to(tl.float32)
    d = (x - m) * bits
    if ENTROPY:
        d = bounded(d)
        total = tl.exp2(d) * tl.fma(d, slope, constant)
    else:
        total = tl.exp2(d) * constant
    for k in range(K):
        y = tl.load(labels_K_ptr + k).to(tl.int64)
        if (y >= first) & (y < end) & (y != ignore_index):
            total += tl.where(columns == (y - first).to(tl.int32), tl.load(upstream_K_ptr + k), 0.0)
    return total * inverse_t


@jit
def differentiate(  # type: ignore[no-untyped-def]
    logits_NV_ptr,
    labels_NK_ptr,
    temperature,
    bits,
    inverse_t,
    stats_SN_ptr,
    upstream_NK_ptr,
    upstream_entropy_N_ptr,
    upstream_logsumexp_N_ptr,
    gradient_NV_ptr,
    first_row: tl.int64,
    all_rows: tl.int64,
    inner_rows: tl.int32,
    outer_stride: tl.int64,
    row_stride: tl.int64,
    ignore_index: tl.int64,
    V: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    SLICED: tl.constexpr,
    INPLACE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PEELED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
):
    """The gradient of a block of a row. Exactly 0 where the row is ignored, which is not read then.

    `PEELED` is for rows that start anywhere: the first few columns, up to a multiple of 16 bytes, and the last few are
    the first program's, and those between are loaded and stored 16 bytes at a time.
    """
    program = tl.program_id(0)
    in_launch, block = program // BLOCKS, program % BLOCKS
    row = first_row + in_launch
    start = start_of(in_launch, inner_rows, outer_stride, row_stride, SLICED)
    row_V_ptr = logits_NV_ptr + start
    gradient_V_ptr = gradient_NV_ptr + (start if INPLACE else row * V)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    peel, body = 0, V
    if PEELED:
        peel = tl.minimum(((16 - gradient_V_ptr.to(tl.int64) % 16) % 16).to(tl.int32) // (16 // VECTOR), V)
        body = (V - peel) // VECTOR * VECTOR
        edge = tl.arange(0, 2 * VECTOR)
        edge_columns = tl.where(edge < VECTOR, edge, peel + body - VECTOR + edge)
        edge_inside = (edge_columns < V) & ((edge < peel) | (edge >= VECTOR))
        edge_total = tl.zeros([2 * VECTOR], tl.float32)
        x_ptr, gradient_ptr = tl.multiple_of(row_V_ptr + peel, 16), tl.multiple_of(gradient_V_ptr + peel, 16)
    elif ALIGNED:
        x_ptr, gradient_ptr = tl.multiple_of(row_V_ptr, 16), tl.multiple_of(gradient_V_ptr, 16)
    else:
        x_ptr, gradient_ptr = row_V_ptr, gradient_V_ptr
    inside = offsets < body
    total = tl.zeros([BLOCK], tl.float32)

    y_K, ignored_K = labels_of(labels_NK_ptr, row, ignore_index, K, KP)
    if tl.min(ignored_K.to(tl.int32), 0) == 0:
        k = tl.arange(0, KP)
        g_K = tl.load(upstream_NK_ptr + row * K + k, mask=ignored_K == 0, other=0.0)
        constant = -tl.sum(g_K, 0)
        t, bits = temperature_of(temperature, bits, row, PER_TOKEN)
        valid = is_valid(y_K, ignored_K, t, V)
        if PER_TOKEN:
            inverse_t = tl.div_rn(1.0, t)
        inverse_t = tl.where(valid, inverse_t, float("nan"))
        m, log_s = tl.load(stats_SN_ptr + row), tl.load(stats_SN_ptr + all_rows + row)
        inverse_s = tl.exp2(-log_s * LOG2_E)
        if LOGSUMEXP:
            constant += tl.load(upstream_logsumexp_N_ptr + row)
        slope = 0.0
        if ENTROPY:
            h = tl.load(upstream_entropy_N_ptr + row)
            constant += h * (log_s - tl.load(stats_SN_ptr + 2 * all_rows + row))
            slope = -h * LN_2 * inverse_s
        constant *= inverse_s
        labels_K_ptr, upstream_K_ptr = labels_NK_ptr + row * K, upstream_NK_ptr + row * K
        # fmt: off
        total = _gradient_at(
            x_ptr, labels_K_ptr, upstream_K_ptr, offsets, inside, tl.arange(0, BLOCK), peel + block * BLOCK,
            tl.minimum(peel + (block + 1) * BLOCK, peel + body), ignore_index, m, bits, inverse_t, constant, slope, K,
            ENTROPY,
        )
        if PEELED:  # noqa: SIM102  this is known when it is compiled, and what is inside only then
            if block == 0:
                edge_total = _gradient_at(
                    row_V_ptr, labels_K_ptr, upstream_K_ptr, edge_columns, edge_inside, edge_columns, 0, V,
                    ignore_index, m, bits, inverse_t, constant, slope, K, ENTROPY,
                )
        # fmt: on
    tl.store(gradient_ptr + offsets, total.to(gradient_NV_ptr.dtype.element_ty), mask=inside)
    if PEELED:
        edge_inside &= block == 0
        tl.store(gradient_V_ptr + edge_columns, edge_total.to(gradient_NV_ptr.dtype.element_ty), mask=edge_inside)
