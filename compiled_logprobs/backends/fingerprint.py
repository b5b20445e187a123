"""A digest of what source code means: mending a typo in a comment, or moving a file, makes no stored decision stale."""

import ast
import hashlib
import re
from functools import cache
from pathlib import Path

NO_MEANING = ("ctx", "kind", "type_comment")
"""Fields of syntax nodes that follow from what stands around them, or say nothing to the interpreter."""


def digest_of(*sources: Path) -> str:
    """16 hexadecimal digits that change with the meaning of `sources`, Python or C++, and with nothing else.

    The same on each release of Python, which `ast.dump` and `ast.unparse` are not.
    """
    return hashlib.sha256("\n".join(_meaning(path) for path in sources).encode()).hexdigest()[:16]


@cache
def _meaning(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return meaning_of_python(text) if path.suffix == ".py" else meaning_of_cpp(text)


def meaning_of_python(text: str) -> str:
    """The names of nodes and of fields that are not empty, without docstrings and imports."""
    words: list[str] = []
    _add(ast.parse(text), words)
    return " ".join(words)


def meaning_of_cpp(text: str) -> str:
    """The text without comments, each run of blanks as one."""
    strings_and_comments = r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|//[^\n]*|/\*.*?\*/'
    code = re.sub(strings_and_comments, lambda found: " " if found[0][0] == "/" else found[0], text, flags=re.DOTALL)
    return " ".join(code.split())


def _add(node: object, words: list[str]) -> None:
    """What `node` means, to `words`: a list, since the first call of a process waits for this."""
    if isinstance(node, ast.AST):
        is_constant = isinstance(node, ast.Constant)
        words.append(f"({type(node).__name__}")
        for name in node._fields:
            value = getattr(node, name, None)
            if name in NO_MEANING or (not is_constant and (value is None or value == [])):
                continue
            if isinstance(node, ast.JoinedStr):  # releases differ in which empty parts they keep
                value = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
            words.append(name)
            if isinstance(value, str):
                words.append(repr(value))
            else:
                _add(value, words)
        words.append(")")
    elif isinstance(node, list):
        for item in node:
            if not isinstance(item, (ast.Import, ast.ImportFrom)) and not _is_docstring(item):
                _add(item, words)
    else:
        words.append(repr(node))


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
