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
from types import FunctionType, ModuleType
from typing import Any

from compiled_logprobs.compat.originals import FRAMEWORKS, Framework
from compiled_logprobs.errors import InputError, LogProbsError

Swap = tuple[Any, Any]
"""A framework's function, and what stands in its place."""

_active: dict[str, list[Swap]] = {}


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
        if {place.rpartition(".")[0] for place in self.places} <= FRAMEWORKS[self.framework].functions.keys():
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
    known = _known(framework)
    is_outermost = framework not in _active
    if is_outermost:
        swaps = list(_swaps(framework, known))  # all checks, before anything is replaced
        for original, ours in swaps:
            _replace(original, ours)
        _active[framework] = swaps
    places = tuple(f"{module.__name__}.{name}" for _, ours in _active[framework] for module, name in _holders(ours))
    return Patch(framework, _version(known), places, is_outermost)


def unpatch(framework: str) -> list[str]:
    """Put a framework's own functions back, also where they were imported from it since `patch`.

    Returns:
        The places, `module.name` each; none where the framework is not patched.

    Raises:
        InputError: no framework of that name is known.
    """
    _known(framework)
    return [place for original, ours in _active.pop(framework, []) for place in _replace(ours, original)]


def _known(framework: str) -> Framework:
    if framework not in FRAMEWORKS:
        raise InputError(
            f"got the framework {framework!r}; {', '.join(FRAMEWORKS)} are valid. "
            "For another one call the public functions."
        )
    return FRAMEWORKS[framework]


def _swaps(framework: str, known: Framework) -> Iterator[Swap]:
    """Each function that the installed version has, with a replacement. Raise LogProbsError where they do not fit."""
    compat = importlib.import_module(f"compiled_logprobs.compat.{framework}")
    version = f"{framework} {_version(known)}"
    places = [(module, name) for module, names in known.functions.items() for name in names]
    for module, name in places:
        is_required = (module, name) == places[0]
        try:
            original = getattr(importlib.import_module(module), name, None)  # in a lazy module, one more import
        except (Exception, SystemExit) as error:  # a foreign module may do anything when it is imported
            if not is_required:  # nothing here can call what cannot be imported here
                continue
            is_missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
            remedy = f"Install {framework}" if is_missing else f"See that `import {module}` works by itself"
            what = f"importing {module} failed ({type(error).__name__}: {error})"
            remedy = f"{remedy}, or import compiled_logprobs.compat.{framework} in its place."
            raise _refusal(framework, what, remedy) from error
        if original is None and is_required:
            remedy = f"Is this {framework}? It may be a newer version of it."
            raise _refusal(version, f"{module} has no {name}", remedy)
        if original is not None:
            ours, older = getattr(compat, name), known.older_arguments.get(name)
            valid = [_arguments(ours), *([older] if older else [])]
            try:
                arguments = _arguments(original)
            except Exception as error:  # no function, or one that computes its signature
                what = f"the arguments of {module}.{name} cannot be read ({type(error).__name__}: {error})"
                raise _refusal(version, what) from error
            if arguments not in valid:
                what = f"{module}.{name} has the arguments {arguments}; {' and '.join(valid)} are valid"
                raise _refusal(version, what)
            yield original, _named_as(original, ours)


def _refusal(
    who: str,
    what: str,
    remedy: str = "Use a version that fits, or call the public functions where the framework calls its own.",
) -> LogProbsError:
    return LogProbsError(f"{who} cannot be patched: {what}. Nothing was replaced. {remedy}")


def _arguments(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults, without annotations."""
    signature = inspect.signature(function)
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _named_as(original: Any, ours: Any) -> Any:
    """Copy `ours` under the original's name.

    Whoever holds the copy has it from the framework, and gets the original back; who imported ours keeps it. It is
    pickled as a reference to the framework's function.
    """
    copy = FunctionType(ours.__code__, ours.__globals__, ours.__name__, ours.__defaults__, ours.__closure__)
    copy.__kwdefaults__, copy.__doc__, copy.__annotations__ = ours.__kwdefaults__, ours.__doc__, ours.__annotations__
    copy.__module__, copy.__qualname__ = original.__module__, original.__qualname__
    return copy


def _holders(value: object) -> Iterator[tuple[ModuleType, str]]:
    """The loaded modules that have `value`, with the name."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict):
            yield from ((module, name) for name, held in list(names.items()) if held is value)


def _replace(value: object, by: object) -> list[str]:
    """Replace `value` in all loaded modules; return the places."""
    holders = list(_holders(value))
    for module, name in holders:
        vars(module)[name] = by  # no `__setattr__` of a module, which might raise halfway
    return [f"{module.__name__}.{name}" for module, name in holders]


def _version(known: Framework) -> str:
    try:
        return metadata.version(known.package)
    except metadata.PackageNotFoundError:
        return "of an unknown version"
