"""What the code generated for GPUs does, on a machine without one; and that its inspection would notice if it did not."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from compiled_logprobs.backends import flash_attn
from compiled_logprobs.cli.main import app
from compiled_logprobs.errors import BackendUnavailable, InputError
from compiled_logprobs.operation import formula
from compiled_logprobs.problem import Problem
from tests.gpu_code.data_sheets import GPUS, gpu_for
from tests.gpu_code.generated_code import TESTED_WITH, generate
from tests.gpu_code.inspection import NOT_MEASURED, Direction, Inspection, analyse, inspect, inspect_function

TESTS = Path(__file__).parent
ARCHS = ("sm_80", "sm_90", "sm_100")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, VOCAB = 8192, 151936


@cache
def inspected(arch: str, dtype: torch.dtype, rows: int = ROWS, vocab: int = VOCAB, **options: bool) -> Inspection:
    return inspect(Problem("cuda", rows, vocab, dtype, needs_grad=True, **options), gpu_for(arch))


def check(found: Inspection) -> None:
    """What is promised of every GPU."""
    forward, backward = found.forward, found.backward
    assert forward.kernels == 2 * sum(kernel.launches for kernel in forward.kernel_reports[:1])
    assert (forward.logits_reads, forward.gradient_writes, forward.nxv_float32_buffers, forward.spills) == (1, 0, 0, 0)
    assert (backward.kernels, backward.logits_reads, backward.gradient_writes) == (1, 1, 1)
    assert (backward.nxv_float32_buffers, backward.spills) == (0, 0)
    # The one kernel that reads the logits reads them once, and leaves nothing to the cache; the other combines.
    assert forward.kernel_reports[0].repeated_loads_in_l1 == 0
    assert [round(kernel.logits_reads, 3) for kernel in forward.kernel_reports] == [1, 0]
    assert all(kernel.candidates == 1 for kernel in forward.kernel_reports)
    assert forward.minimum_bytes <= forward.bytes <= 1.013 * forward.minimum_bytes
    assert backward.minimum_bytes <= backward.bytes <= 1.0001 * backward.minimum_bytes
    assert 1 <= forward.exponentials_per_logit < 1.02 and backward.exponentials_per_logit == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_one_read_forward_and_one_pass_backward_without_spills(arch, dtype):
    check(inspected(arch, dtype, entropy=True))


@pytest.mark.parametrize(("arch", "dtype"), [*zip(ARCHS, DTYPES, strict=True)], ids=ARCHS)
def test_without_the_entropy_and_in_place_and_beside_flash_attn(arch, dtype):
    found = inspected(arch, dtype, inplace_backward=True)
    check(found)
    for direction in (found.flash_attn.forward, found.flash_attn.backward):
        assert (direction.logits_reads, direction.nxv_float32_buffers, direction.spills) == (1, 0, 0)
        assert direction.minimum_bytes <= direction.bytes < 1.0001 * direction.minimum_bytes
    assert found.flash_attn.backward.gradient_writes == 1


@pytest.mark.parametrize(("arch", "dtype"), [*zip(ARCHS, DTYPES, strict=True)], ids=ARCHS)
def test_beyond_2_31_logits(arch, dtype):
    """Forward goes through the rows in parts, which 32-bit indices reach; backward indexes with 64 bits."""
    rows = 32768
    assert rows * VOCAB > 2**31
    found = inspected(arch, dtype, rows, entropy=True)
    check(found)
    assert [kernel.launches for kernel in found.forward.kernel_reports] == [3, 3]
    assert [kernel.index_bits for kernel in (*found.forward.kernel_reports, *found.backward.kernel_reports)] == [
        32,
        32,
        64,
    ]
    assert found.forward.notes == ("in 3 parts of 14064 rows at most, which 32-bit indices reach",)


def test_a_vocabulary_off_every_block_and_one_within_a_block():
    found = inspected("sm_90", torch.bfloat16, 4096, 128257)
    assert (found.forward.logits_reads, found.forward.spills, found.backward.spills) == (1, 0, 0)
    assert found.forward.kernel_reports[0].repeated_loads_in_l1 == 0
    small = inspected("sm_90", torch.float32, 4096, 32, entropy=True)
    assert (small.forward.kernels, small.forward.logits_reads, small.forward.spills) == (1, 1, 0)


def test_several_labels_a_row_take_small_kernels_beside_the_one_that_writes_the_gradient():
    found = inspect(Problem("cuda", ROWS, VOCAB, torch.bfloat16, needs_grad=True, labels_per_row=3), gpu_for("sm_90"))
    assert (found.forward.logits_reads, found.backward.logits_reads, found.backward.gradient_writes) == (1, 1, 1)
    assert found.backward.operations == ("aten.arange.default", "aten.index_put_.default")
    assert found.backward.kernels > 3 and found.backward.bytes < 1.001 * found.backward.minimum_bytes
    assert found.backward.nxv_float32_buffers == found.backward.spills == 0


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def of_function(function, dtype: torch.dtype = torch.bfloat16, arch: str = "sm_90", **more: torch.Tensor) -> Direction:
    arguments = {"logits": meta(ROWS, VOCAB, dtype=dtype), "labels": meta(ROWS, 1, dtype=torch.int64), **more}
    return inspect_function(function, arguments, gpu_for(arch))


def by_logsumexp(logits, labels):
    return logits.gather(-1, labels).float() - logits.float().logsumexp(-1, keepdim=True)


def by_online_softmax(logits, labels):
    return logits.float().log_softmax(-1).gather(-1, labels)


def in_one_level(logits, labels, temperature):
    return formula.forward(logits, labels, temperature, entropy=True)[:2]


def in_blocks(logits, labels, temperature):
    return formula.forward_in_blocks(logits, labels, temperature, entropy=True)[:2]


def returning_probabilities(logits, labels):
    return logits.float().softmax(-1)


def scattering(logits, labels, upstream):
    return torch.zeros_like(logits, dtype=torch.float32).scatter_add(-1, labels, upstream).to(logits.dtype)


def by_halves(logits, labels):
    left, right = logits.split(VOCAB // 2, -1)
    return left.float().amax(-1), right.float().exp().sum(-1), left.float().sum(-1)


def with_a_helper(logits, labels):
    return torch.cumsum(logits.float() * 2, -1).amax(-1)


def test_reads_of_parts_add_up():
    assert of_function(by_halves).logits_reads in (
        1,
        2,
    )  # one and a half, where both of the left are one kernel's, or not
    assert of_function(by_halves).kernel_reports[0].logits_reads > 0


def test_a_kernel_with_a_helper_function_is_followed():
    assert of_function(with_a_helper).logits_reads >= 1


def test_two_reads_are_noticed():
    assert of_function(by_logsumexp).logits_reads == 2
    assert of_function(in_one_level, temperature=meta()).logits_reads == 2


def test_the_online_softmax_is_one_read_at_two_exponentials_a_logit():
    found = of_function(by_online_softmax)
    assert found.logits_reads == 1
    assert found.exponentials_per_logit == 2


def test_a_float32_buffer_is_noticed():
    assert of_function(returning_probabilities).nxv_float32_buffers == 1
    assert of_function(returning_probabilities).gradient_writes == 1
    assert of_function(scattering, upstream=meta(ROWS, 1)).nxv_float32_buffers >= 1
    assert of_function(returning_probabilities, torch.float32).nxv_float32_buffers == 0  # the result itself


def test_a_block_that_is_loaded_twice_is_read_from_memory_once_and_said_to_be_repeated():
    """So it is without telling Inductor of few blocks: what it makes of the first N that it sees."""
    found = of_function(in_blocks, temperature=meta())
    assert found.logits_reads == 1
    assert found.kernel_reports[0].repeated_loads_in_l1 == 1


def test_spills_are_noticed():
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    options = CachingAutotuner._create_compile_options

    def with_few_registers(self, configuration, meta):
        return {**options(self, configuration, meta), "maxnreg": 24}

    with mock.patch.object(CachingAutotuner, "_create_compile_options", with_few_registers):
        found = of_function(in_blocks, torch.float32, temperature=meta())
    assert found.registers <= 24 and found.spills > 0


def test_no_assertion_is_left_on_the_device():
    arguments = {"logits": meta(ROWS, VOCAB), "labels": meta(ROWS, 1, dtype=torch.int64), "temperature": meta()}
    assert "device_assert" not in generate(in_blocks, arguments, gpu_for("sm_90")).source


KERNEL = """
@triton.jit
def kernel(in_ptr0, out_ptr0, xnumel, r0_numel, XBLOCK: tl.constexpr, R0_BLOCK: tl.constexpr):
    r0_numel = 4096
    xindex = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    r0_base = tl.arange(0, R0_BLOCK)[None, :]
    x0 = xindex
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_index = r0_offset + r0_base
        tmp0 = tl.load(in_ptr0 + (r0_index + 4096 * x0), None)
        _tmp1 = libdevice.exp(tmp0)
    tmp1 = tl.sum(_tmp1, 1)[:, None]
    tmp2 = tl.exp(tmp1)
    tl.store(out_ptr0 + (x0), tmp2, None)
