"""What `compat` does not have says what to use instead, where it is imported."""

import re
from importlib import import_module
from pkgutil import resolve_name

import pytest

from compiled_logprobs.compat import FRAMEWORKS
from compiled_logprobs.compat.missing import ADVICE

NAMES = [(framework, name) for framework, rows in ADVICE.items() for names, _, _ in rows for name in names.split()]


@pytest.mark.parametrize(("framework", "name"), NAMES, ids=map(".".join, NAMES))
def test_a_missing_function_says_what_to_use_instead(framework, name):
    module = import_module(f"compiled_logprobs.compat.{framework}")
    with pytest.raises(ImportError, match=rf"^{module.__name__} has no {name}\. \S.*\.$") as raised:
        exec(f"from {module.__name__} import {name}")
    called = re.search(r"call ([\w.]+)", str(raised.value), re.IGNORECASE)[1]
    assert callable(resolve_name(called if called.startswith("compiled_") else f"{module.__name__}:{called}"))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_any_other_name_is_missing_as_everywhere(framework):
    module = import_module(f"compiled_logprobs.compat.{framework}")
    assert not hasattr(module, "log_prob") and not hasattr(module, "__path__")
    with pytest.raises(ImportError, match=f"cannot import name 'log_prob' from '{module.__name__}'"):
        exec(f"from {module.__name__} import log_prob")
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'log_prob'"):
        module.log_prob  # noqa: B018 - it raises
