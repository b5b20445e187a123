"""What `backend="auto"` may do: the environment variables, and `autotune` blocks."""

import asyncio
import threading

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs import policy as module
from compiled_logprobs.policy import BUDGET_VARIABLE, MODE_VARIABLE, Policy, policy


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv(MODE_VARIABLE)
    monkeypatch.delenv(BUDGET_VARIABLE, raising=False)
    module._of_process.cache_clear()


def test_by_default_new_problems_are_measured_within_20_seconds():
    assert policy() == Policy("tune", 20.0, row_invariant=False, require_hit=False)


def test_the_variables_hold_for_the_process_as_they_are_at_the_first_call(monkeypatch):
    monkeypatch.setenv(MODE_VARIABLE, "lookup")
    monkeypatch.setenv(BUDGET_VARIABLE, "2.5")
    assert policy() == Policy("lookup", 2.5)
    monkeypatch.setenv(MODE_VARIABLE, "off")
    assert policy() == Policy("lookup", 2.5)


def test_an_empty_variable_says_nothing(monkeypatch):
    monkeypatch.setenv(MODE_VARIABLE, "")
    monkeypatch.setenv(BUDGET_VARIABLE, "")
    assert policy() == Policy()


def test_a_block_changes_what_it_names_and_only_until_it_ends(monkeypatch):
    monkeypatch.setenv(MODE_VARIABLE, "lookup")
    with clp.autotune(budget_s=3):
        assert policy() == Policy("lookup", 3.0)
        with clp.autotune("off", row_invariant=True):
            assert policy() == Policy("off", 3.0, row_invariant=True)
            with clp.autotune("tune", row_invariant=False, require_hit=True):
                assert policy() == Policy("tune", 3.0, require_hit=True)
            assert policy() == Policy("off", 3.0, row_invariant=True)
        assert policy() == Policy("lookup", 3.0)
    assert policy() == Policy("lookup")


def test_an_exception_ends_a_block_too():
    with pytest.raises(KeyError), clp.autotune("off"), clp.autotune("lookup", require_hit=True):
        raise KeyError
    assert policy() == Policy()


def test_it_decorates_functions():
    @clp.autotune("off", budget_s=1)
    def inside():
        return policy()

    assert [inside(), policy(), inside()] == [Policy("off", 1.0), Policy(), Policy("off", 1.0)]


def test_other_threads_have_blocks_of_their_own():
    seen, both = {}, threading.Barrier(2)

    def work(mode):
        with clp.autotune(mode):
            both.wait(10)  # each is inside its block
            seen[mode] = policy().mode
            both.wait(10)

    threads = [threading.Thread(target=work, args=(mode,)) for mode in ("off", "lookup")]
    with clp.autotune(budget_s=1):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert policy() == Policy("tune", 1.0)
    assert seen == {"off": "off", "lookup": "lookup"}


def test_other_tasks_have_blocks_of_their_own():
    async def work(mode):
        with clp.autotune(mode):
            await asyncio.sleep(0)  # the other task runs meanwhile
            return policy().mode

    async def main():
        return await asyncio.gather(work("off"), work("lookup"))

    assert asyncio.run(main()) == ["off", "lookup"]


@pytest.mark.parametrize("mode", ["fast", "TUNE", "", 1, ["tune"]])
def test_another_mode_is_refused(mode):
    with pytest.raises(clp.InputError, match="got mode=.*; tune, lookup, off are valid. Set it to one of them."):
        clp.autotune(mode).__enter__()
    assert policy() == Policy()


@pytest.mark.parametrize("budget", [-1, float("nan"), float("inf"), "soon", [20]])
def test_another_budget_is_refused(budget):
    with pytest.raises(clp.InputError, match="got budget_s=.*; a number of seconds, 0 or more, is valid, e.g. 20."):
        clp.autotune(budget_s=budget).__enter__()
    assert policy() == Policy()


@pytest.mark.parametrize("name", ["row_invariant", "require_hit"])
@pytest.mark.parametrize("switch", ["yes", 1])
def test_another_switch_is_refused(name, switch):
    with pytest.raises(clp.InputError, match=f"got {name}={switch!r}; True and False are valid. Set it to one of them"):
        clp.autotune(**{name: switch}).__enter__()
    assert policy() == Policy()


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        (MODE_VARIABLE, "on", "got COMPILED_LOGPROBS_MODE='on'; tune, lookup, off are valid. Set it to one of them."),
        (BUDGET_VARIABLE, "1 min", "got COMPILED_LOGPROBS_BUDGET_S='1 min'; a number of seconds, 0 or more, is valid"),
        (BUDGET_VARIABLE, "-3", "got COMPILED_LOGPROBS_BUDGET_S='-3'; a number of seconds"),
    ],
)
def test_a_wrong_variable_is_told_at_the_call(monkeypatch, variable, value, told):
    monkeypatch.setenv(variable, value)
    logits, labels = torch.randn(2, 7), torch.tensor([1, 2])
    with pytest.raises(clp.InputError) as error:
        clp.log_probs_from_logits(logits, labels)
    assert told in str(error.value)
    clp.log_probs_from_logits(logits, labels, backend="eager")  # asks no policy
