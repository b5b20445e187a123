"""The backends, in the order of preference where nothing has been measured; each is imported when it is first used."""

import re
from importlib import import_module
from threading import Lock
from typing import Any, overload

from compiled_logprobs.backends.base import AnyBackend, Backend, HiddenBackend, faults_of
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
"""Over logits."""
BUILT_IN_FROM_HIDDEN = {
    "whole": "compiled_logprobs.backends.chunked:WHOLE",
    "chunked_vocab": "compiled_logprobs.backends.chunked_vocab:CHUNKED_VOCAB",
    "chunked_4096": "compiled_logprobs.backends.chunked:CHUNKED_4096",
    "chunked_1024": "compiled_logprobs.backends.chunked:CHUNKED_1024",
    "chunked_256": "compiled_logprobs.backends.chunked:CHUNKED_256",
    "chunked_64": "compiled_logprobs.backends.chunked:CHUNKED_64",
    "linear_cross_entropy": "compiled_logprobs.backends.linear_cross_entropy:LinearCrossEntropy",
    "liger": "compiled_logprobs.backends.liger:Liger",
    "eager": "compiled_logprobs.backends.chunked:EAGER",
}
"""Over hidden states. What both lists have is called the same, and is the baseline."""

EAGER = "eager"

_Target = str | AnyBackend
_targets: dict[str, _Target] = dict(BUILT_IN)
_from_hidden: dict[str, _Target] = dict(BUILT_IN_FROM_HIDDEN)
_loaded: dict[tuple[bool, str], AnyBackend] = {}
_lock = Lock()


def _table(from_hidden: bool) -> dict[str, _Target]:
    return _from_hidden if from_hidden else _targets


def backends(*, from_hidden: bool = False) -> list[str]:
    """The names of all registered backends, whether or not they can run here: over logits, or over hidden states."""
    return list(_table(from_hidden))


def registered_names() -> list[str]:
    """Of both, each once."""
    return list(dict.fromkeys((*_targets, *_from_hidden)))


def backends_for(problem: Problem) -> list[str]:
    """The names of those that compute from what `problem` has."""
    return list(_table(problem.hidden is not None))


def built_in_for(problem: Problem) -> list[str]:
    """The same, without those of third parties."""
    return list(BUILT_IN if problem.hidden is None else BUILT_IN_FROM_HIDDEN)


def is_built_in(name: str) -> bool:
    """Whether a backend of this name comes with the package."""
    return name in BUILT_IN or name in BUILT_IN_FROM_HIDDEN


