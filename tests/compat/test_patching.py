"""`patch` on small packages that are laid out as the frameworks are; `tests/integrations` has it on the real TRL."""

import importlib
import pickle
import sys
from types import ModuleType

import pytest
import torch

from compiled_logprobs import InputError, LogProbsError
from compiled_logprobs.compat import FRAMEWORKS, patch, patching, trl, unpatch

X = torch.linspace(-2, 2, 30).view(2, 3, 5)
LABELS = torch.tensor([[0, 1, 2], [3, 4, 0]])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes an importable module, and imports it unless told not to; it is unpatched and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(module: str, source: str, loaded: bool = True) -> ModuleType | None:
        file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
        file.write_text(source)
        importlib.invalidate_caches()
        sys.modules.pop(module, None)
        return importlib.import_module(module) if loaded else None

    yield write
    for framework in FRAMEWORKS:
        unpatch(framework)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def source_of(arguments: dict[str, str]) -> str:
    """Functions with these arguments, which return their origin."""
    return "\n\n".join(f"def {name}{these}:\n    return 'original'\n" for name, these in arguments.items())


@pytest.fixture
def utils(package) -> ModuleType:
    """A small `trl.trainer.utils`; annotations and a decorator do not change a function's arguments."""
    return package(
        "trl.trainer.utils",
        "import functools\n\n"
        "def decorator(f):\n    return functools.wraps(f)(lambda *args, **kwargs: f(*args, **kwargs))\n\n"
        "@decorator\ndef selective_log_softmax(logits: 'Tensor', index: 'Tensor', temperature: float = 1.0,\n"
        "                          row_mask: 'Tensor | None' = None) -> 'Tensor':\n    return 'original'\n",
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework_is_replaced_in_every_module_and_put_back(package, framework):
    ours = importlib.import_module(f"compiled_logprobs.compat.{framework}")
    arguments = {}
    for module, name in FRAMEWORKS[framework].functions:
        arguments.setdefault(module, {})[name] = patching._arguments(getattr(ours, name))
    holders = []
    for number, (module, functions) in enumerate(arguments.items()):
        own = package(module, source_of(functions))
        trainer = package(f"my_trainer_{number}", "".join(f"from {module} import {name}\n" for name in functions))
        holders += [(holder, name) for holder in (own, trainer) for name in functions]
    before = [getattr(holder, name) for holder, name in holders]
    places = sorted(f"{holder.__name__}.{name}" for holder, name in holders)

    patched = patch(framework)
    held = [(getattr(holder, name), getattr(ours, name)) for holder, name in holders]
    assert all(issubclass(a, b) if isinstance(b, type) else a.__code__ is b.__code__ for a, b in held)
    assert sorted(patched.places) == places

    assert sorted(unpatch(framework)) == places
    assert [getattr(holder, name) for holder, name in holders] == before
    assert unpatch(framework) == []


def test_a_block_ends_with_the_original_unless_it_is_within_a_patch(utils):
    with pytest.raises(ZeroDivisionError), patch("trl"):
        raise ZeroDivisionError
    assert utils.selective_log_softmax(X, LABELS) == "original"
    with patch("trl") as outer:
        with patch("trl") as inner:
            assert inner.places == outer.places
        log_probs = utils.selective_log_softmax(X, LABELS, temperature=0.5)
    expected = torch.log_softmax(X / 0.5, -1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_probs, expected)
    assert utils.selective_log_softmax(X, LABELS) == "original"


@pytest.mark.parametrize("framework", ["verl", "trl", "nemo_rl"])
def test_a_version_with_older_arguments_and_fewer_functions_is_patched(package, framework):
    ((module, name), *_) = FRAMEWORKS[framework].functions
    older = FRAMEWORKS[framework].older_arguments
    own = package(module, source_of({name: arguments[0] for name, arguments in older.items()}))
    with patch(framework) as patched:
        assert set(patched.places) == {f"{module}.{name}" for name in older}
        called = (LABELS, X) if framework == "nemo_rl" else (X, LABELS)
        assert getattr(own, name)(*called).shape == (2, 2 if framework == "nemo_rl" else 3)


def test_every_name_is_replaced_whatever_it_is_called_and_callers_through_a_module_are_served(package, utils):
    """Through its module, as EasyR1's actor does: `VF.log_probs_from_logits`. Who imported ours on purpose keeps it."""
    losses = package(
        "my_project.losses",
        "from compiled_logprobs.compat.trl import selective_log_softmax as ours\n"
        "from trl.trainer import utils as U\nfrom trl.trainer.utils import selective_log_softmax as log_probs\n"
        "other = log_probs\n\n\ndef f(x, y):\n    return U.selective_log_softmax(x, y)\n",
    )
    with patch("trl") as patched:
        assert set(patched.places) == {
            "trl.trainer.utils.selective_log_softmax",
            "my_project.losses.log_probs",
            "my_project.losses.other",
        }
        assert losses.log_probs(X, LABELS).shape == losses.f(X, LABELS).shape == (2, 3)
    assert losses.log_probs(X, LABELS) == losses.f(X, LABELS) == "original"
    assert losses.ours is trl.selective_log_softmax


def test_what_is_imported_later_gets_ours_and_then_its_own_back_and_the_report_can_be_read(package, utils, monkeypatch):
    monkeypatch.setattr(patching, "_version", lambda framework: "1.14.2")
    places = ["  trl.trainer.utils.selective_log_softmax", "  trl.trainer.grpo_trainer.selective_log_softmax"]
    assert str(patch("trl")).splitlines() == [
        "trl 1.14.2: replaced in 1 place",
        places[0],
        "No other loaded module holds them; those that import them from now on get the replacement.",
    ]
    grpo = package("trl.trainer.grpo_trainer", "from .utils import selective_log_softmax\n")
    assert grpo.selective_log_softmax(X, LABELS).shape == (2, 3)
    assert str(patch("trl")).splitlines() == ["trl 1.14.2: replaced in 2 places", *places]
    assert [f"  {place}" for place in unpatch("trl")] == places
    assert grpo.selective_log_softmax(X, LABELS) == "original"


OLDER = "def selective_log_softmax(logits, index): return 'original'\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            OLDER.replace("index", "index, temperature=0.9"),
            r"softmax has the arguments \(logits, index, temperature=0.9",
        ),
        (
            OLDER.replace("logits, index", "index, logits"),
            r"\(index, logits\); \(logits, index, temp.* and \(logits, index\)",
        ),
        (
            OLDER.replace("index", "*, index"),
            r"has the arguments \(logits, \*, index\); .* are valid. Nothing was replaced. ",
        ),
        (
            f"{OLDER}def entropy_from_logits(logits, top_k): ...",
            r"entropy_from_logits has the arguments \(logits, top_k\)",
        ),
        ("selective_log_softmax = 7", r"has the arguments unknown \(TypeError: 7 is not"),
        ("", "trl.trainer.utils has no selective_log_softmax.*Is this trl"),
        (
            "raise SystemExit(3)",
            r"importing trl.trainer.utils failed \(SystemExit: 3\). Nothing was replaced. Is trl installed",
        ),
        ("import a_package_that_is_missing", r"\(ModuleNotFoundError: No module named 'a_package_that_is_missing'\)"),
        ("def __getattr__(name):\n    raise OSError('no libcudart.so.12')", r"failed \(OSError: no libcudart.so.12\)"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_replaced(package, source, message):
    package("trl.trainer.utils", source, loaded=False)
    with pytest.raises(LogProbsError, match=f"^trl .*cannot be patched: .*{message}"):
        patch("trl")
    utils = sys.modules.get("trl.trainer.utils")
    if source.startswith("def selective"):
        assert utils.selective_log_softmax.__code__.co_filename == utils.__file__
    package("trl.trainer.utils", OLDER)
    assert len(patch("trl").places) == 1  # the refusal left nothing behind


def test_easyr1_is_told_from_verl_whose_name_it_has(package):
    package("verl.utils.torch_functional", source_of({"log_probs_from_logits": "(logits, labels)"}))
    with pytest.raises(LogProbsError, match="no logprobs_from_logits.*It may be a newer version of verl or easyr1"):
        patch("verl")


def test_a_framework_that_is_missing_or_unknown_is_named():
    failed = r"ppo_utils failed \(ModuleNotFoundError: No module named 'slime'\).*Is slime installed. See that `import"
    with pytest.raises(LogProbsError, match=failed):
        patch("slime")
    for function in (patch, unpatch):
        with pytest.raises(InputError, match="got the framework 'unsloth'; easyr1, verl, .* are valid"):
            function("unsloth")


def test_what_only_some_installations_have_may_fail_to_import(package):
    """ROLL's part for Megatron: nothing that runs here can call it."""
    package("roll.utils.functionals", source_of({"log_probs_from_logits": "(logits, labels)"}))
    package("mcore_adapter.parallel_functions.vocab_parallel", "raise RuntimeError('no CUDA')", loaded=False)
    with patch("roll") as patched:
        assert patched.places == ("roll.utils.functionals.log_probs_from_logits",)


def test_frameworks_are_patched_independently(package):
    arguments = {"log_probs_from_logits": "(logits, labels)", "logprobs_from_logits": "(logits, labels)"}
    functional = package("verl.utils.torch_functional", source_of(arguments))
    with patch("easyr1"):
        assert functional.logprobs_from_logits(X, LABELS) == "original"
        with patch("verl"):
            assert torch.equal(functional.logprobs_from_logits(X, LABELS), functional.log_probs_from_logits(X, LABELS))
        assert functional.logprobs_from_logits(X, LABELS) == "original"
    assert functional.log_probs_from_logits(X, LABELS) == "original"


def test_odd_things_among_the_modules_are_passed_over(utils, monkeypatch):
    class Refusing:
        def __getattribute__(self, name):
            raise AttributeError(name)

    for name, module in {"refusing": Refusing(), "no_module": None}.items():
        monkeypatch.setitem(sys.modules, name, module)
    with patch("trl") as patched:
        assert patched.places == ("trl.trainer.utils.selective_log_softmax",)


def test_the_replaced_function_is_pickled_as_the_frameworks(utils):
    with patch("trl"):
        pickled = pickle.dumps(utils.selective_log_softmax)
    assert b"trl.trainer.utils" in pickled
    assert pickle.loads(pickled)(X, LABELS) == "original"  # as it is where it is loaded
