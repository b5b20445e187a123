"""The Triton kernels of the `triton` backend, forward: two, each with the whole contract of its part.

* `reduce_chunks` reads the logits, once. A program takes a chunk of a row, whose columns are fixed, so that a row has
  the same bits whatever N it came with. Each thread follows its own maximum over vectors of 8 columns: that costs
  1 + 1/8 exponentials a logit, and no thread waits for another before the end of the chunk.
* `combine_chunks` makes finished numbers of a few numbers a chunk.

Ignored rows are neither read nor computed. 64-bit arithmetic is confined to where a row starts. A sum of products is
written as `tl.fma`, and the compiler is told to form no others: what else is asked for changes no bit.

Exponents are in bits, for exp2 is a GPU's own instruction. The maximum is subtracted before the multiplication with
log2(e) / T. To multiply first would save an instruction a logit, and lose the difference of large logits: at
temperatures near 0, and where a mask is -1e9 in place of -inf.

Shapes: N rows, V vocabulary, K labels a row (padded to KP), C chunks of a row (padded to CP), R vectors of 8 columns.
"""

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]  # it has no stubs and is optional
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]  # likewise

LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
"""Of float32; the maximum of nothing yet, from which -inf can be subtracted."""
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LEAST: tl.constexpr = tl.constexpr(-1000.0)
"""Bits; bounds an exponent from below, so that a probability of 0 times its logarithm counts 0 and not NaN."""


def jit(function: Callable[..., None]) -> Any:
    """A kernel that is compiled once for all N, strides, alignments and temperatures."""
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    varying = [name for name in arguments if function.__annotations__.get(name) is not tl.constexpr]
    return triton.jit(function, do_not_specialize=varying)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]  # triton has no stubs
