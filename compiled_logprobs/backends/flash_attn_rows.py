"""The one Triton kernel that the `flash_attn` backend adds to flash-attn's own.

flash-attn multiplies an ignored row's softmax by an upstream gradient of 0: NaN where the row holds NaN or +inf.

Shapes: N rows, V vocabulary.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]  # it has no stubs and is optional
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]  # likewise

BLOCK = 4 * 1024


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]  # triton has no stubs
def zero_ignored_rows(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    gradient_NV_ptr, ignored_N_ptr, V, gradient_row_stride, BLOCK: tl.constexpr
):
    """Write 0 over the rows of `gradient` [N, V] that are ignored; the others are neither read nor written.

    One program a row, and not one a block: where nothing is ignored, it costs N programs that load one byte, no more.
    """
    row = tl.program_id(0)
    if tl.load(ignored_N_ptr + row):
        gradient_V_ptr = gradient_NV_ptr + row.to(tl.int64) * gradient_row_stride
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(gradient_V_ptr + columns, 0.0, mask=columns < V)
