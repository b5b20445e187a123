"""`patch("trl")`: this library's functions in place of a framework's own, in every module that has them by name.

A module that did `from trl.trainer.utils import selective_log_softmax` holds the function itself, and changing that module of
TRL alone would not reach it. So all loaded modules are searched for the very object. Modules that are imported later get what
the framework's module has by then. What keeps the function elsewhere (an attribute of an object, a `functools.partial`, the
result of `torch.compile`) keeps the original: patch before such things are made.
"""

import ast
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import FunctionType, ModuleType, TracebackType
from typing import Any, NamedTuple

from compiled_logprobs.compat.originals import FRAMEWORKS, Framework, Original
from compiled_logprobs.errors import InputError, LogProbsError


class Site(NamedTuple):
    """A name in a loaded module that was, and is now, a function of the framework."""

    module: str
    name: str
    lines: tuple[int, ...]
    """Lines of the module's source that call it."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}{_called_on(self.lines)}"


class Patch:
    """What `patch` did, and, as a context manager, for how long. `str()` is the report."""

    framework: str
    version: str
    """Of the installed package; "of an unknown version" where nothing says."""
    sites: tuple[Site, ...]
    """Where functions were replaced."""
    later: tuple[Site, ...]
    """The trainers that are not imported yet, and will get these functions when they are."""
    silent: tuple[str, ...]
    """The trainers that, in this version, call none of the functions: patching changes nothing for them."""

    def __init__(self, framework: str, swaps: "tuple[_Swap, ...]", owner: bool = True) -> None:
        known = FRAMEWORKS[framework]
        self.framework, self.version = framework, _version(known)
        self.sites = tuple(
            Site(module.__name__, name, _calls(_source(module), name))
            for swap in swaps
            for module, name in _holding(swap.ours)
        )
        self.later, self.silent = _of_callers(known, tuple(swap.name for swap in swaps))
        self._owner = owner

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owner:
            unpatch(self.framework)

    def __str__(self) -> str:
        lines = [f"{self.framework} {self.version}: replaced {_count(len(self.sites), 'name')}"]
        lines += [f"  {site}" for site in self.sites]
        if self.later:
            lines += ["not imported yet, and replaced when they are:", *(f"  {site}" for site in self.later)]
        if self.silent:
            lines += [self._silence()]
        return "\n".join(lines)

    def _silence(self) -> str:
        framework = FRAMEWORKS[self.framework]
        return (
            f"{', '.join(self.silent)} of {self.framework} {self.version} {'calls' if len(self.silent) == 1 else 'call'} none of "
            f"{', '.join(original.name for original in framework.originals)}: patching changes nothing there. "
            + framework.where_it_went
        ).rstrip()


class _Swap(NamedTuple):
    name: str
    original: Any
    ours: Any


_active: dict[str, tuple[_Swap, ...]] = {}


def patch(framework: str) -> Patch:
    """Replace the log-probability functions of an installed framework by those of `compiled_logprobs.compat.<framework>`.

    print(patch("trl"))                # until unpatch("trl")
    with patch("trl") as patched: ...  # until the end of the block

    All are checked first: where one of them has other arguments than the versions known here, none is replaced. A framework
    that is patched already stays as it is, and a block within the patch leaves it so.

    Args:
        framework: a name in `FRAMEWORKS`, such as "trl". Its package is imported.

    Returns:
        A `Patch`: the names replaced, with the lines that call them, and the trainers that do not call them in the
        installed version, of which a warning tells as well.

    Raises:
        InputError: no framework of that name is known.
        LogProbsError: it cannot be imported, or has a function with other arguments.
    """
    known = _known(framework)
    owner = framework not in _active
    if owner:
        found = [(one, *_checked(framework, known, one)) for one in known.originals]
        swaps = tuple(
            _Swap(one.name, original, _copy_named_as(original, ours)) for one, original, ours in found if original
        )
        for swap in swaps:
            _put(swap.ours, where=swap.original)
        _active[framework] = swaps
    patched = Patch(framework, _active[framework], owner)
    if owner and patched.silent:
        warnings.warn(patched._silence(), RuntimeWarning, stacklevel=2)
    return patched


def unpatch(framework: str) -> list[str]:
    """Put a framework's own functions back, also where they were imported from it since `patch`.

    Returns:
        The names put back; none where the framework is not patched.

    Raises:
        InputError: no framework of that name is known.
    """
    _known(framework)
    swaps = _active.pop(framework, ())
    return [name for swap in swaps for name in _put(swap.original, where=swap.ours)]


def _known(framework: str) -> Framework:
    if framework not in FRAMEWORKS:
        raise InputError(
            f"got the framework {framework!r}; {', '.join(FRAMEWORKS)} are valid. For another one call the public functions."
        )
    return FRAMEWORKS[framework]


def _checked(framework: str, known: Framework, one: Original) -> tuple[Any, Callable[..., Any]]:
    """The framework's function, None where this version has none, and ours. Raises LogProbsError where they do not fit."""
    ours: Callable[..., Any] = getattr(importlib.import_module(f"compiled_logprobs.compat.{framework}"), one.name)
    try:
        module = importlib.import_module(one.module)
    except ImportError as error:
        if not one.required:
            return None, ours
        raise LogProbsError(
            f"{framework} cannot be patched: importing {one.module} failed ({error}). Nothing was replaced. "
            f"Install {framework}, or import compiled_logprobs.compat.{framework} in its place."
        ) from error
    original = getattr(module, one.name, None)
    version = f"{framework} {_version(known)}"
    if original is None:
        if not one.required:
            return None, ours
        raise LogProbsError(
            f"{version} cannot be patched: {one.module} has no {one.name}. Nothing was replaced. "
            "Is this another framework, or a newer version? Call the public functions where it calls its own."
        )
    arguments = _arguments(original)
    if arguments not in one.signatures:
        raise LogProbsError(
            f"{version} cannot be patched: {one.module}.{one.name} has the arguments {arguments}; known are "
            f"{' and '.join(one.signatures)}. Nothing was replaced. Use a version with those, or call the public functions "
            "where it calls its own."
        )
    return original, ours


