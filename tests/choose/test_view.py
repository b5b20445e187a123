"""A rank sees the stores as they were when it first looked."""

import pytest

from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose import view
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.policy import Policy
from compiled_logprobs.store import bundled_store, user_store
from compiled_logprobs.store.files import ROOT_VARIABLE, Store
from tests.helpers.stored_decisions import CPU, LARGE, decided, publish

LATER = LARGE._replace(vocab=1033)
NEAR = LARGE._replace(rows=2048)


@pytest.fixture
def rank(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)


def chosen(problem=LARGE):
    found = decisions.stored(problem, CPU, Policy())
    return None if found is None else found.name


def test_a_single_process_sees_what_is_stored_meanwhile():
    assert chosen() is None
    publish(decided())
    assert chosen() == "eager"


def test_a_rank_does_not(rank):
    publish(decided())
    assert chosen() == "eager"
    publish(decided(chosen="cpp"))
    publish(decided(LATER))
    publish(decided(NEAR))
    assert chosen() == "eager" and chosen(LATER) is None
    assert decisions.nearest(LARGE._replace(rows=4096), CPU, Policy()).decision.problem == LARGE


def test_nor_a_store_that_comes_into_being_or_another_one(rank, monkeypatch, tmp_path):
    assert chosen() is None
    publish(decided())
    publish(decided(LATER), Store(tmp_path / "profiles"))
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "profiles"))
    assert chosen() is None and chosen(LATER) is None
    seen = view.view(fingerprint_of(CPU))
    assert list(seen) == ["user store", "bundled profiles"] and seen["bundled profiles"].root == bundled_store().root


def test_what_it_decided_itself_it_sees(rank):
    assert chosen() is None
    decisions.remember_decision(decided())
    assert chosen() == "eager"


def test_each_environment_is_read_once_and_whole(rank, monkeypatch):
    for problem in (LARGE, NEAR, LATER):
        publish(decided(problem))
    read = []
    real = Store.records
    monkeypatch.setattr(Store, "records", lambda self, environment: read.append(self.root) or real(self, environment))
    assert chosen() == chosen(LATER) == "eager"
    fingerprint = fingerprint_of(CPU)
    seen = view.view(fingerprint)["user store"]
    assert seen.near(fingerprint, LARGE) == [NEAR]
    assert seen.near(fingerprint, LARGE._replace(rows=1500)) == [LARGE, NEAR]
    assert sorted(read) == sorted([user_store().root, bundled_store().root])


def test_a_file_that_is_broken_is_passed_over(rank):
    publish(decided())
    publish(decided(LATER))
    user_store().path(fingerprint_of(CPU), LATER).write_text("{")
    with pytest.warns(RuntimeWarning, match="is passed over"):
        assert chosen() == "eager"
    assert chosen(LATER) is None
