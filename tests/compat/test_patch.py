"""`patch` on small packages that are laid out as the frameworks are; `integrations/` has it on the real TRL."""

import functools
import importlib
import pickle
import sys
from pathlib import Path

import pytest
import torch

from compiled_logprobs import InputError, LogProbsError, compat
from compiled_logprobs.compat import FRAMEWORKS, patch, patching, trl, unpatch

X = torch.linspace(-2, 2, 30).view(2, 3, 5)
LABELS = torch.tensor([[0, 1, 2], [3, 4, 0]])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules into an importable folder; what was imported from there is forgotten afterwards, and unpatched."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(module: str, source: str) -> Path:
        file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.parents:
            if folder == tmp_path:
                break
            (folder / "__init__.py").touch()
        file.write_text(source)
        importlib.invalidate_caches()
        return file

    before = set(sys.modules)
    yield write
    for framework in FRAMEWORKS:
        unpatch(framework)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def write_framework(package, name: str, newest: bool = True, callers: bool = True) -> None:
    framework = FRAMEWORKS[name]
    modules: dict[str, list[str]] = {}
    for original in framework.originals:
        arguments = original.signatures[0 if newest else -1]
        modules.setdefault(original.module, []).append(f"def {original.name}{arguments}:\n    return 'original'\n")
    for module, functions in modules.items():
        package(module, "\n\n".join(functions))
    for caller in framework.callers if callers else ():
        lines = [f"from {one.module} import {one.name}" for one in framework.originals]
        lines += ["", "", "def loss(logits, labels):"]
        lines += [f"    {one.name}(logits, labels)" for one in framework.originals]
        package(caller, "\n".join(lines) + "\n")


def write_trl(package, arguments: str = "(logits, index, temperature=1.0, row_mask=None)") -> None:
    package("trl.trainer.utils", f"def selective_log_softmax{arguments}:\n    return 'original'\n")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_framework_is_replaced_where_it_calls_its_functions_and_put_back(package, name):
    write_framework(package, name)
    framework = FRAMEWORKS[name]
    loaded = [importlib.import_module(caller) for caller in framework.callers]
    ours = importlib.import_module(f"compiled_logprobs.compat.{name}")
    holders = [
        (holder, original)
        for original in framework.originals
        for holder in [importlib.import_module(original.module), *loaded]
    ]
    before = [getattr(holder, original.name) for holder, original in holders]

    patched = patch(name)
    for holder, original in holders:
        assert getattr(holder, original.name).__code__ is getattr(ours, original.name).__code__
    names = sorted(f"{holder.__name__}.{original.name}" for holder, original in holders)
    assert sorted(f"{site.module}.{site.name}" for site in patched.sites) == names
    assert patched.silent == () and patched.later == ()
    assert all(site.lines for site in patched.sites if site.module in framework.callers)

    assert sorted(unpatch(name)) == names
    assert [getattr(holder, original.name) for holder, original in holders] == before
    assert unpatch(name) == []


def test_the_replaced_function_computes(package):
    write_framework(package, "trl")
    from trl.trainer import grpo_trainer  # the package above

    with patch("trl"):
        log_probs = grpo_trainer.selective_log_softmax(X, LABELS, temperature=0.5)
        both, entropy = grpo_trainer.selective_log_softmax_and_entropy(X, LABELS, temperature=0.5)
    expected = torch.log_softmax(X / 0.5, -1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_probs, expected)
    assert torch.equal(both, log_probs) and (entropy > 0).all()
    assert grpo_trainer.selective_log_softmax(X, LABELS) == "original"


def test_trls_older_arguments_are_known_too(package):
    write_framework(package, "trl", newest=False)
    from trl.trainer import utils

    with patch("trl"):
        assert utils.selective_log_softmax(X, LABELS).shape == (2, 3)


def test_a_version_without_the_newer_functions_is_patched(package):
    write_trl(package, "(logits, index)")
    patched = patch("trl")
    assert [site.name for site in patched.sites] == ["selective_log_softmax"]


