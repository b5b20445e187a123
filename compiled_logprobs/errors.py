"""Every error that this library raises on its own account.

LogProbsError
├── InputError            (also a ValueError)  the arguments do not fit together, or a value is out of range
├── BackendUnavailable                         the named backend is unknown, or cannot run this problem
└── ProfileError                               a stored profile cannot be read, written or trusted

Each message says what was got, what is valid, and what to do.
"""


class LogProbsError(Exception):
    """Base of all errors raised by compiled_logprobs."""


class InputError(LogProbsError, ValueError):
    """The arguments of a call do not fit together, or a value is out of range."""


class BackendUnavailable(LogProbsError):
    """The named backend is unknown, or cannot run this problem here."""


class ProfileError(LogProbsError):
    """A stored profile cannot be read, written or trusted."""
