"""What a call may leave behind in its process: torch's modes, and the states of random generators."""

import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

RECOMPILES = 1024
"""More than there are kinds of inputs."""
LIMITS = "recompile_limit", "accumulated_recompile_limit"
"""Of compilations of one function, and of all; the default of the first is 8."""


def modes(device: torch.device) -> dict[str, Any]:
    """Those that change what the caller computes afterwards, by the name that torch has for them."""
    return {
        "grad_enabled": torch.is_grad_enabled(),
        "default_dtype": torch.get_default_dtype(),
        "num_threads": torch.get_num_threads(),
        "autocast_enabled": torch.is_autocast_enabled(device.type),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": _matmul_precision(),
    }


def _matmul_precision() -> str:
    """torch raises where the program has set it in more than one of the ways that torch has for it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""


def restore_modes(kept: dict[str, Any], device: torch.device) -> list[str]:
    """Put the modes back, and name those that were others."""
    put_back: dict[str, Callable[[Any], Any]] = {
        "grad_enabled": torch.set_grad_enabled,
        "default_dtype": torch.set_default_dtype,
        "num_threads": torch.set_num_threads,
        "autocast_enabled": lambda enabled: torch.set_autocast_enabled(device.type, enabled),
        "deterministic_algorithms": torch.use_deterministic_algorithms,
        "float32_matmul_precision": lambda precision: torch.set_float32_matmul_precision(precision or "highest"),
    }
    now = modes(device)
    changed = [name for name, value in kept.items() if now[name] != value]
    for name in changed:
        put_back[name](kept[name])
    return changed


class Recompiles:
    """Room for a compiled function: at its limit, torch runs it uncompiled, and what is checked is not what serves."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._allowed = False

    def __enter__(self) -> "Recompiles":
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def allow(self) -> None:
        """Raise the limit, once there is one: its module is slow to import, and a call may be what does that."""
        config = sys.modules.get("torch._dynamo.config")
        if config is None or self._allowed:
            return
        self._allowed = True
        limits = {name: RECOMPILES for name in LIMITS if hasattr(config, name)}
        self._stack.enter_context(config.patch(**limits))


def draws_random_numbers(call: Callable[[], Any], device: torch.device) -> bool:
    """Whether each of some calls does: another thread may draw numbers during one. The states are put back."""
    modules = [torch.random] if device.type == "cpu" else [torch.random, torch.get_device_module(device)]
    for _ in range(3):
        callers = [module.get_rng_state() for module in modules]
        python, numpy = random.getstate(), sys.modules.get("numpy")
        of_numpy = None if numpy is None else numpy.random.get_state()
        for where in {torch.device("cpu"), device}:  # so that one who seeds them changes them each time
            torch.rand((), device=where)
        random.random()
        if numpy is not None:
            numpy.random.random()
        before, before_others = [module.get_rng_state() for module in modules], _other_states()
        call()
        same = all(torch.equal(module.get_rng_state(), state) for module, state in zip(modules, before, strict=True))
        same &= _other_states() == before_others
        for module, state in zip(modules, callers, strict=True):
            module.set_rng_state(state)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
        if same:
            return False
    return True


def _other_states() -> list[Any]:
    """Python's, and NumPy's in plain values where somebody has imported it."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return [random.getstate()]
    name, key, *rest = numpy.random.get_state()
    return [random.getstate(), name, key.tobytes(), *rest]