def test_every_name_is_found_whatever_it_is_called(package):
    write_trl(package)
    package(
        "my_project.losses", "from trl.trainer.utils import selective_log_softmax as log_probs\nother = log_probs\n"
    )
    losses = importlib.import_module("my_project.losses")
    patched = patch("trl")
    assert {(site.module, site.name) for site in patched.sites} == {
        ("trl.trainer.utils", "selective_log_softmax"),
        ("my_project.losses", "log_probs"),
        ("my_project.losses", "other"),
    }
    assert losses.log_probs(X, LABELS).shape == (2, 3)


def test_what_is_imported_later_gets_ours_and_then_its_own_back(package):
    write_trl(package)
    source = (
        "from trl.trainer.utils import selective_log_softmax\n\ndef f(x, y):\n    return selective_log_softmax(x, y)\n"
    )
    package("trl.trainer.grpo_trainer", source)
    patched = patch("trl")
    assert [(site.module, site.lines) for site in patched.later] == [("trl.trainer.grpo_trainer", (4,))]
    grpo = importlib.import_module("trl.trainer.grpo_trainer")
    assert grpo.f(X, LABELS).shape == (2, 3)
    assert "trl.trainer.grpo_trainer.selective_log_softmax" in unpatch("trl")
    assert grpo.f(X, LABELS) == "original"


def test_callers_through_a_module_are_served_and_named(package):
    """As EasyR1's actor is: `VF.log_probs_from_logits`, which it compiles."""
    write_trl(package)
    package(
        "my_project.losses",
        "import functools\n\nimport trl.trainer.utils\nfrom trl.trainer import utils as U\n\n\n"
        "def f(x, y):\n    return U.selective_log_softmax(x, y)\n\n\n"
        "class Actor:\n    def __init__(self):\n"
        "        self.log_probs = functools.partial(trl.trainer.utils.selective_log_softmax)\n\n"
        "    def twice(self, x, y):\n        return [U.selective_log_softmax(x, y) for _ in 'ab']\n",
    )
    package(
        "my_project.metrics",  # which holds the module, too, and uses something else of that name
        "from trl.trainer import utils\n\n\nat_import = utils.selective_log_softmax(1, 2)\n\n\n"
        "def f(outputs):\n    return outputs.selective_log_softmax\n",
    )
    package(
        "trl.trainer.grpo_trainer",
        "def f(x, y):\n    from . import utils\n\n    return utils.selective_log_softmax(x, y)\n\n\n"
        "def g(x, y):\n    from .utils import selective_log_softmax as log_probs\n\n    return log_probs(x, y)\n",
    )
    losses, grpo = map(importlib.import_module, ("my_project.losses", "trl.trainer.grpo_trainer"))
    importlib.import_module("my_project.metrics")
    with patch("trl") as patched:
        for call in (losses.f, losses.Actor().log_probs, grpo.f, grpo.g):
            assert call(X, LABELS).shape == (2, 3)
    assert [site.module for site in patched.sites] == ["trl.trainer.utils"]
    assert {(site.module, site.name): site.lines for site in patched.through} == {
        ("my_project.losses", "U.selective_log_softmax"): (8, 16),
        ("my_project.losses", "trl.trainer.utils.selective_log_softmax"): (13,),
        ("trl.trainer.grpo_trainer", "utils.selective_log_softmax"): (4,),
        ("trl.trainer.grpo_trainer", "log_probs"): (10,),
    }
    assert patched.silent == ()
    report = str(patched).splitlines()
    at = report.index("reached by functions when they run, and so replaced as well:")
    assert "  my_project.losses.U.selective_log_softmax, used on lines 8, 16" in report[at + 1 :]


def test_the_lines_of_a_name_are_those_that_use_it(package):
    """Taken, as by torch.compile, or called; not an attribute of something else that has the same name."""
    write_trl(package)
    package(
        "trl.trainer.dpo_trainer",
        "from .utils import selective_log_softmax as log_probs\n\n\n"
        "def f(self, x, y):\n    self.log_probs = log_probs\n    return self.log_probs(x, y)\n",
    )
    importlib.import_module("trl.trainer.dpo_trainer")
    with patch("trl") as patched:
        assert [site.lines for site in patched.sites if site.name == "log_probs"] == [(5,)]
        assert patched.through == patched.silent == ()


