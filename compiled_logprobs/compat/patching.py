"""Put this library's functions in place of an installed framework's own: `patch("trl")`.

A module that did `from trl.trainer.utils import selective_log_softmax` holds the function itself, so every loaded
module is searched for that object. Modules that are imported later, and callers such as
`utils.selective_log_softmax(...)`, take what the framework's module holds by then. What keeps the function elsewhere
(an attribute of an object, a `functools.partial`, the result of `torch.compile`) keeps the original: patch before such
things are made.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from types import FunctionType
from typing import Any, cast

import torch

from compiled_logprobs.compat.originals import FRAMEWORKS, Framework
from compiled_logprobs.errors import InputError, LogProbsError

_active: dict[str, list[tuple[Any, Any]]] = {}
"""By framework, its functions with what stands in the place of each."""


@dataclass(frozen=True)
class Patch:
    """What `patch` replaced. As a context manager, put it back at the end of the block. `str()` is the report."""

    framework: str
    version: str
    """Of the installed package; "of an unknown version" where nothing says."""
    places: tuple[str, ...]
    """Where functions were replaced: `module.name` each."""
    is_outermost: bool = True
    """Whether the end of the block puts the functions back: not within another patch of the same framework."""

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_outermost:
            unpatch(self.framework)

    def __str__(self) -> str:
        number = len(self.places)
        lines = [f"{self.framework} {self.version}: replaced in {number} place{'' if number == 1 else 's'}"]
        lines += [f"  {place}" for place in self.places]
        if {place.rpartition(".")[0] for place in self.places} <= FRAMEWORKS[self.framework].names_by_module.keys():
            lines.append("No other loaded module holds them; those that import them from now on get the replacement.")
        return "\n".join(lines)


def patch(framework: str) -> Patch:
    """Replace an installed framework's log-probability functions by those of `compiled_logprobs.compat.<framework>`.

    print(patch("trl"))                # until unpatch("trl")
    with patch("trl") as patched: ...  # until the end of the block

    All functions are checked first: where one takes other arguments than the versions known here, none is replaced.
    A framework that is patched already stays as it is, and a block within the patch leaves it so.

    Args:
        framework: a name in `FRAMEWORKS`, such as "trl". Its package is imported.

    Returns:
        A `Patch` that lists the places where a function was replaced.

    Raises:
        InputError: no framework of that name is known.
        LogProbsError: it cannot be imported, or has a function with other arguments.
    """
    original = _find(framework)
    is_outermost = framework not in _active
    if is_outermost:
        _active[framework] = list(_swaps(framework, original))  # all checks, before anything is replaced
        for theirs, ours in _active[framework]:
            _replace(theirs, ours)
    # Found anew, since modules that were imported since hold them as well.
    places = tuple(place for _, ours in _active[framework] for place in _replace(ours, ours))
    return Patch(framework, _version(original), places, is_outermost)


def unpatch(framework: str) -> list[str]:
    """Put a framework's own functions back, also where they were imported from it since `patch`.

    Returns:
        The places, `module.name` each; none where the framework is not patched.

    Raises:
        InputError: no framework of that name is known.
    """
    _find(framework)
    return [place for theirs, ours in _active.pop(framework, []) for place in _replace(ours, theirs)]


def _find(framework: str) -> Framework:
    if not isinstance(framework, str) or framework not in FRAMEWORKS:
        raise InputError(
            f"got the framework {framework!r}; {', '.join(FRAMEWORKS)} are valid. "
            "For another one call the public functions."
        )
    return FRAMEWORKS[framework]


def _swaps(framework: str, original: Framework) -> Iterator[tuple[Any, Any]]:
    """Each function that the installed version has, with a replacement. Raise LogProbsError where they do not fit."""
    compat = importlib.import_module(f"compiled_logprobs.compat.{framework}")
    version = f"{framework} {_version(original)}"
    for number, (module, name) in enumerate(original.functions):
        try:
            theirs = getattr(importlib.import_module(module), name, None)  # in a lazy module, one more import
        except (Exception, SystemExit) as error:  # a foreign module may do anything when it is imported
            if number > 0:  # nothing here can call what cannot be imported here
                continue
            what = f"importing {module} failed ({type(error).__name__}: {error})"
            remedy = f"Is {framework} installed? See that `import {module}` works, or import {compat.__name__} instead."
            raise _refusal(framework, what, remedy) from error
        if theirs is None:
            if number > 0:
                continue
            namesakes = [name for name, other in FRAMEWORKS.items() if other.package == original.package]
            others = [f"a newer version of {framework}", *(name for name in namesakes if name != framework)]
            remedy = f"Is this {framework}? It may be {' or '.join(others)}."
            raise _refusal(version, f"{module} has no {name}", remedy)
        ours = getattr(compat, name)
        arguments, valid = _arguments(theirs), [_arguments(ours)]
        if arguments == original.other_arguments.get(name):
            continue
        valid += original.older_arguments.get(name, ())
        if arguments not in valid:
            what = f"{module}.{name} has the arguments {arguments}; {' and '.join(valid)} are valid"
            raise _refusal(version, what)
        yield theirs, _named_as(theirs, ours)


def _refusal(
    who: str,
    what: str,
    remedy: str = "Use a version that fits, or call the public functions where the framework calls its own.",
) -> LogProbsError:
    return LogProbsError(f"{who} cannot be patched: {what}. Nothing was replaced. {remedy}")


def _arguments(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults, without annotations; of an autograd function, or what stands for one, of `apply`."""
    first = 0
    if isinstance(function, type):
        is_theirs = issubclass(function, torch.autograd.Function)
        function, first = (cast(Any, function).forward, 1) if is_theirs else (cast(Any, function).apply, 0)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:  # no function, or one of C++
        return f"unknown ({type(error).__name__}: {error})"
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()][
        first:
    ]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _named_as(original: Any, ours: Any) -> Any:
    """Copy `ours` under the original's name.

    Whoever holds the copy has it from the framework, and gets the original back; who imported ours keeps it. It is
    pickled as a reference to the framework's function.
    """
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    if isinstance(ours, type):
        return type(original.__name__, (ours,), {**names, "__doc__": ours.__doc__})
    copy = FunctionType(ours.__code__, ours.__globals__, original.__name__, ours.__defaults__, ours.__closure__)
    copy.__kwdefaults__, copy.__doc__, copy.__annotations__ = ours.__kwdefaults__, ours.__doc__, ours.__annotations__
    copy.__module__, copy.__qualname__ = original.__module__, original.__qualname__
    return copy


def _replace(value: object, by: object) -> list[str]:
    """Replace `value` in all loaded modules; return the places, `module.name` each."""
    places = []
    for module in list(sys.modules.values()):
        names: Any = getattr(module, "__dict__", None)
        for name, held in list(names.items()) if isinstance(names, dict) else []:
            if held is value:
                names[name] = by  # no `__setattr__` of a module, which might raise halfway
                places.append(f"{module.__name__}.{name}")
    return places


def _version(framework: Framework) -> str:
    try:
        return metadata.version(framework.package)
    except metadata.PackageNotFoundError:
        return "of an unknown version"
