"""`patch("trl")`: this library's functions in place of a framework's own, in every module that has them by name.

A module that did `from trl.trainer.utils import selective_log_softmax` holds the function itself, and changing that module of
TRL alone would not reach it. So all loaded modules are searched for the very object. Modules that are imported later get what
the framework's module has by then, and so do functions that reach it through a module (`utils.selective_log_softmax`), which
the report names. What keeps the function elsewhere (an attribute of an object, a `functools.partial`, the result of
`torch.compile`) keeps the original: patch before such things are made.
"""

import ast
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from importlib.util import resolve_name
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
    """Lines of the module's source that use it."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}{_used_on(self.lines)}"


class Patch:
    """What `patch` did, and, as a context manager, for how long. `str()` is the report."""

    framework: str
    version: str
    """Of the installed package; "of an unknown version" where nothing says."""
    sites: tuple[Site, ...]
    """Where functions were replaced."""
    through: tuple[Site, ...]
    """Where functions of loaded modules reach them through a module, as in `utils.selective_log_softmax`, or import them only
    when they run. Looked for in the framework, in the main program, and in what holds the framework's modules."""
    later: tuple[Site, ...]
    """The trainers that are not imported yet, and will get these functions when they are."""
    silent: tuple[str, ...]
    """The trainers that, in this version, call none of the functions: patching changes nothing for them."""

    def __init__(self, framework: str, swaps: "tuple[_Swap, ...]", owner: bool = True) -> None:
        known = FRAMEWORKS[framework]
        self.framework, self.version = framework, _version(known)
        held = [(module, name) for swap in swaps for module, name in _holding(swap.ours)]
        uses = _uses(known, held, {id(swap.ours) for swap in swaps})
        self.sites = tuple(Site(module.__name__, name, uses.get((module.__name__, name), ())) for module, name in held)
        named = {(site.module, site.name) for site in self.sites}
        self.through = tuple(Site(*place, lines) for place, lines in uses.items() if place not in named)
        using = {module for module, _ in uses}
        self.later, self.silent = _of_callers(known, tuple(swap.name for swap in swaps), using)
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
        if self.through:
            lines += ["reached by functions when they run, and so replaced as well:"]
            lines += [f"  {site}" for site in self.through]
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
        A `Patch`: the names replaced, with the lines that use them, and the trainers that do not use them in the
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
        original = getattr(module, one.name, None)  # in a lazy module, one more import
    except (Exception, SystemExit) as error:  # a foreign module may do anything when it is imported
        if not one.required:  # nothing here can call what cannot be imported here
            return None, ours
        missing = isinstance(error, ModuleNotFoundError) and error.name == one.module.partition(".")[0]
        remedy = f"Install {framework}" if missing else f"See that `import {one.module}` works by itself"
        raise LogProbsError(
            f"{framework} cannot be patched: importing {one.module} failed ({type(error).__name__}: {error}). "
            f"Nothing was replaced. {remedy}, or import compiled_logprobs.compat.{framework} in its place."
        ) from error
    version = f"{framework} {_version(known)}"
    if original is None:
        if not one.required:
            return None, ours
        raise LogProbsError(
            f"{version} cannot be patched: {one.module} has no {one.name}. Nothing was replaced. "
            "Is this another framework, or a newer version? Call the public functions where it calls its own."
        )
    try:
        arguments = _arguments(original)
    except Exception as error:  # no function, or one that computes its signature
        raise LogProbsError(
            f"{version} cannot be patched: the arguments of {one.module}.{one.name} cannot be read "
            f"({type(error).__name__}: {error}). Nothing was replaced. Call the public functions where it calls its own."
        ) from error
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


