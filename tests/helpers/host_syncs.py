"""What makes a host wait for its device, and so may not be in a CUDA graph's capture; seen without a device."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

OPERATIONS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
METHODS = ("cpu", "numpy", "tolist")


@contextmanager
def without_host_syncs(methods: tuple[str, ...] = METHODS) -> Iterator[None]:
    """Fail where values are read within it; tensors say that they are not on the CPU."""

    def refuse(tensor: torch.Tensor) -> None:
        raise AssertionError("a tensor is read by the host")

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "is_cpu", False))
        seen = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        for name in methods:
            stack.enter_context(patch.object(torch.Tensor, name, refuse))
        yield
    names = {event.name for event in seen.events()}
    assert names and not names & OPERATIONS, names & OPERATIONS