"""


def test_what_is_read_in_a_kernels_source():
    found = analyse(KERNEL, {})
    load, store = found.accesses
    assert (load.parameter, load.is_store, load.axes, load.loop) == ("in_ptr0", False, {"x", "r0_"}, 0)
    assert (store.parameter, store.is_store, store.axes, store.loop) == ("out_ptr0", True, {"x"}, None)
    assert found.exponentials == ((1, {"x", "r0_"}), (1, {"x"}))
    assert found.sizes == {"r0_numel": 4096}


def test_a_changed_torch_is_one_clear_sentence_and_leaves_no_trace(monkeypatch):
    import torch._inductor.fx_passes.joint_graph as joint_graph

    with monkeypatch.context() as changed:
        changed.delattr(joint_graph, "UniformValueConstantFolder")
        with pytest.raises(BackendUnavailable) as raised:
            inspect(Problem("cuda", 64, 5000, torch.float32), gpu_for("sm_90"))
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("inspect could not generate code: it relies on what is inside torch and triton")
    assert TESTED_WITH in message and torch.__version__ in message
    assert not torch.cuda.is_available()
    x = torch.randn(8)
    torch.testing.assert_close(torch.compile(lambda x: x.exp() + 1)(x), x.exp() + 1)


def test_where_flash_attn_is_missing_the_report_says_so(monkeypatch):
    monkeypatch.setattr(flash_attn, "_load", lambda: "flash-attn is not installed: pip install flash-attn")
    found = inspect(Problem("cuda", 64, 5000, torch.float32), gpu_for("sm_90"))
    assert found.flash_attn == "flash-attn is not installed: pip install flash-attn"
    assert found.backward is None


def test_the_data_sheets():
    assert {gpu.name for gpu in GPUS} == {"A100", "H100", "H200", "B200", "L40S", "RTX 4090"}
    for gpu in GPUS:
        assert gpu.source.startswith("https://")
        assert 0.5e12 < gpu.bandwidth < 1e13 and gpu.capability >= (8, 0)
    assert gpu_for().name == gpu_for("sm_90").name == "H100"
    assert gpu_for("sm_90", "h200").name == "H200"
    assert gpu_for(name="rtx-4090").arch == "sm_89"
    with pytest.raises(InputError, match="got GPU 'V100'; A100"):
        gpu_for(name="V100")


def test_the_command_prints_json():
    ran = CliRunner().invoke(
        app, ["inspect", "--arch", "sm_90", "--gpu", "H200", "--inplace", "--rows", "64", "--vocab", "5000", "--json"]
    )
    assert ran.exit_code == 0, ran.output
    printed = json.loads(ran.stdout)
    assert (printed["note"], printed["arch"], printed["gpu"]["name"]) == (NOT_MEASURED, "sm_90", "H200")
    keys = (
        "kernels",
        "logits_reads",
        "gradient_writes",
        "nxv_float32_buffers",
        "registers",
        "spills",
        "bytes",
        "minimum_bytes",
    )
    for one in (
        printed["forward"],
        printed["backward"],
        printed["flash_attn"]["forward"],
        printed["flash_attn"]["backward"],
    ):
        assert all(isinstance(one[key], int) for key in keys)
    forward = printed["forward"]
    assert forward["seconds_by_bandwidth"] == pytest.approx(forward["bytes"] / 4.8e12)


def test_the_command_prints_a_table():
    ran = CliRunner().invoke(app, ["inspect", "--rows", "64", "--vocab", "5000", "--entropy"])
    assert ran.exit_code == 0, ran.output
    assert " ".join(ran.stdout.split()).count(NOT_MEASURED) == 2  # in the title, which may be wrapped, and at the end
    for fact in ("compiled, forward", "reads of the logits", "TB/s (H100)", "flash_attn: computes no entropy"):
        assert fact in ran.stdout
    assert "backward" not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_91"], "got arch 'sm_91'; sm_80, sm_90, sm_100, sm_89 are valid"),
        (["--gpu", "A100", "--arch", "sm_90"], "whose arch is sm_80"),
        (["--gpu", "V100"], "got GPU 'V100'"),
        (["--rows", "0"], "number of rows '0'"),
        (["--vocab", "none"], "'none'"),
        (["--dtype", "float64"], "got dtype 'float64'"),
    ],
)
def test_wrong_input(arguments, message):
    ran = CliRunner().invoke(app, ["inspect", *arguments])
    assert ran.exit_code == 2 and ran.stdout == ""
    assert ran.stderr.startswith("InputError: got ") and message in ran.stderr


def test_the_generated_kernels_pass_the_gate_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)}
    program = [sys.executable, str(TESTS / "generated_code_in_interpreter.py")]
    ran = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=400)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for dtype in ("float32", "float16", "bfloat16"):
        assert ran.stdout.count(f"gate, 5 x 2311 {dtype} on cpu") == 4
