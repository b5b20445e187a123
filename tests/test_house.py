"""The sizes of the house: short lines and files, few modules at the top, one meaning a class name, many fast tests."""

import ast
import statistics
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = [*ROOT.glob("compiled_logprobs/**/*.py"), *ROOT.glob("dashboard/**/*.py")]
OUTSIDE_OF_TESTS = [*SHIPPED, *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/**/*.py")]
ALL = [*OUTSIDE_OF_TESTS, *ROOT.glob("tests/**/*.py")]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_no_line_is_wider_than_120():
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in ALL
        for number, line in enumerate(lines(path), 1)
        if len(line) > 120
    ]
    assert not wide


def test_no_file_outside_of_tests_is_longer_than_400_lines():
    assert not {str(path.relative_to(ROOT)): n for path in OUTSIDE_OF_TESTS if (n := len(lines(path))) > 400}


def test_few_modules_lie_at_the_top():
    assert len(list(ROOT.glob("compiled_logprobs/*.py"))) <= 10


def test_a_class_name_has_one_meaning():
    names = Counter(
        node.name
        for path in SHIPPED
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, times in names.items() if times > 1]


def test_three_of_five_tests_are_quick(request):
    if len(request.config.is_quick) < 500:
        pytest.skip("only a part of the suite was collected")
    assert statistics.mean(request.config.is_quick) >= 0.6
