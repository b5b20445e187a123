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


def test_lines_and_files_are_short():
    for path in ALL:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines), default=0) <= 120, path
        assert len(lines) <= 400 or path not in OUTSIDE_OF_TESTS, path


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
