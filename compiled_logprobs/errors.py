"""Every error that this library raises on its own account.

LogProbsError
├── InputError            (also a ValueError)  the arguments do not fit together, or a value is out of range
├── BackendUnavailable                         the named backend is unknown, or cannot run this problem
└── ProfileError                               a stored profile cannot be read, written or trusted

Each message says what was got, what is valid, and what to do.
"""

import torch


class LogProbsError(Exception):
    """Base of all errors raised by compiled_logprobs."""


class InputError(LogProbsError, ValueError):
    """The arguments of a call do not fit together, or a value is out of range."""


class BackendUnavailable(LogProbsError):
    """The named backend is unknown, or cannot run this problem here."""


class ProfileError(LogProbsError):
    """A stored profile cannot be read, written or trusted."""


def nothing_can_serve_after(error: BaseException) -> bool:
    """Whether `error` is out of memory, or a fault of the device, after which every call fails: neither is a backend's own."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | MemoryError)
