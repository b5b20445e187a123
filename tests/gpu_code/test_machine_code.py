"""Counting what a thread does, on a few lines of source, PTX and SASS."""

import pytest

from tests.gpu_code.data_sheets import GPUS, data_sheet
from tests.gpu_code.machine_code import read, trips

SOURCE = """
@triton.jit
def helper(a):
    return a

@triton.jit
def kernel(in_ptr0, ignored_ptr, out_ptr0, n_cols, r0_numel, R0_BLOCK: tl.constexpr, WIDE: tl.constexpr):
    r0_numel = 4096
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tl.load(in_ptr0 + r0_offset)
    if WIDE:
        for i in range(3):
            pass
    for i in tl.static_range(4):
        pass
    if tl.load(ignored_ptr):
        for start in range(0, n_cols, R0_BLOCK):
            pass
"""
PTX = """
.visible .entry kernel(
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mad.wide.s32 	%rd3, %r1, 2, %rd1;
$L__BB0_1:
	@%p1 ld.global.L1::evict_last.L2::cache_hint.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd3 + 0 ], %rd9;
	add.s64 	%rd3, %rd3, 32;
	@%p2 bra 	$L__BB0_1;
	ld.global.b64 { %rd5 }, [ %rd2 + 0 ];
	shl.b64 	%rd6, %rd5, 1;
	add.s64 	%rd7, %rd1, %rd6;
	ld.global.nc.b16 { %rs1 }, [ %rd7 + 0 ];
	st.global.b32 [ %rd2 + 0 ], { %r7 };
"""
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00000a0000017a02 */
        /*0010*/              @!P0 LDG.E.EL.128 R16, desc[UR8][R2.64] ;
        /*0020*/                   MUFU.EX2 R32, R32 ;
        /*0030*/                   BRA.U !UP4, 0x10 ;
        /*0040*/                   MUFU.RCP R32, R32 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
        /*0070*/                   NOP;
"""


def test_loops_run_as_often_as_the_source_says():
    numbers = {"n_cols": 5000, "R0_BLOCK": 1024}
    assert trips(SOURCE, {**numbers, "WIDE": False}) == [4, 0]  # the last is for ignored rows
    assert trips(SOURCE, {**numbers, "WIDE": True}) == [4, 3, 0]
    with pytest.raises(RuntimeError, match=r"how often `tl.range\(0, r0_numel, R0_BLOCK\)` loops is not known"):
        trips(SOURCE, {"WIDE": False})


def test_a_threads_work_is_counted_with_its_loops():
    work = read(PTX, SASS, ("logits", "labels"), [10])
    assert (work.instructions, work.special, work.exponentials) == (33, 11, 10)
    assert work.loaded == {"logits": 10 * 16 + 2, "labels": 8}  # the logit at a label that was loaded is a logit
    assert work.stored == {"labels": 4}
    with pytest.raises(RuntimeError, match="the source has 2 loops, and the assembled code 1"):
        read(PTX, SASS, ("logits", "labels"), [10, 3])
    with pytest.raises(RuntimeError, match="the source has 1 loops, and the assembled code 0"):
        read(PTX, SASS.replace("0x10 ;", "0x60 ;"), ("logits", "labels"), [10])


def test_the_data_sheets():
    for gpu in GPUS:
        assert gpu.source.startswith("https://")
        assert 0.5e12 < gpu.bandwidth < 1e13 and gpu.capability >= (8, 0)
        assert gpu.instructions_per_second == 8 * gpu.special_per_second
    assert data_sheet().name == data_sheet("sm_90").name == "H100"
    assert data_sheet("sm_90", "h200").name == "H200"
    assert data_sheet(name="rtx 4090").arch == "sm_89"
