"""What the code generated for GPUs does, on a machine without one, and that its inspection would notice otherwise."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import torch

from compiled_logprobs.backends import flash_attn
from compiled_logprobs.backends.compiled_code import forward_in_blocks
from compiled_logprobs.operation.contract import Inputs, Wanted
from compiled_logprobs.problem import Layout, Problem, layout_of
from tests.gpu_code import __main__ as command
from tests.gpu_code.data_sheets import data_sheet
from tests.gpu_code.generated_code import generate
from tests.gpu_code.inspection import NOT_MEASURED, inspect, inspect_function, logits_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS, VOCAB = 8192, 151936
ROOT = Path(__file__).parents[2]
# The keys of --json that programs read: more may come, and none may go.
IN_JSON = "note gpu arch torch problem forward backward flash_attn"
OF_GPU = "name arch multiprocessors bandwidth bandwidth_from threads_per_multiprocessor source"
OF_PROBLEM = "rows vocab labels_per_row needs_grad entropy dtype inplace_backward"
OF_DIRECTION = (
    "kernels logits_reads gradient_writes nxv_float32_buffers registers spills shared_bytes bytes minimum_bytes "
    "exponentials_per_logit seconds_by_bandwidth kernel_reports operations notes"
)
OF_KERNEL = (
    "name launches candidates registers spills shared_bytes warps index_bits logits_reads repeated_loads_in_l1 bytes"
)


@cache
def inspected(arch="sm_90", dtype=BF16, rows=ROWS, vocab=VOCAB, **options):
    return inspect(Problem("cuda", rows, vocab, dtype, needs_grad=True, **options), data_sheet(arch))


def check(inspection):
    """What is promised of every GPU."""
    forward, backward = inspection.forward, inspection.backward
    assert (forward.logits_reads, forward.gradient_writes, forward.nxv_float32_buffers, forward.spills) == (1, 0, 0, 0)
    assert (backward.logits_reads, backward.gradient_writes) == (1, 1)
    assert [kernel.name for kernel in backward.kernel_reports] == [backward.kernel_reports[0].name]
    assert (backward.nxv_float32_buffers, backward.spills) == (0, 0)
    # The one kernel that reads the logits reads them once, and leaves nothing to the cache; the other combines.
    assert forward.kernel_reports[0].repeated_loads_in_l1 == 0
    assert [round(kernel.logits_reads, 3) for kernel in forward.kernel_reports] == [1, 0]
    assert all(kernel.candidates == 1 for kernel in forward.kernel_reports)
    assert forward.minimum_bytes <= forward.bytes <= 1.013 * forward.minimum_bytes
    assert backward.minimum_bytes <= backward.bytes <= 1.0001 * backward.minimum_bytes
    assert 1 <= forward.exponentials_per_logit < 1.02 and 1 <= backward.exponentials_per_logit < 1.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "options", "forward", "backward"),
    [  # with the most instructions a logit, which may grow by a tenth or so before anybody has to look
        ("sm_80", FP32, {"entropy": True}, 22, 40),
        ("sm_90", BF16, {}, 15, 25),
        ("sm_90", FP16, {"entropy": True, "inplace_backward": True}, 22, 34),
        ("sm_100", BF16, {"entropy": True}, 22, 30),
    ],
    ids=lambda value: str(value),
)
def test_one_read_forward_and_one_pass_backward_without_spills(arch, dtype, options, forward, backward):
    inspection = inspected(arch, dtype, **options)
    check(inspection)
    assert (inspection.forward.kernels, inspection.backward.kernels) == (2, 1)
    assert inspection.backward.kernel_reports[0].candidates == 1
    assert 8 < inspection.forward.instructions_per_logit < forward
    assert 8 < inspection.backward.instructions_per_logit < backward


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "slice"])
def test_other_layouts_are_read_as_they_lie(layout):
    flat, other = inspected(), inspected(layout=layout)
    check(other)
    assert other.forward.bytes == pytest.approx(flat.forward.bytes, rel=1e-3)
    for direction in ("forward", "backward"):
        ours, flats = getattr(other, direction), getattr(flat, direction)
        assert ours.kernels == flats.kernels
        assert ours.instructions_per_logit < 1.3 * flats.instructions_per_logit
    launches = other.flash_attn["forward"].kernel_reports[0].launches
    assert launches == (8 if layout == "slice" else 1)


@pytest.mark.slow
def test_times_are_the_largest_of_three_and_flash_attn_stands_beside():
    inspection, gpu = inspected(), data_sheet()
    for way in (inspection.forward, inspection.backward, *inspection.flash_attn.values()):
        logits = ROWS * VOCAB
        assert way.seconds_by_bandwidth == pytest.approx(way.bytes / gpu.bandwidth)
        issue = way.instructions_per_logit * logits / gpu.instructions_per_second
        assert way.seconds_by_issue == pytest.approx(issue, rel=1e-3)
        assert way.seconds_by_exponentials >= way.exponentials_per_logit * logits / gpu.special_per_second * 0.99
        largest = max(way.seconds_by_bandwidth, way.seconds_by_issue, way.seconds_by_exponentials)
        assert largest * 0.999 <= way.seconds <= 1.05 * largest
        assert (way.logits_reads, way.nxv_float32_buffers, way.spills) == (1, 0, 0)
        assert way.minimum_bytes <= way.bytes < 1.013 * way.minimum_bytes
    assert inspection.flash_attn["backward"].gradient_writes == 1


@pytest.mark.slow
def test_json_keeps_every_key():
    printed = inspected().to_dict()
    directions = [part[name] for part in (printed, printed["flash_attn"]) for name in ("forward", "backward")]
    kernels = [kernel for direction in directions for kernel in direction["kernel_reports"]]
    parts = [(printed, IN_JSON), (printed["gpu"], OF_GPU), (printed["problem"], OF_PROBLEM)]
    parts += [(direction, OF_DIRECTION) for direction in directions] + [(kernel, OF_KERNEL) for kernel in kernels]
    for part, keys in parts:
        assert not set(keys.split()) - part.keys()
    assert (printed["arch"], printed["gpu"]["bandwidth_from"]) == ("sm_90", "data sheet")
    assert printed["forward"]["shared_bytes"] > 0  # warps of a reduction meet there


@pytest.mark.slow
def test_beyond_2_31_logits():
    """In parts, which 32-bit indices reach."""
    inspection = inspected(dtype=FP32, rows=32768)
    check(inspection)
    reports = (*inspection.forward.kernel_reports, *inspection.backward.kernel_reports)
    assert [(kernel.launches, kernel.index_bits) for kernel in reports] == [(3, 32), (3, 32), (3, 32)]
    assert inspection.forward.notes == inspection.backward.notes == ("in 3 parts of at most 14064 rows",)


@pytest.mark.slow
def test_a_vocabulary_off_every_block_and_one_within_a_block():
    off = inspected(rows=4096, vocab=128257)
    assert (off.forward.logits_reads, off.forward.spills, off.backward.spills) == (1, 0, 0)
    assert off.forward.kernel_reports[0].repeated_loads_in_l1 == 0
    small = inspected(dtype=FP32, rows=4096, vocab=32, entropy=True)
    assert (small.forward.kernels, small.forward.spills) == (1, 0)
    assert small.forward.logits_reads <= 2  # a short row has fewer logits than the two warps that load it lanes
    assert small.flash_attn.startswith("computes log-probabilities and their logsumexp alone")


def meta(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def of_function(function, dtype=BF16):
    arguments = {"logits": meta(ROWS, VOCAB, dtype=dtype), "labels": meta(ROWS, 1, dtype=torch.int64)}
    if function is in_blocks:
        arguments["temperature"] = meta()
    return inspect_function(function, arguments, data_sheet())


def by_logsumexp(logits, labels):
    return logits.gather(-1, labels).float() - logits.float().logsumexp(-1, keepdim=True)


def in_blocks(logits, labels, temperature):
    return forward_in_blocks(Inputs(logits, labels, temperature, -100), Wanted(entropy=True))[:3]


def returning_probabilities(logits, labels):
    return logits.float().softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "facts"),
    [
        (by_logsumexp, {"logits_reads": 2}),
        (returning_probabilities, {"nxv_float32_buffers": 1, "gradient_writes": 1}),
        # So it is without telling Inductor of few blocks: what it makes of the first N that it sees.
        (in_blocks, {"logits_reads": 1}),
    ],
)
def test_what_others_do_worse_is_noticed(function, facts):
    direction = of_function(function)
    assert {name: getattr(direction, name) for name in facts} == facts
    assert direction.kernel_reports[0].repeated_loads_in_l1 == (function is in_blocks)


@pytest.mark.slow
def test_spills_are_noticed():
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    options = CachingAutotuner._create_compile_options

    def with_few_registers(self, configuration, meta):
        return {**options(self, configuration, meta), "maxnreg": 24}

    with mock.patch.object(CachingAutotuner, "_create_compile_options", with_few_registers):
        direction = of_function(in_blocks, FP32)
    assert direction.registers <= 24 and direction.spills > 0


@pytest.mark.slow
def test_no_assertion_is_left_on_the_device():
    arguments = {"logits": meta(ROWS, VOCAB), "labels": meta(ROWS, 1, dtype=torch.int64), "temperature": meta()}
    assert "device_assert" not in generate(in_blocks, arguments, data_sheet()).source


@pytest.mark.slow
def test_a_torch_built_for_cuda_needs_no_driver_and_keeps_no_trace(monkeypatch):
    def no_driver(*arguments):
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", no_driver)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", no_driver)
    monkeypatch.setattr("torch.cuda.graphs.is_current_stream_capturing", no_driver)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert inspect(Problem("cuda", 64, 5000, FP32), data_sheet()).forward.logits_reads == 1
    monkeypatch.undo()
    assert not torch.cuda.is_available()
    x = torch.randn(8)
    torch.testing.assert_close(torch.compile(lambda x: x.exp() + 1)(x), x.exp() + 1)


def test_logits_lie_as_they_were_asked_to():
    for layout in get_args(Layout):
        assert layout_of(logits_of(4096, 1000, FP32, layout)) == (layout, True)
    assert logits_of(1500, 10, FP32, "slice").shape == (6, 250, 10)


@pytest.mark.slow
def test_the_command_prints_json_or_a_table(capsys, monkeypatch):
    monkeypatch.setattr(flash_attn, "_load", lambda: "flash-attn is not installed: pip install flash-attn")
    monkeypatch.setattr(command, "inspect", cache(inspect))
    options = ["--arch", "sm_90", "--gpu", "H200", "--inplace", "--rows", "64", "--vocab", "5000", "--layout", "slice"]
    assert command.main([*options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["note"], printed["gpu"]["arch"], printed["gpu"]["name"]) == (NOT_MEASURED, "sm_90", "H200")
    assert printed["problem"]["layout"] == "slice" and printed["problem"]["inplace_backward"]
    assert printed["flash_attn"] == {"why_not": "flash-attn is not installed: pip install flash-attn"}
    assert command.main(options) == 0
    table = capsys.readouterr().out
    assert NOT_MEASURED in table
    for fact in ("compiled backward", "instructions_per_logit", "flash_attn: flash-attn is not"):
        assert fact in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_91"], "got 'sm_91', for which there is no data sheet; H100 (sm_90), "),
        (["--gpu", "A100", "--arch", "sm_90"], "got 'sm_90' and 'A100'"),
        (["--rows", "0"], "number of rows '0'"),
        (["--rows", "31", "--layout", "slice"], "got 31 rows for a slice"),
        (["--vocab", "none"], "'none'"),
        (["--dtype", "float64"], "got dtype 'float64'"),
    ],
)
def test_wrong_input(arguments, message, capsys):
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("InputError: got ") and message in printed.err


@pytest.mark.slow
def test_the_generated_kernels_pass_the_gate_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    program = [sys.executable, "-m", "tests.helpers.generated_code_in_interpreter"]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for dtype in ("float32", "float16", "bfloat16"):
        assert f"gate, 5 x 2311 {dtype} on cpu" in ran.stdout
