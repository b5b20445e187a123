"""The backends, in the order of preference where nothing has been measured; each is imported when it is first used."""

import re
from importlib import import_module
from threading import Lock

from compiled_logprobs.backends.base import Backend
from compiled_logprobs.decision import PLAIN
from compiled_logprobs.errors import BackendUnavailable, InputError
from compiled_logprobs.problem import Problem

BUILT_IN = {
    "cpp": "compiled_logprobs.backends.cpp:Cpp",
    "compiled": "compiled_logprobs.backends.compiled:Compiled",
    "triton": "compiled_logprobs.backends.triton:Triton",
    "flash_attn": "compiled_logprobs.backends.flash_attn:FlashAttn",
    "eager": "compiled_logprobs.backends.eager:Eager",
}

EAGER = "eager"

_targets: dict[str, str | Backend] = dict(BUILT_IN)
_loaded: dict[str, Backend] = {}
_lock = Lock()


def backends() -> list[str]:
    """The names of all registered backends, whether or not they can run here."""
    return list(_targets)


def register_backend(name: str, target: str | Backend) -> None:
    """Add a backend under `name`, for `backend=name` and for the autotuner.

    Args:
        name: an identifier that is not taken.
        target: "module:attribute" of a `Backend` (an instance, or a class that takes no arguments), imported when it is
            first used; worker processes can import it too. Or a `Backend` itself, which only this process knows.

    Raises:
        InputError: the name is taken or not an identifier, or the target is neither of these.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in ("auto", PLAIN):
        raise InputError(
            f"got {name!r} for a backend's name; an identifier is valid, e.g. 'my_backend', but not 'auto' or "
            f"{PLAIN!r}."
        )
    if name in _targets and _targets[name] != target:
        raise InputError(f"backend {name!r} is registered already; choose a name other than {', '.join(_targets)}.")
    if not isinstance(target, Backend) and not (isinstance(target, str) and re.fullmatch(r"[^:]+:[^:]+", target)):
        raise InputError(
            f"got {target!r} for the target of backend {name!r}; "
            "a Backend, or its place as 'package.module:attribute', is valid."
        )
    with _lock:
        _targets[name] = target


def get_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendUnavailable: the name is unknown, or its module cannot be imported.
    """
    if isinstance(name, str) and name in _loaded:
        return _loaded[name]
    if not isinstance(name, str) or name not in _targets:
        raise BackendUnavailable(
            f"backend {name!r} is unknown. Registered: {', '.join(_targets)}. "
            "Name one of them, use backend='auto', or add it with register_backend."
        )
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(name, _targets[name])
    return _loaded[name]


def is_loaded(name: str) -> bool:
    """Whether the backend called `name` has been imported, so that asking it costs nothing."""
    return name in _loaded


def target_of(name: str) -> str | Backend:
    """What the backend called `name` was registered with."""
    return _targets[name]


def _load(name: str, target: str | Backend) -> Backend:
    if isinstance(target, Backend):
        return target
    module_name, attribute = target.split(":")
    try:
        backend = getattr(import_module(module_name), attribute)
        backend = backend() if isinstance(backend, type) else backend
    except Exception as error:  # foreign code may raise anything when it is imported
        raise BackendUnavailable(
            f"backend {name!r} cannot be imported from {target!r}: {type(error).__name__}: {error}. "
            "Install what it needs, or correct the target given to register_backend."
        ) from error
    if not isinstance(backend, Backend):
        raise BackendUnavailable(
            f"backend {name!r}: {target!r} is a {type(backend).__name__}, not a Backend. "
            "Subclass compiled_logprobs.backends.base.Backend."
        )
    return backend


def why_not(name: str, problem: Problem) -> str | None:
    """Why the backend called `name` cannot run `problem` here; None if it can."""
    try:
        return get_backend(name).why_not(problem)
    except BackendUnavailable as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - foreign code may raise anything
        return f"it cannot be asked: {type(error).__name__}: {error}"


def require_backend(name: str, problem: Problem) -> Backend:
    """The backend called `name`, if it can run `problem`.

    Raises:
        BackendUnavailable: it cannot; the message names the reason and the backends that can.
    """
    backend = get_backend(name)
    reason = backend.why_not(problem)
    if reason is None:
        return backend
    details = problem.details()
    others = [other for other in _targets if why_not(other, problem) is None]
    raise BackendUnavailable(
        f"backend {name!r} cannot run {problem}{f' ({details})' if details else ''}: {reason}.\n"
        f"Backends that can: {', '.join(others) or 'none'}. Name one of them, or use backend='auto'."
    )


def code_of(name: str) -> str | None:
    """The fingerprint of the backend called `name`; None where it has none, or raises when it is asked."""
    try:
        return get_backend(name).fingerprint()
    except Exception:  # noqa: BLE001 - foreign code may raise anything
        return None