def _arguments(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults, without annotations."""
    signature = inspect.signature(function)
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _copy_named_as(original: Any, ours: Any) -> Any:
    """A function of its own with the code of `ours`: whoever holds it has it from the framework, and gets the original back.

    It goes by the original's name, so that it is pickled as a reference to it.
    """
    copy = FunctionType(ours.__code__, ours.__globals__, ours.__name__, ours.__defaults__, ours.__closure__)
    copy.__kwdefaults__, copy.__doc__, copy.__annotations__ = ours.__kwdefaults__, ours.__doc__, ours.__annotations__
    copy.__module__, copy.__qualname__ = original.__module__, original.__qualname__
    return copy


def _holding(value: object) -> Iterator[tuple[ModuleType, str]]:
    """Loaded modules that have `value`, with the name."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict):
            yield from ((module, name) for name, held in list(names.items()) if held is value)


def _put(value: object, where: object) -> list[str]:
    """Replace `where` by `value` in all loaded modules; their names."""
    held = list(_holding(where))
    for module, name in held:
        setattr(module, name, value)
    return [f"{module.__name__}.{name}" for module, name in held]


def _of_callers(known: Framework, names: tuple[str, ...]) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """What those of the framework's trainers call that are not imported, and which trainers call nothing."""
    later, silent = [], []
    for caller in known.callers:
        source = _source(sys.modules[caller]) if caller in sys.modules else _source_of_unloaded(caller)
        if source is None:
            continue
        called = [Site(caller, name, lines) for name in names if (lines := _calls(source, name))]
        if not called:
            silent.append(caller)
        elif caller not in sys.modules:
            later += called
    return tuple(later), tuple(silent)


def _source(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return _read(Path(file)) if file and file.endswith(".py") else None


def _source_of_unloaded(module: str) -> str | None:
    """Found from the framework's root: importing the packages in between may cost seconds, and fail."""
    root, *parts = module.split(".")
    for path in getattr(sys.modules.get(root), "__path__", ()):
        source = _read(Path(path).joinpath(*parts).with_suffix(".py"))
        if source is not None:
            return source
    return None


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _calls(source: str | None, name: str) -> tuple[int, ...]:
    """Lines of `source` that call `name`, or the attribute `name` of something."""
    if source is None or name not in source:
        return ()
    try:
        nodes = ast.walk(ast.parse(source))
    except SyntaxError:
        return ()
    called = {
        node.lineno
        for node in nodes
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id == name)
            or (isinstance(node.func, ast.Attribute) and node.func.attr == name)
        )
    }
    return tuple(sorted(called))


def _version(known: Framework) -> str:
    try:
        return metadata.version(known.distribution)
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _called_on(lines: tuple[int, ...]) -> str:
    return f", called on line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines))}" if lines else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