def test_whoever_imported_ours_on_purpose_keeps_it(package):
    write_trl(package)
    package("my_losses", "from compiled_logprobs.compat.trl import selective_log_softmax\n")
    mine = importlib.import_module("my_losses")
    with patch("trl") as patched:
        assert [site.module for site in patched.sites] == ["trl.trainer.utils"]
    assert mine.selective_log_softmax is trl.selective_log_softmax


def test_changed_arguments_are_refused_before_anything_is_replaced(package):
    framework = FRAMEWORKS["trl"]
    write_framework(package, "trl")
    changed = "def entropy_from_logits(logits, chunk_size=128, top_k=None):\n    return 'original'\n"
    file = package("trl.trainer.utils", "")
    file.write_text(
        changed
        + "".join(
            f"def {one.name}{one.signatures[0]}:\n    return 'original'\n"
            for one in framework.originals
            if one.name != "entropy_from_logits"
        )
    )
    with pytest.raises(LogProbsError) as raised:
        patch("trl")
    assert "trl.trainer.utils.entropy_from_logits has the arguments (logits, chunk_size=128, top_k=None)" in str(
        raised.value
    )
    assert "known are (logits, chunk_size=128). Nothing was replaced." in str(raised.value)
    utils = sys.modules["trl.trainer.utils"]
    assert utils.selective_log_softmax(X, LABELS) == "original"
    write_trl(package)
    del sys.modules["trl.trainer.utils"]
    patch("trl")  # the refusal left nothing behind


@pytest.mark.parametrize(
    "arguments",
    [
        "(logits, index, temperature=0.9, row_mask=None)",  # another default
        "(index, logits)",
        "(logits, index, *, temperature=1.0, row_mask=None)",
        "(logits, labels)",
        "(*args, **kwargs)",
    ],
)
def test_each_kind_of_change_is_seen(package, arguments):
    write_trl(package, arguments)
    with pytest.raises(LogProbsError, match="Nothing was replaced"):
        patch("trl")


def test_annotations_and_decorators_are_no_change(package):
    package(
        "trl.trainer.utils",
        "import functools\n\n"
        "def decorator(f):\n    return functools.wraps(f)(lambda *args, **kwargs: f(*args, **kwargs))\n\n"
        "@decorator\ndef selective_log_softmax(logits: 'Tensor', index: 'Tensor') -> 'Tensor':\n    return 'original'\n",
    )
    with patch("trl"):
        assert sys.modules["trl.trainer.utils"].selective_log_softmax(X, LABELS).shape == (2, 3)


def test_what_is_missing_is_named(package):
    failed = (
        r"importing slime.utils.ppo_utils failed \(ModuleNotFoundError: No module named 'slime'\).*Install slime, or"
    )
    with pytest.raises(LogProbsError, match=failed):
        patch("slime")
    package("verl.utils.torch_functional", "")
    with pytest.raises(
        LogProbsError, match="verl.utils.torch_functional has no log_probs_from_logits.*another framework"
    ):
        patch("easyr1")
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
    package("roll.utils.functionals", "def log_probs_from_logits(logits, labels):\n    return 'original'\n")
    package("mcore_adapter.parallel_functions.vocab_parallel", "raise RuntimeError('no CUDA')")
    with patch("roll") as patched:
        assert [site.name for site in patched.sites] == ["log_probs_from_logits"]


def test_what_is_no_function_any_more_is_refused(package):
    package("trl.trainer.utils", "selective_log_softmax = 7\n")
    with pytest.raises(
        LogProbsError, match=r"trl.trainer.utils.selective_log_softmax cannot be read \(TypeError: 7 is not"
    ):
        patch("trl")


def test_trainers_that_do_not_call_it_are_named(package):
    """As from TRL 1.15 on."""
    write_trl(package)
    package("trl.trainer.grpo_trainer", "from trl.trainer.utils import add_fused_lm_head\n")
    package(
        "trl.trainer.dpo_trainer",
        "from trl.trainer import utils\n\n"
        "def f(x, y):\n    # selective_log_softmax(x, y)\n    return utils.selective_log_softmax(x, y)\n",
    )
    with pytest.warns(RuntimeWarning, match="trl.trainer.grpo_trainer of trl .* calls none of .*add_fused_lm_head"):
        patched = patch("trl")
    assert patched.silent == ("trl.trainer.grpo_trainer",)
    assert [(site.module, site.lines) for site in patched.later] == [("trl.trainer.dpo_trainer", (5,))]
    assert "trl.trainer.grpo_trainer" not in sys.modules  # it was read, not imported


