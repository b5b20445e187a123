"""Every error that this library raises on its own account.

LogProbsError
├── InputError            (also a ValueError)  the arguments do not fit together, or a value is out of range
├── BackendUnavailable                         the named backend is unknown, or cannot run this problem
└── ProfileError                               a stored profile cannot be read, written or trusted

Each message says what was got, what is valid, and what to do.
"""

import contextlib
import sys
import warnings

import torch


class LogProbsError(Exception):
    """Base of all errors raised by compiled_logprobs."""


class InputError(LogProbsError, ValueError):
    """The arguments of a call do not fit together, or a value is out of range."""


class BackendUnavailable(LogProbsError):
    """The named backend is unknown, or cannot run this problem here."""


class ProfileError(LogProbsError):
    """A stored profile cannot be read, written or trusted."""


def warn(text: str) -> None:
    """Warn of what does not keep a call from being served; where warnings are errors, say it on standard error."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        say(text)


def say(text: str) -> None:
    """Write a line for people to standard error, whether or not anybody reads it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # it is closed, or its pipe is
            sys.stderr.write(f"compiled_logprobs: {text}\n")
            sys.stderr.flush()


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Of the messages of plain RuntimeErrors, which is all that torch raises on the CPU; in lower case."""
DEVICE_FAULTS = ("triton error [cuda]", "triton error [hip]", "cuda error:", "hip error:")
"""Of the messages of those who call the driver past torch; in lower case."""


def nothing_can_serve_after(error: BaseException) -> bool:
    """Whether `error` is out of memory, or a fault of the device, after which every call fails: neither is a backend's
    own."""
    return is_out_of_memory(error) or any(
        isinstance(root, getattr(torch, "AcceleratorError", ())) or _says(root, DEVICE_FAULTS) for root in _roots(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of whatever device, also where a compiler wraps the error in one of its own."""
    return any(
        isinstance(root, torch.OutOfMemoryError | MemoryError) or _says(root, OUT_OF_MEMORY) for root in _roots(error)
    )


def _roots(error: BaseException) -> list[BaseException]:
    """`error`, and what it says that it comes from: its cause, and torch.compile's `inner_exception`."""
    roots: list[BaseException] = []
    due: list[object] = [error]
    while due:
        cause = due.pop()
        if isinstance(cause, BaseException) and all(cause is not root for root in roots):
            roots.append(cause)
            due += [cause.__cause__, getattr(cause, "inner_exception", None)]
    return roots


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    """Whether it is a RuntimeError whose message has one of these phrases."""
    try:
        return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in phrases)
    except Exception:  # noqa: BLE001 - foreign code makes the message
        return False
