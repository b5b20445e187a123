"""What only a device can show of backends from hidden states: `python -m pytest tests/gpu`, a step of `make gpu`."""

import pytest
import torch

from compiled_logprobs import BackendUnavailable, check_backend
from compiled_logprobs.problem import Problem

pytestmark = pytest.mark.gpu

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEM = Problem(DEVICE_TYPE, 512, 50257, torch.float32, hidden=64)


@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM._replace(needs_grad=True, weight_grad=True, bias=True, softcap=True),
        PROBLEM._replace(dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_liger_passes_the_check(problem):
    try:
        report = check_backend("liger", problem)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert report.passed, [check.detail for check in report.checks if not check.passed]
