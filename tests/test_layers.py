"""The order of the layers: a folder imports only what stands left of it, lazy imports included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "compiled_logprobs", ROOT / "dashboard/compiled_logprobs_dashboard")
ORDER = (
    "errors < policy < problem < decision < arguments < {operation, machine} < {store, backends} < check < tuning < "
    "choose < api < {cli, compat, testing} < dashboard"
)
LEVELS = [set(level.strip(" {}").split(", ")) for level in ORDER.split("<")]
ANYWHERE = ("__init__", "__main__")
"""The public names, and the command: they import what they need, and nothing of the package imports them."""


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path, root): path for root in PACKAGES for path in sorted(root.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """The other modules of both packages that a module imports, wherever in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {nearest for name in names if (nearest := nearest_module(name))} - {module}


def nearest_module(name: str) -> str:
    """The module that holds `name`, which may be a name in it; empty where it is of neither package."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def layer_of(module: str) -> str:
    """Of a name that the package itself gives, `__init__`."""
    package, *parts = module.split(".")
    return "dashboard" if package == "compiled_logprobs_dashboard" else [*parts, "__init__"][0]


def level_of(layer: str) -> int:
    return next(number for number, level in enumerate(LEVELS) if layer in level)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_left_of_its_layer(module: str):
    here = layer_of(module)
    if here in ANYWHERE:
        return
    for there in map(layer_of, imports(module)):
        if there == "__init__":  # the public interface, for what stands above it
            assert level_of(here) > level_of("api"), f"{here} imports the public interface from below"
        elif there != here:
            assert level_of(there) < level_of(here), f"{here} imports {there}; the order is {ORDER}"


@pytest.mark.parametrize("folder", sorted(set(map(layer_of, MODULES)) - set(ANYWHERE)))
def test_a_folder_has_no_circle(folder: str):
    graph = {module: imports(module) for module in MODULES if layer_of(module) == folder}
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_backends_do_not_import_each_other():
    families = {m: [*m.split("."), ""][2].split("_")[0] for m in MODULES if layer_of(m) == "backends"}
    for module, family in families.items():
        others = {families[other] for other in imports(module) if other in families}
        assert others <= {family, "", "base", "fingerprint"}, module
