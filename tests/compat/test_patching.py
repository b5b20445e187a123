"""`patch` on small packages that are laid out as the frameworks are; `tests/integrations` has it on the real TRL."""

import functools
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
    """Writes modules into an importable folder; what was imported from there is forgotten afterwards, and unpatched."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(module: str, source: str) -> None:
        file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.parents:
            if folder == tmp_path:
                break
            (folder / "__init__.py").touch()
        file.write_text(source)
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield write
    for framework in FRAMEWORKS:
        unpatch(framework)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def written(arguments: dict[str, str]) -> str:
    """The source of functions with these arguments, which return their origin."""
    return "\n\n".join(f"def {name}{these}:\n    return 'original'\n" for name, these in arguments.items())


@pytest.fixture
def utils(package) -> ModuleType:
    """A small `trl.trainer.utils`, with the newest arguments of its first function."""
    package(
        "trl.trainer.utils",
        written({"selective_log_softmax": "(logits, index, temperature=1.0, row_mask=None)"}),
    )
    return importlib.import_module("trl.trainer.utils")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_framework_is_replaced_in_every_module_and_put_back(package, name):
    ours = importlib.import_module(f"compiled_logprobs.compat.{name}")
    functions = FRAMEWORKS[name].functions
    holders = []
    for number, (module, names) in enumerate(functions.items()):
        package(module, written({each: patching._arguments(getattr(ours, each)) for each in names}))
        package(f"my_trainer_{number}", "".join(f"from {module} import {each}\n" for each in names))
        for holder in (importlib.import_module(module), importlib.import_module(f"my_trainer_{number}")):
            holders += [(holder, each) for each in names]
    before = [getattr(holder, each) for holder, each in holders]
    places = sorted(f"{holder.__name__}.{each}" for holder, each in holders)

    patched = patch(name)
    assert all(getattr(holder, each).__code__ is getattr(ours, each).__code__ for holder, each in holders)
    assert sorted(patched.places) == places

    assert sorted(unpatch(name)) == places
    assert [getattr(holder, each) for holder, each in holders] == before
    assert unpatch(name) == []


def test_the_replaced_function_computes(utils):
    with patch("trl"):
        log_probs = utils.selective_log_softmax(X, LABELS, temperature=0.5)
    with pytest.raises(ZeroDivisionError), patch("trl"):  # which undoes a block as well
        raise ZeroDivisionError
    expected = torch.log_softmax(X / 0.5, -1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_probs, expected)
    assert utils.selective_log_softmax(X, LABELS) == "original"


@pytest.mark.parametrize("framework", [name for name, known in FRAMEWORKS.items() if known.older_arguments])
def test_a_version_with_older_arguments_and_fewer_functions_is_patched(package, framework):
    ((module, _),) = FRAMEWORKS[framework].functions.items()
    ((name, arguments),) = FRAMEWORKS[framework].older_arguments.items()
    package(module, written({name: arguments}))
    with patch(framework) as patched:
        assert patched.places == (f"{module}.{name}",)
        assert getattr(sys.modules[module], name)(X, LABELS).shape == (2, 3)


def test_every_name_is_replaced_whatever_it_is_called_and_callers_through_a_module_are_served(package, utils):
    """Through its module, as EasyR1's actor does: `VF.log_probs_from_logits`."""
    package(
        "my_project.losses",
        "from trl.trainer import utils as U\nfrom trl.trainer.utils import selective_log_softmax as log_probs\n"
        "other = log_probs\n\n\ndef f(x, y):\n    return U.selective_log_softmax(x, y)\n",
    )
    losses = importlib.import_module("my_project.losses")
    with patch("trl") as patched:
        assert set(patched.places) == {
            "trl.trainer.utils.selective_log_softmax",
            "my_project.losses.log_probs",
            "my_project.losses.other",
        }
        assert losses.log_probs(X, LABELS).shape == losses.f(X, LABELS).shape == (2, 3)
    assert losses.log_probs(X, LABELS) == losses.f(X, LABELS) == "original"


