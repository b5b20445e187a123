"""A backend's fingerprint follows the meaning of its source, not its bytes."""

import hashlib
from pathlib import Path

import pytest

from compiled_logprobs.backends.fingerprint import digest_of, meaning_of_cpp, meaning_of_python

PYTHON = '''"""A module."""

import math
from os import path  # a comment


class Backend:
    """A class."""

    limit: float = 0.5
    """What an attribute says."""

    async def run(self, *rows: int, scale: float | None = None, **rest: object) -> str:
        """A function."""
        async for row in self.rows():
            yield f"{row!r:>{self.limit:.2f}}{scale}", {**rest, "": None, "off": False}
        match rows:
            case [first, *_] if first:
                yield lambda x, /, y=1j, *, z=b"z": x[1:, ...] @ y
'''
CPP = """// A comment.
#include <vector>
/* More
   of it. */
const char* text = "// not a comment";  float half = .5f;
"""


def changed(old: str, new: str) -> str:
    assert old in PYTHON
    return PYTHON.replace(old, new)


SAME = {
    "docstring": changed('"""A function."""', '"""A function, mended."""'),
    "docstring of an attribute": changed('    """What an attribute says."""\n', ""),
    "comment": changed("# a comment", "# another"),
    "imports": changed("import math\n", "import sys\nimport json\n"),
    "form": changed("x[1:, ...] @ y", "(x[1:, ...]\n                    @ y)"),
}
OTHER = {
    "number": changed("0.5", "0.25"),
    "name": changed("rows()", "columns()"),
    "empty text": changed('"": None', '"a": None'),
    "None": changed('"": None', '"": 0'),
    "part of an f-string": changed("{scale}", "{scale} "),
    "operator": changed("@ y", "* y"),
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_what_changes_results_counts_and_what_says_nothing_to_the_interpreter_does_not(name: str):
    text = SAME.get(name) or OTHER[name]
    assert (meaning_of_python(text) == meaning_of_python(PYTHON)) == (name in SAME)


def test_the_digest_is_the_same_on_each_release_of_python():
    """Stored decisions go by it, and travel between releases."""
    digest = hashlib.sha256(meaning_of_python(PYTHON).encode()).hexdigest()
    assert digest[:16] == "5f6473c8700e0d9a"


def test_cpp_counts_without_its_comments():
    assert meaning_of_cpp(CPP) == '#include <vector> const char* text = "// not a comment"; float half = .5f;'


def test_a_file_counts_by_its_content_not_its_place(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "source.py").write_text(PYTHON)
    (tmp_path / "source.cpp").write_text(CPP)
    assert digest_of(tmp_path / "a" / "source.py") == digest_of(tmp_path / "b" / "source.py")
    assert digest_of(tmp_path / "a" / "source.py") != digest_of(tmp_path / "source.cpp")