def test_the_report_can_be_read(package, monkeypatch):
    write_trl(package)
    package(
        "trl.trainer.dpo_trainer",
        "from .utils import selective_log_softmax\n\n"
        "def f(x, y):\n    a = selective_log_softmax(x, y)\n    return a + selective_log_softmax(x, y)\n",
    )
    package("trl.trainer.kto_trainer", "from .utils import selective_log_softmax\nselective_log_softmax(1, 2)\n")
    package("trl.trainer.grpo_trainer", "")
    importlib.import_module("trl.trainer.dpo_trainer")
    monkeypatch.setattr(patching, "_version", lambda known: "1.14.2")
    with pytest.warns(RuntimeWarning):
        patched = patch("trl")
    assert str(patched).splitlines() == [
        "trl 1.14.2: replaced 2 names",
        "  trl.trainer.utils.selective_log_softmax",
        "  trl.trainer.dpo_trainer.selective_log_softmax, used on lines 4, 5",
        "not imported yet, and replaced when they are:",
        "  trl.trainer.kto_trainer.selective_log_softmax, used on line 2",
        "trl.trainer.grpo_trainer of trl 1.14.2 calls none of selective_log_softmax, selective_log_softmax_and_entropy, "
        "entropy_from_logits: patching changes nothing there. Since TRL 1.15 these trainers compute log-probabilities from "
        "hidden states (add_fused_lm_head), which patching does not change; 1.14 is the last version whose trainers call the "
        "functions.",
    ]


def test_a_block_within_a_patch_leaves_it(package):
    write_trl(package)
    from trl.trainer import utils

    with patch("trl") as outer:
        replaced = utils.selective_log_softmax
        with patch("trl") as inner:
            assert inner.sites == outer.sites
        assert utils.selective_log_softmax is replaced
    assert utils.selective_log_softmax(X, LABELS) == "original"


def test_a_block_is_undone_by_an_error_as_well(package):
    write_trl(package)
    with pytest.raises(ZeroDivisionError), patch("trl"):
        raise ZeroDivisionError
    assert sys.modules["trl.trainer.utils"].selective_log_softmax(X, LABELS) == "original"


def test_frameworks_are_patched_independently(package):
    package(
        "verl.utils.torch_functional",
        "def log_probs_from_logits(logits, labels):\n    return 'easyr1'\n\n"
        "def logprobs_from_logits(logits, labels, inplace_backward=True):\n    return 'verl'\n",
    )
    functional = importlib.import_module("verl.utils.torch_functional")
    with patch("easyr1"):
        assert functional.logprobs_from_logits(X, LABELS) == "verl"
        with patch("verl"):
            assert torch.equal(functional.logprobs_from_logits(X, LABELS), functional.log_probs_from_logits(X, LABELS))
        assert functional.logprobs_from_logits(X, LABELS) == "verl"
    assert functional.log_probs_from_logits(X, LABELS) == "easyr1"


def test_odd_things_among_the_modules_are_passed_over(package, monkeypatch):
    class Refusing:
        def __getattribute__(self, name):
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "a_refusing_module", Refusing())
    monkeypatch.setitem(sys.modules, "no_module", None)
    write_trl(package)
    with patch("trl") as patched:
        assert len(patched.sites) == 1


def test_what_keeps_the_function_elsewhere_is_not_reached(package):
    """As the documentation says."""
    write_trl(package)
    from trl.trainer import utils

    kept = functools.partial(utils.selective_log_softmax, X)
    with patch("trl"):
        assert kept(LABELS) == "original"


def test_the_replaced_function_is_pickled_as_the_frameworks(package):
    write_trl(package)
    from trl.trainer import utils

    with patch("trl"):
        pickled = pickle.dumps(utils.selective_log_softmax)
    assert b"trl.trainer.utils" in pickled
    assert pickle.loads(pickled)(X, LABELS) == "original"  # as it is where it is loaded


def test_the_public_names():
    assert compat.__all__ == sorted(compat.__all__) == ["FRAMEWORKS", "Patch", "Site", "patch", "unpatch"]