def _uses(
    known: Framework, held: list[tuple[ModuleType, str]], ours: set[int]
) -> dict[tuple[str, str], tuple[int, ...]]:
    """What stands for one of `ours`, ids, in functions of loaded modules: a name that is `held`, or one reached through a module.

    By module and the words in its source, with the lines. What runs at import has run, and is left out.
    """
    names = {name for _, name in held}
    found: dict[tuple[str, str], set[int]] = {}
    for module in _near(known, [module for module, _ in held]):
        tree = _tree(_source(module), names)
        nodes = [] if tree is None else list(_within_functions(tree))
        scopes = [vars(module), _imported_by(nodes, module)]
        for node in nodes:
            if any(id(_stands_for(node, scope)) in ours for scope in scopes):
                found.setdefault((module.__name__, ast.unparse(node)), set()).add(node.lineno)
    return {place: tuple(sorted(lines)) for place, lines in found.items()}


def _near(known: Framework, holders: list[ModuleType]) -> Iterator[ModuleType]:
    """Loaded modules that may use what `holders` hold: the framework's, the main one, and those that hold one of these."""
    roots = {one.module.partition(".")[0] for one in known.originals}
    reached = {id(one) for one in holders}
    for one in holders:
        name = one.__name__
        while name := name.rpartition(".")[0]:
            if name in sys.modules:
                reached.add(id(sys.modules[name]))
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict) and (
            name == "__main__"
            or name.partition(".")[0] in roots
            or id(module) in reached
            or any(id(held) in reached for held in list(names.values()))
        ):
            yield module


def _within_functions(tree: ast.AST) -> Iterator[Any]:
    """The nodes of all functions' bodies."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for part in node.body if isinstance(node.body, list) else [node.body]:
                yield from ast.walk(part)


def _imported_by(nodes: Iterable[ast.AST], module: ModuleType) -> dict[str, object]:
    """What the import statements among `nodes` bind, as far as it is loaded."""
    found: dict[str, object] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for one in node.names:
                name = one.name if one.asname else one.name.partition(".")[0]
                found[one.asname or name] = sys.modules.get(name)
        elif isinstance(node, ast.ImportFrom):
            try:
                origin = resolve_name("." * node.level + (node.module or ""), module.__package__ or "")
            except ImportError:  # beyond the top
                continue
            names = getattr(sys.modules.get(origin), "__dict__", {})
            found |= {one.asname or one.name: names.get(one.name) for one in node.names}
    return found


def _stands_for(node: ast.AST, scope: dict[str, object]) -> object:
    """What a name, or names with dots of which all but the last are modules, stands for; None for everything else."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        owner = _stands_for(node.value, scope)
        return vars(owner).get(node.attr) if issubclass(type(owner), ModuleType) else None
    return None


def _of_callers(known: Framework, names: tuple[str, ...], using: set[str]) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """What those of the framework's trainers use that are not imported, and which trainers use nothing.

    `using` are loaded modules of which it is known that they use something, under whatever name.
    """
    later, silent = [], []
    for caller in known.callers:
        source = _source(sys.modules[caller]) if caller in sys.modules else _source_of_unloaded(caller)
        if source is None:
            continue
        used = [Site(caller, name, lines) for name in names if (lines := _uses_by_name(source, name))]
        if not used and caller not in using:
            silent.append(caller)
        elif caller not in sys.modules:
            later += used
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


def _tree(source: str | None, names: Iterable[str]) -> ast.AST | None:
    """`source` parsed, if one of `names` is in it."""
    if source is None or not any(name in source for name in names):
        return None
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _uses_by_name(source: str, name: str) -> tuple[int, ...]:
    """Lines of `source` that use `name`, or the attribute `name` of something."""
    tree = _tree(source, [name])
    used = {
        node.lineno
        for node in ([] if tree is None else ast.walk(tree))
        if (isinstance(node, ast.Name) and node.id == name) or (isinstance(node, ast.Attribute) and node.attr == name)
    }
    return tuple(sorted(used))


def _version(known: Framework) -> str:
    try:
        return metadata.version(known.distribution)
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _used_on(lines: tuple[int, ...]) -> str:
    return f", used on line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines))}" if lines else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
