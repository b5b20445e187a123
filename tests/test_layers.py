"""The order of the layers: a folder imports only what stands left of it, lazy imports included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "compiled_logprobs": ROOT / "compiled_logprobs",
    "dashboard": ROOT / "dashboard" / "compiled_logprobs_dashboard",
}
ORDER = (
    "errors < policy < problem < decision < arguments < {operation, machine} < {store, backends} < check < tuning < "
    "choose < api < {cli, compat} < dashboard"
)
LEVELS = [set(level.strip(" {}").split(", ")) for level in ORDER.split("<")]
ANYWHERE = ("__init__", "__main__")
"""The public names, and the command: they import what they need, and nothing of the package imports them."""


def files() -> dict[Path, str]:
    """Each module of both packages, and the layer that it belongs to."""
    found = {}
    for package, root in PACKAGES.items():
        for path in sorted(root.rglob("*.py")):
            found[path] = package if package == "dashboard" else path.relative_to(root).parts[0].removesuffix(".py")
    return found


def imported(path: Path) -> Iterator[str]:
    """The modules of both packages that the module at `path` imports, wherever in it: full dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (
            name for name in names if name.split(".")[0] in ("compiled_logprobs", "compiled_logprobs_dashboard")
        )


def layer_of(module: str) -> str:
    """Of a name that the package itself gives, `__init__`."""
    package, *parts = module.split(".")
    if package == "compiled_logprobs_dashboard":
        return "dashboard"
    is_module = parts and any((PACKAGES[package] / parts[0]).with_suffix(suffix).exists() for suffix in ("", ".py"))
    return parts[0] if is_module else "__init__"


def level_of(layer: str) -> int:
    return next(number for number, level in enumerate(LEVELS) if layer in level)


FILES = files()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_left_of_its_layer(path: Path):
    here = FILES[path]
    if here in ANYWHERE:
        return
    for module in imported(path):
        there = layer_of(module)
        if there == "__init__":  # the public interface, for what stands above it
            assert level_of(here) > level_of("api"), f"{here} imports the public interface from below"
        elif there != here:
            assert level_of(there) < level_of(here), f"{here} imports {there}; the order is {ORDER}"


@pytest.mark.parametrize("folder", sorted({layer for layer in FILES.values() if layer not in ANYWHERE}))
def test_a_folder_has_no_circle(folder: str):
    names = {module_name(path): path for path, layer in FILES.items() if layer == folder}
    graph = {
        name: {found for module in imported(path) if (found := nearest(module, names))} for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, (*above, name))
            done.add(name)

    for name in names:
        visit(name, ())


def test_backends_do_not_import_each_other():
    backends = {path.stem for path in (PACKAGES["compiled_logprobs"] / "backends").glob("*.py")}
    shared = {"__init__", "base", "fingerprint"}
    for path in (PACKAGES["compiled_logprobs"] / "backends").glob("*.py"):
        others = {name.split(".")[2] for name in imported(path) if name.startswith("compiled_logprobs.backends.")}
        own = {name for name in backends if name.split("_")[0] == path.stem.split("_")[0]}
        assert not (others & backends) - shared - own - {path.stem}, path.name


def module_name(path: Path) -> str:
    root = next(root for root in PACKAGES.values() if path.is_relative_to(root))
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nearest(module: str, names: dict[str, Path]) -> str | None:
    """The module of `names` that holds `module`, which may be a name in it."""
    while module:
        if module in names:
            return module
        module = module.rpartition(".")[0]
    return None
