"""What is stored near a problem, and how its key differs, field by field."""

import pytest
import torch

from compiled_logprobs.backends import code_of
from compiled_logprobs.choose import neighbours, view
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.machine.environment import environment_of, fingerprint_of
from compiled_logprobs.policy import Policy
from compiled_logprobs.store import files as store
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from tests.helpers.stored_decisions import LARGE, all_measured, decided, measured, publish

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def user_store_alone(monkeypatch):
    only = {"user store": user_store()}
    monkeypatch.setattr(neighbours, "stores", lambda: only)
    monkeypatch.setattr(view, "stores", lambda: only)


def near(problem=LARGE, most=3, **policy):
    return neighbours.neighbours(problem, CPU, Policy(**policy), most)


def test_the_fewest_fields_come_first_and_of_these_the_nearest_n():
    others = [
        LARGE._replace(rows=8192),
        LARGE._replace(rows=2048),
        LARGE._replace(entropy=True, rows=2048),
        LARGE._replace(temperature="number"),
        LARGE._replace(dtype=torch.bfloat16, needs_grad=True, vocab=7),
    ]
    for other in others:
        publish(decided(other))
    found = near(most=5)
    assert [one.problem for one in found] == [others[3], others[1], others[0], others[2], others[4]]
    assert found[1].differs == {"rows": (2048, 1024)}
    assert found[3].differs == {"rows": (2048, 1024), "entropy": (True, False)}
    assert str(found[0]) == ("1024 x 1031 float32 on cpu (user store): temperature is number there, and none here")
    assert len(near()) == 3 and near(most=0) == []


def test_facts_of_another_environment_are_told():
    import dataclasses

    elsewhere = dataclasses.replace(environment_of("cpu"), torch="1.0", cpu_threads=999, python="2.7")
    user_store().publish(elsewhere, decided())
    (found,) = near()
    assert found.differs == {
        "cpu_threads": (999, torch.get_num_threads()),
        "torch": ("1.0", torch.__version__),
    }  # and not python, which is no part of the key
    assert found.to_dict()["differs"]["torch"] == ["1.0", torch.__version__]


def test_where_the_key_is_the_same_the_backends_that_changed_are_told():
    publish(decided(chosen="cpp", candidates=all_measured() | {"cpp": measured("cpp", fingerprint="0" * 16)}))
    (found,) = near()
    assert found.differs == {"backend cpp": ("0" * 16, code_of("cpp"))}


def test_where_the_key_is_the_same_what_else_keeps_it_from_serving_is_told(monkeypatch):
    no = {"row_invariant": False}
    publish(decided(chosen="cpp", candidates={name: measured(name, **no) for name in ("eager", "cpp")}))
    assert near()[0].unusable is None
    (found,) = near(row_invariant=True)
    assert found.unusable is not None and str(found).endswith(found.unusable)
    assert "no backend there has rows whose bits do not depend on N" in found.unusable

    decisions.set_aside("cpp", LARGE, RuntimeError("it broke"))
    assert near()[0].unusable == "backend 'cpp', which it chose, failed in this process and is set aside"

    user_store().path(fingerprint_of(CPU), LARGE).write_text("{")
    with pytest.warns(RuntimeWarning, match="is passed over"):
        (found,) = near()
    assert str(found).endswith("it cannot be read, or chose a backend that is not registered here")


def test_what_was_stored_after_the_first_look_of_a_rank_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    view.view(fingerprint_of(CPU))
    publish(decided())
    assert near()[0].unusable == "it was stored after this rank's first look at the profiles"


def test_a_folder_that_came_after_the_first_look_of_a_rank_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    view.view(fingerprint_of(CPU))
    later = Store(tmp_path / "later")
    monkeypatch.setattr(neighbours, "stores", lambda: {"project profiles": later})
    later.publish(environment_of("cpu"), decided())
    assert near()[0].unusable == "it was stored after this rank's first look at the profiles"


def test_nothing_stored_is_near_nothing():
    assert near() == []


def test_no_file_is_opened_to_find_the_nearest(monkeypatch, tmp_path):
    """There may be tens of thousands."""
    for rows in (1, 2, 4, 8):
        publish(decided(LARGE._replace(rows=rows, vocab=7)))
    opened = []
    load = store._load
    monkeypatch.setattr(store, "_load", lambda path: opened.append(path.name) or load(path))
    near()
    assert opened == ["environment.json"]


def test_names_that_are_no_problems_are_passed_over(tmp_path):
    folder = Store(tmp_path).path(environment_of("cpu").fingerprint(), LARGE).parent
    folder.mkdir(parents=True)
    for name in (
        "cpu-n1-v0x7-float32",
        "cpu-n01-v7-float32",
        "cpu-n" + "9" * 30 + "-v7-float32",
        "..-n1-v1-float32",
        "x",
    ):
        (folder / f"{name}.json").write_text("{}")
    assert list(Store(tmp_path).problems()) == []
