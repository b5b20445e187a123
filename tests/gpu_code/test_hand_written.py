"""What the kernels of `triton` do on a GPU, counted on a machine without one."""

import pytest
import torch

from compiled_logprobs.problem import Problem
from tests.gpu_code.data_sheets import data_sheet
from tests.gpu_code.hand_written import assemble_for_amd, inspect_triton, registers_of

pytestmark = pytest.mark.slow
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ON_GPU = Problem("cuda", 8192, 151936, BF16, needs_grad=True)


def inspected(arch="sm_90", **changes):
    directions = inspect_triton(ON_GPU._replace(**changes), data_sheet(arch))
    forward, backward = directions["forward"], directions["backward"]
    assert (forward.kernels, backward.kernels) == (2, 1)
    assert (forward.spills, backward.spills) == (0, 0)
    assert (forward.logits_reads, backward.logits_reads, backward.gradient_writes) == (1, 1, 1)
    assert (forward.nxv_float32_buffers, backward.nxv_float32_buffers) == (0, 0)
    assert forward.minimum_bytes <= forward.bytes <= 1.01 * forward.minimum_bytes
    assert backward.minimum_bytes <= backward.bytes <= 1.01 * backward.minimum_bytes
    assert 1 <= forward.exponentials_per_logit < 1.15 and 1 <= backward.exponentials_per_logit < 1.1
    return forward.instructions_per_logit, backward.instructions_per_logit


@pytest.mark.parametrize(
    ("arch", "changes", "forward", "backward"),
    [  # with the most instructions a logit
        ("sm_90", {}, 10, 17),
        ("sm_90", {"entropy": True}, 13, 20),
        ("sm_80", {"dtype": FP16, "entropy": True, "inplace_backward": True}, 13, 20),
        ("sm_100", {"dtype": FP32}, 10, 17),
        ("sm_100", {"entropy": True, "logsumexp": True, "argmax": True, "sum_p_squared": True}, 15, 20),
    ],
    ids=str,
)
def test_instructions_a_logit(arch, changes, forward, backward):
    found = inspected(arch, **changes)
    assert 6 < found[0] < forward and 10 < found[1] < backward, found


def test_a_slice_and_an_odd_vocabulary_cost_little_more():
    flat, sliced, odd = inspected(), inspected(layout="slice"), inspected(vocab=151937)
    assert all(other < 1.1 * own for own, other in zip(flat, sliced, strict=True)), (flat, sliced)
    assert all(other < 1.2 * own for own, other in zip(flat, odd, strict=True)), (flat, odd)


def test_it_assembles_for_an_mi300_without_spills():
    everything = ON_GPU._replace(entropy=True, logsumexp=True, argmax=True, sum_p_squared=True)
    code = assemble_for_amd(everything)
    assert code.keys() == {"reduce_chunks", "combine_chunks", "differentiate"}
    for name, text in code.items():
        registers, spilled = registers_of(text)
        assert registers <= 64 and spilled == 0, (name, registers, spilled)