def register_backend(name: str, target: str | AnyBackend, *, from_hidden: bool = False) -> None:
    """Add a backend under `name`, for `backend=name` and for the autotuner.

    Args:
        name: an identifier that is not taken.
        target: "module:attribute" of a `Backend` or, over hidden states, of a `HiddenBackend` (an instance, or a class
            that takes no arguments), imported when it is first used; worker processes can import it too. Or one of
            these itself, which only this process knows.
        from_hidden: whether it serves `log_probs_from_hidden`, and not `log_probs_from_logits`.

    Raises:
        InputError: the name is taken or not an identifier, or the target is neither of these.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in ("auto", PLAIN):
        raise InputError(
            f"got {name!r} for a backend's name; an identifier is valid, e.g. 'my_backend', but not 'auto' or "
            f"{PLAIN!r}."
        )
    kind, targets, others = _KINDS[from_hidden], _table(from_hidden), _table(not from_hidden)
    if name in others or (name in targets and targets[name] != target):
        taken = ", ".join(dict.fromkeys((*targets, *others)))
        raise InputError(f"backend {name!r} is registered already; choose a name other than {taken}.")
    if not isinstance(target, kind) and not (isinstance(target, str) and re.fullmatch(r"[^:]+:[^:]+", target)):
        raise InputError(
            f"got {target!r} for the target of backend {name!r}; "
            f"a {kind.__name__}, or its place as 'package.module:attribute', is valid."
        )
    with _lock:
        targets[name] = target


_KINDS: dict[bool, type[AnyBackend]] = {False: Backend, True: HiddenBackend}


@overload
def get_backend(name: str) -> Backend: ...


@overload
def get_backend(name: str, problem: Problem) -> Any: ...


def get_backend(name: str, problem: Problem | None = None) -> AnyBackend:
    """The backend called `name`, over logits, or over what `problem` has.

    Raises:
        BackendUnavailable: the name is unknown, its module cannot be imported, or what is there is no whole backend.
    """
    return _get(name, from_hidden=problem is not None and problem.hidden is not None)


def _get(name: str, from_hidden: bool) -> AnyBackend:
    if isinstance(name, str) and (from_hidden, name) in _loaded:
        return _loaded[from_hidden, name]
    targets = _table(from_hidden)
    if not isinstance(name, str) or name not in targets:
        others = _table(not from_hidden)
        what = "hidden states" if from_hidden else "logits"
        is_other = isinstance(name, str) and name in others
        wrong = f"does not compute from {what}" if is_other else "is unknown"
        raise BackendUnavailable(
            f"backend {name!r} {wrong}. Registered{' for them' if is_other else ''}: {', '.join(targets)}. "
            "Name one of them, use backend='auto', or add it with register_backend."
        )
    with _lock:
        if (from_hidden, name) not in _loaded:
            _loaded[from_hidden, name] = _load(name, targets[name], _KINDS[from_hidden])
    return _loaded[from_hidden, name]


def preferred(problem: Problem) -> Backend:
    """The first of the built-in backends that can run `problem`, which is one of logits."""
    return next(get_backend(name) for name in BUILT_IN if why_not(name, problem) is None)


def is_loaded(name: str) -> bool:
    """Whether the backend called `name` has been imported, so that asking it costs nothing."""
    return (False, name) in _loaded or (True, name) in _loaded


def target_of(name: str) -> str | AnyBackend:
    """What the backend called `name` was registered with."""
    return _table(name not in _targets)[name]


def _load(name: str, target: _Target, kind: type[AnyBackend]) -> AnyBackend:
    backend = target if isinstance(target, AnyBackend) else _imported(name, target, kind)
    if faults := faults_of(backend, kind):
        raise BackendUnavailable(
            f"backend {name!r} is no whole {kind.__name__}: {'; '.join(faults)}. "
            f"Write {type(backend).__name__} as compiled_logprobs.backends.base.{kind.__name__} has it."
        )
    return backend


def _imported(name: str, target: str, kind: type[AnyBackend]) -> AnyBackend:
    module_name, attribute = target.split(":")
    try:
        backend = getattr(import_module(module_name), attribute)
        backend = backend() if isinstance(backend, type) else backend
    except Exception as error:  # foreign code may raise anything when it is imported
        raise BackendUnavailable(
            f"backend {name!r} cannot be imported from {target!r}: {type(error).__name__}: {error}. "
            "Install what it needs, or correct the target given to register_backend."
        ) from error
    if not isinstance(backend, kind):
        raise BackendUnavailable(
            f"backend {name!r}: {target!r} is a {type(backend).__name__}, not a {kind.__name__}. "
            f"Subclass compiled_logprobs.backends.base.{kind.__name__}."
        )
    return backend


def why_not(name: str, problem: Problem) -> str | None:
    """Why the backend called `name` cannot run `problem` here; None if it can."""
    try:
        backend: AnyBackend = get_backend(name, problem)
        return backend.why_not(problem)
    except BackendUnavailable as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - foreign code may raise anything
        return f"it cannot be asked: {type(error).__name__}: {error}"


def require_backend(name: str, problem: Problem) -> Any:
    """The backend called `name`, over what `problem` has, if it can run it.

    Raises:
        BackendUnavailable: it cannot; the message names the reason and the backends that can.
    """
    backend = get_backend(name, problem)
    reason = backend.why_not(problem)
    if reason is None:
        return backend
    details = problem.details()
    others = [other for other in backends_for(problem) if why_not(other, problem) is None]
    raise BackendUnavailable(
        f"backend {name!r} cannot run {problem}{f' ({details})' if details else ''}: {reason}.\n"
        f"Backends that can: {', '.join(others) or 'none'}. Name one of them, or use backend='auto'."
    )


def code_of(name: str, problem: Problem | None = None) -> str | None:
    """The fingerprint of the backend called `name`, of that name for `problem`; None where it has none, or raises when
    it is asked."""
    try:
        from_hidden = name not in _targets if problem is None else problem.hidden is not None
        return _get(name, from_hidden).fingerprint()
    except Exception:  # noqa: BLE001 - foreign code may raise anything
        return None
