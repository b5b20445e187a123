"""Torch promises no private name: the package uses none without something that holds where it is gone."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [
    path for folder in ("compiled_logprobs", "dashboard", "examples") for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
]
DOCUMENTED = {"torch._dynamo", "torch._dynamo.mark_dynamic"}
"""What torch's documentation names, underscore and all."""


def private_names(tree: ast.AST) -> set[str]:
    """The names of torch in `tree` that have a part with an underscore before it; as strings they do not count."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    return {
        name
        for name in names
        if name.split(".")[0] == "torch" and any(p[0] == "_" and p[:2] != "__" for p in name.split("."))
    }


def test_a_private_name_of_torch_is_only_looked_for():
    """With `find_private`, or `getattr` and a default."""
    found = {path: private_names(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES}
    wrong = {str(path.relative_to(ROOT)): names for path, names in found.items() if names - DOCUMENTED}
    assert not wrong