def start_of(row, inner_rows, outer_stride, row_stride, SLICED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements from the first row of a launch to `row`."""
    start = row.to(tl.int64) * row_stride
    if SLICED:
        start = (row // inner_rows).to(tl.int64) * outer_stride + (row % inner_rows).to(tl.int64) * row_stride
    return start


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def labels_of(labels_NK_ptr, row, ignore_index, K: tl.constexpr, KP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Labels [KP] of `row`, and which of them are ignored."""
    k = tl.arange(0, KP)
    y_K = tl.load(labels_NK_ptr + row * K + k, mask=k < K, other=0).to(tl.int64)
    return y_K, (y_K == ignore_index) | (k >= K)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def is_valid(y_K, ignored_K, t, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether all labels that count are in range, and the temperature is."""
    outside_K = ((y_K < 0) | (y_K >= V)) & (ignored_K == 0)
    return (tl.max(outside_K.to(tl.int32), 0) == 0) & (t >= TINY) & (t <= -LOWEST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def temperature_of(temperature, bits, row, PER_TOKEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """T of `row`, and log2(e) / T, which is given where all rows have one T."""
    if PER_TOKEN:
        temperature = tl.load(temperature + row)
        bits = tl.div_rn(LOG2_E, temperature)
    return temperature, bits


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def bounded(d):  # type: ignore[no-untyped-def]
    """`d`, bounded from below; NaN stays, which a GPU's own maximum drops."""
    return tl.maximum(d, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _vectors(row_V_ptr, first, V: tl.constexpr, R: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """R vectors of 8 columns from the column `first` on: their left and right halves, float32 [R, 4] each.

    A thread has whole vectors in each case, so that sums have the same bits however a row lies in memory.
    """
    at_R = first + tl.arange(0, R) * 8
    left = at_R[:, None] + tl.arange(0, 4)[None, :]
    if ALIGNED and row_V_ptr.dtype.element_ty == tl.float32:  # of which 16 bytes, as much as a load takes, are 4
        left_R4 = tl.load(row_V_ptr + left, mask=left < V, other=float("-inf"), eviction_policy="evict_first")
        right_R4 = tl.load(row_V_ptr + left + 4, mask=left + 4 < V, other=float("-inf"), eviction_policy="evict_first")
    elif ALIGNED:
        columns = at_R[:, None] + tl.arange(0, 8)[None, :]
        x_R8 = tl.load(row_V_ptr + columns, mask=columns < V, other=float("-inf"), eviction_policy="evict_first")
        left_R4, right_R4 = tl.split(tl.permute(tl.reshape(x_R8, [R, 2, 4]), 0, 2, 1))
    else:
        x02_R2 = tl.join(_column(row_V_ptr, at_R, V), _column(row_V_ptr, at_R + 2, V))
        x13_R2 = tl.join(_column(row_V_ptr, at_R + 1, V), _column(row_V_ptr, at_R + 3, V))
        x46_R2 = tl.join(_column(row_V_ptr, at_R + 4, V), _column(row_V_ptr, at_R + 6, V))
        x57_R2 = tl.join(_column(row_V_ptr, at_R + 5, V), _column(row_V_ptr, at_R + 7, V))
        left_R4 = tl.reshape(tl.join(x02_R2, x13_R2), [R, 4])
        right_R4 = tl.reshape(tl.join(x46_R2, x57_R2), [R, 4])
    return left_R4.to(tl.float32), right_R4.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _column(row_V_ptr, at_R, V: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(row_V_ptr + at_R, mask=at_R < V, other=float("-inf")).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sum(a_R4, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Over the 4, pair by pair: in a fixed order, within a thread."""
    even_R2, odd_R2 = tl.split(tl.reshape(a_R4, [R, 2, 2]))
    even_R, odd_R = tl.split(even_R2 + odd_R2)
    return even_R + odd_R


@jit
def reduce_chunks(  # type: ignore[no-untyped-def]
    logits_NV_ptr,
    labels_NK_ptr,
    temperature,
    bits,
    partial_NFC_ptr,
    first_row: tl.int64,
    inner_rows: tl.int32,
    outer_stride: tl.int64,
    row_stride: tl.int64,
    ignore_index: tl.int64,
    V: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    SLICED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    ARGMAX: tl.constexpr,
):
    """Of each chunk the maximum m, the sum of e, and where wanted the sums of e d and of e e, and where m is.

    With d = (x - m) log2(e) / T and e = exp2(d). The fields of `partial` [N, F, C] are in this order. The last is the
    first vector that holds m.
    """
    program = tl.program_id(0)
    in_launch, chunk = program // C, program % C
    row = first_row + in_launch
    _, ignored_K = labels_of(labels_NK_ptr, row, ignore_index, K, KP)
    if tl.min(ignored_K.to(tl.int32), 0) == 0:
        row_V_ptr = logits_NV_ptr + start_of(in_launch, inner_rows, outer_stride, row_stride, SLICED)
        if ALIGNED:
            row_V_ptr = tl.multiple_of(row_V_ptr, 16)
        _t, bits = temperature_of(temperature, bits, row, PER_TOKEN)
        m = tl.full([R], LOWEST, tl.float32)
        s = tl.zeros([R], tl.float32)
        q = tl.zeros([R], tl.float32)
        z = tl.zeros([R], tl.float32)
        best = tl.full([R], float("-inf"), tl.float32)
        best_at = tl.zeros([R], tl.int32)
        for start in range(0, STEPS, UNROLL):
            for step in tl.static_range(UNROLL):
                first = (chunk * STEPS + start + step) * (R * 8)
                x0_R4, x1_R4 = _vectors(row_V_ptr, first, V, R, ALIGNED)
                peak = tl.max(tl.maximum(x0_R4, x1_R4), 1)
                top = tl.maximum(m, peak)
                d0_R4, d1_R4 = (x0_R4 - top[:, None]) * bits, (x1_R4 - top[:, None]) * bits
                if ENTROPY:
                    d0_R4, d1_R4 = bounded(d0_R4), bounded(d1_R4)
                e0_R4, e1_R4 = tl.exp2(d0_R4), tl.exp2(d1_R4)
                back = (m - top) * bits
                w = tl.exp2(back)
                if ENTROPY:
                    ed = _sum(tl.fma(e0_R4, d0_R4, e1_R4 * d1_R4), R)
                    q = tl.fma(w, tl.fma(s, tl.maximum(back, LEAST), q), ed)
                if SQUARES:
                    z = tl.fma(w * w, z, _sum(tl.fma(e0_R4, e0_R4, e1_R4 * e1_R4), R))
                if ARGMAX:
                    best_at = tl.where(peak > best, first // 8 + tl.arange(0, R), best_at)
                    best = tl.maximum(best, peak)
                s = tl.fma(w, s, _sum(e0_R4 + e1_R4, R))
                m = top
        place = partial_NFC_ptr + row * ((2 + ENTROPY + SQUARES + ARGMAX) * C) + chunk
        top = tl.max(m, 0)
        back = (m - top) * bits
        w = tl.exp2(back)
        tl.store(place, top)
        tl.store(place + C, tl.sum(w * s, 0))
        if ENTROPY:
            tl.store(place + 2 * C, tl.sum(w * tl.fma(s, tl.maximum(back, LEAST), q), 0))
        if SQUARES:
            tl.store(place + (2 + ENTROPY) * C, tl.sum(w * w * z, 0))
        if ARGMAX:
            vector = tl.min(tl.where(best == tl.max(best, 0), best_at, V), 0)
            tl.store(place + (2 + ENTROPY + SQUARES) * C, vector.to(tl.float32))  # exact below 2^24


@jit
def combine_chunks(  # type: ignore[no-untyped-def]
    logits_NV_ptr,
    labels_NK_ptr,
    temperature,
    bits,
    partial_NFC_ptr,
    log_probs_NK_ptr,
    stats_SN_ptr,
    entropy_N_ptr,
    logsumexp_N_ptr,
    argmax_N_ptr,
    sum_p_squared_N_ptr,
    first_row: tl.int64,
    all_rows: tl.int64,
    inner_rows: tl.int32,
    outer_stride: tl.int64,
    row_stride: tl.int64,
    ignore_index: tl.int64,
    V: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    SLICED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    SQUARES: tl.constexpr,
    ARGMAX: tl.constexpr,
):
    """Everything that is returned of a row, with its ignored, invalid and NaN cases, and `stats` [S, N]."""
    in_launch = tl.program_id(0)
    row = first_row + in_launch
    row_V_ptr = logits_NV_ptr + start_of(in_launch, inner_rows, outer_stride, row_stride, SLICED)
    y_K, ignored_K = labels_of(labels_NK_ptr, row, ignore_index, K, KP)
    counts = tl.min(ignored_K.to(tl.int32), 0) == 0  # where it does not, `partial` holds anything
    t, bits = temperature_of(temperature, bits, row, PER_TOKEN)
    valid = is_valid(y_K, ignored_K, t, V)

    chunk = tl.arange(0, CP)
    place = partial_NFC_ptr + row * ((2 + ENTROPY + SQUARES + ARGMAX) * C) + chunk
    there = (chunk < C) & counts
    m_C = tl.load(place, mask=there, other=LOWEST)
    s_C = tl.load(place + C, mask=there, other=0.0)
    m = tl.max(m_C, 0)
    back = (m_C - m) * bits
    w = tl.exp2(back)
    s = tl.sum(w * s_C, 0)
    of_stats = tl.where(s > 0.0, m, tl.where(s == 0.0, float("-inf"), float("nan")))
    s = tl.where(s > 0.0, s, float("nan"))  # 0 where all is -inf
    log_s = tl.log2(s) * LN_2
    tl.store(stats_SN_ptr + row, of_stats)
    tl.store(stats_SN_ptr + all_rows + row, log_s)

    k = tl.arange(0, KP)
    x_K = tl.load(row_V_ptr + y_K, mask=(ignored_K == 0) & (y_K >= 0) & (y_K < V), other=0.0).to(tl.float32)
    log_p_K = tl.div_rn(x_K - m, t) - log_s
    log_p_K = tl.where(log_p_K > 0.0, 0.0, log_p_K)  # NaN is not above 0
    log_p_K = tl.where(ignored_K, 0.0, tl.where(valid, log_p_K, float("nan")))
    tl.store(log_probs_NK_ptr + row * K + k, log_p_K, mask=k < K)
    if ENTROPY:
        q_C = tl.load(place + 2 * C, mask=there, other=0.0)
        q = tl.sum(w * tl.fma(s_C, tl.maximum(back, LEAST), q_C), 0)
        h = log_s - q * LN_2 / s
        h = tl.where(h < 0.0, 0.0, h)
        tl.store(stats_SN_ptr + 2 * all_rows + row, h)
        tl.store(entropy_N_ptr + row, tl.where(counts, tl.where(valid, h, float("nan")), 0.0))
    if LOGSUMEXP:
        lse = tl.div_rn(m, t) + log_s
        tl.store(logsumexp_N_ptr + row, tl.where(counts, tl.where(valid, lse, float("nan")), 0.0))
    if SQUARES:
        z_C = tl.load(place + (2 + ENTROPY) * C, mask=there, other=0.0)
        z = tl.sum(w * w * z_C, 0) / (s * s)
        tl.store(sum_p_squared_N_ptr + row, tl.where(counts, tl.where(valid, z, float("nan")), 0.0))
    if ARGMAX:
        vector_C = tl.load(place + (2 + ENTROPY + SQUARES) * C, mask=there, other=0.0)
        vector = tl.min(tl.where(there & (m_C == m), vector_C, 1.0 * V), 0).to(tl.int32)
        columns = vector * 8 + tl.arange(0, 8)
        x_8 = tl.load(row_V_ptr + columns, mask=(columns < V) & counts, other=float("-inf")).to(tl.float32)
        first = tl.min(tl.where(x_8 == m, columns, V), 0)
        tl.store(argmax_N_ptr + row, tl.where(counts & valid & (s == s), first, -1).to(tl.int64))