def test_what_is_imported_later_gets_ours_and_then_its_own_back(package, utils):
    package("trl.trainer.grpo_trainer", "from trl.trainer.utils import selective_log_softmax\n")
    assert "No other loaded module holds them; those that import" in str(patch("trl"))
    grpo = importlib.import_module("trl.trainer.grpo_trainer")
    assert grpo.selective_log_softmax(X, LABELS).shape == (2, 3)
    assert "trl.trainer.grpo_trainer.selective_log_softmax" in patch("trl").places
    assert "trl.trainer.grpo_trainer.selective_log_softmax" in unpatch("trl")
    assert grpo.selective_log_softmax(X, LABELS) == "original"


def test_who_imported_ours_on_purpose_keeps_it_and_so_does_who_took_the_original_elsewhere(package, utils):
    package("my_losses", "from compiled_logprobs.compat.trl import selective_log_softmax\n")
    mine = importlib.import_module("my_losses")
    kept = functools.partial(utils.selective_log_softmax, X)
    with patch("trl") as patched:
        assert patched.places == ("trl.trainer.utils.selective_log_softmax",)
        assert kept(LABELS) == "original"
    assert mine.selective_log_softmax is trl.selective_log_softmax


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("selective_log_softmax", "(logits, index, temperature=0.9, row_mask=None)"),  # another default
        ("selective_log_softmax", "(index, logits)"),
        ("selective_log_softmax", "(logits, index, *, temperature=1.0, row_mask=None)"),
        ("selective_log_softmax", "(*args, **kwargs)"),
        ("entropy_from_logits", "(logits, chunk_size=128, top_k=None)"),
    ],
)
def test_changed_arguments_are_refused_before_anything_is_replaced(package, name, arguments):
    right = {"selective_log_softmax": "(logits, index)", "entropy_from_logits": "(logits, chunk_size=128)"}
    package("trl.trainer.utils", written({**right, name: arguments}))
    with pytest.raises(LogProbsError) as raised:
        patch("trl")
    assert f"trl.trainer.utils.{name} has the arguments {arguments}; (logits, " in str(raised.value)
    assert " valid. Nothing was replaced. " in str(raised.value)
    utils = sys.modules["trl.trainer.utils"]
    assert utils.selective_log_softmax.__code__.co_filename == utils.__file__
    package("trl.trainer.utils", written(right))
    del sys.modules["trl.trainer.utils"]
    assert len(patch("trl").places) == 2  # the refusal left nothing behind


def test_annotations_and_decorators_are_no_change(package):
    package(
        "trl.trainer.utils",
        "import functools\n\n"
        "def decorator(f):\n    return functools.wraps(f)(lambda *args, **kwargs: f(*args, **kwargs))\n\n"
        "@decorator\ndef selective_log_softmax(logits: 'Tensor', index: 'Tensor') -> 'Tensor':\n    return 0\n",
    )
    with patch("trl"):
        assert sys.modules["trl.trainer.utils"].selective_log_softmax(X, LABELS).shape == (2, 3)


def test_what_is_missing_is_named(package):
    failed = r"slime.utils.ppo_utils failed \(ModuleNotFoundError: No module named 'slime'\).*Install slime, or"
    with pytest.raises(LogProbsError, match=failed):
        patch("slime")
    package("verl.utils.torch_functional", "")
    with pytest.raises(LogProbsError, match="verl.utils.torch_functional has no log_probs_from_logits.*Is this easyr1"):
        patch("easyr1")
    package("trl.trainer.utils", "selective_log_softmax = 7\n")
    with pytest.raises(LogProbsError, match=r"selective_log_softmax cannot be read \(TypeError: 7 is not"):
        patch("trl")
    for function in (patch, unpatch):
        with pytest.raises(InputError, match="got the framework 'unsloth'; easyr1, verl, .* are valid"):
            function("unsloth")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('the driver is too old')", "RuntimeError: the driver is too old"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import a_package_that_is_missing", "ModuleNotFoundError: No module named 'a_package_that_is_missing'"),
        ("def __getattr__(name):\n    raise OSError('no libcudart.so.12')", "OSError: no libcudart.so.12"),
    ],
)
def test_a_framework_that_does_not_import_is_named_with_what_it_raised(package, source, said):
    package("trl.trainer.utils", source)
    with pytest.raises(LogProbsError) as raised:
        patch("trl")
    assert str(raised.value) == (
        f"trl cannot be patched: importing trl.trainer.utils failed ({said}). Nothing was replaced. "
        "See that `import trl.trainer.utils` works by itself, or import compiled_logprobs.compat.trl in its place."
    )


def test_what_only_some_installations_have_may_fail_to_import(package):
    """ROLL's part for Megatron: nothing that runs here can call it."""
    package("roll.utils.functionals", written({"log_probs_from_logits": "(logits, labels)"}))
    package("mcore_adapter.parallel_functions.vocab_parallel", "raise RuntimeError('no CUDA')")
    with patch("roll") as patched:
        assert patched.places == ("roll.utils.functionals.log_probs_from_logits",)


def test_the_report_can_be_read(package, utils, monkeypatch):
    package("trl.trainer.dpo_trainer", "from .utils import selective_log_softmax\n")
    importlib.import_module("trl.trainer.dpo_trainer")
    monkeypatch.setattr(patching, "_version", lambda known: "1.14.2")
    assert str(patch("trl")).splitlines() == [
        "trl 1.14.2: replaced in 2 places",
        "  trl.trainer.utils.selective_log_softmax",
        "  trl.trainer.dpo_trainer.selective_log_softmax",
    ]


def test_a_block_within_a_patch_leaves_it(utils):
    with patch("trl") as outer:
        replaced = utils.selective_log_softmax
        with patch("trl") as inner:
            assert inner.places == outer.places
        assert utils.selective_log_softmax is replaced
    assert utils.selective_log_softmax(X, LABELS) == "original"


def test_frameworks_are_patched_independently(package):
    arguments = {"log_probs_from_logits": "(logits, labels)", "logprobs_from_logits": "(logits, labels)"}
    package("verl.utils.torch_functional", written(arguments))
    functional = importlib.import_module("verl.utils.torch_functional")
    with patch("easyr1"):
        assert functional.logprobs_from_logits(X, LABELS) == "original"
        with patch("verl"):
            assert torch.equal(functional.logprobs_from_logits(X, LABELS), functional.log_probs_from_logits(X, LABELS))
        assert functional.logprobs_from_logits(X, LABELS) == "original"
    assert functional.log_probs_from_logits(X, LABELS) == "original"


def test_odd_things_among_the_modules_are_passed_over_or_bear_it(utils, monkeypatch):
    class Refusing:
        def __getattribute__(self, name):
            raise AttributeError(name)

    class Frozen(ModuleType):
        def __setattr__(self, name, value):
            raise AttributeError(name)

    frozen = Frozen("a_frozen_module")
    vars(frozen)["log_probs"] = utils.selective_log_softmax
    for name, module in {"refusing": Refusing(), "no_module": None, "frozen": frozen}.items():
        monkeypatch.setitem(sys.modules, name, module)
    with patch("trl") as patched:
        assert sorted(patched.places) == ["a_frozen_module.log_probs", "trl.trainer.utils.selective_log_softmax"]
    assert frozen.log_probs is utils.selective_log_softmax


def test_the_replaced_function_is_pickled_as_the_frameworks(utils):
    with patch("trl"):
        pickled = pickle.dumps(utils.selective_log_softmax)
    assert b"trl.trainer.utils" in pickled
    assert pickle.loads(pickled)(X, LABELS) == "original"  # as it is where it is loaded
