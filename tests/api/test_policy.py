"""What `backend="auto"` may do: the environment variables, and `autotune` blocks."""

import asyncio
import math
import re
from concurrent.futures import ThreadPoolExecutor

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


def test_the_variables_hold_for_the_process_as_they_are_at_the_first_call(monkeypatch):
    assert policy() == Policy("tune", 20.0, row_invariant=False, require_hit=False)
    module._of_process.cache_clear()
    monkeypatch.setenv(MODE_VARIABLE, "lookup")
    monkeypatch.setenv(BUDGET_VARIABLE, "2.5")
    assert policy() == Policy("lookup", 2.5)
    for variable in (MODE_VARIABLE, BUDGET_VARIABLE):
        monkeypatch.setenv(variable, "")  # says nothing
    assert policy() == Policy("lookup", 2.5)
    module._of_process.cache_clear()
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
    with pytest.raises(KeyError), clp.autotune("off"):
        raise KeyError
    assert policy() == Policy("lookup")


def test_threads_and_tasks_have_blocks_of_their_own():
    async def in_a_task(mode):
        with clp.autotune(mode):
            await asyncio.sleep(0)  # the other task runs meanwhile
            return policy().mode

    async def tasks():
        return await asyncio.gather(in_a_task("off"), in_a_task("lookup"))

    with clp.autotune("off", budget_s=1):
        assert asyncio.run(tasks()) == ["off", "lookup"]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(policy).result() == Policy()
        assert policy() == Policy("off", 1.0)


MODES = "tune, lookup, off are valid. Set it to one of them."
SECONDS = "a number of seconds, 0 or more, is valid, e.g. 20."
SWITCH = "True and False are valid. Set it to one of them"
WRONG = [
    *(("mode", mode, MODES) for mode in ("TUNE", "", 1, ["tune"])),
    *(("budget_s", budget, SECONDS) for budget in (-1, math.nan, math.inf, "soon", [20])),
    *((name, switch, SWITCH) for name in ("row_invariant", "require_hit") for switch in ("yes", 1)),
]


@pytest.mark.parametrize(("name", "value", "valid"), WRONG)
def test_another_value_is_refused(name, value, valid):
    with pytest.raises(clp.InputError, match=re.escape(f"got {name}={value!r}; {valid}")):
        clp.autotune(**{name: value}).__enter__()
    assert policy() == Policy()


@pytest.mark.parametrize(
    ("variable", "value", "valid"),
    [(MODE_VARIABLE, "on", MODES), (BUDGET_VARIABLE, "1 min", SECONDS), (BUDGET_VARIABLE, "-3", SECONDS)],
)
def test_a_wrong_variable_is_refused_at_the_call(monkeypatch, variable, value, valid):
    monkeypatch.setenv(variable, value)
    logits, labels = torch.randn(2, 7), torch.tensor([1, 2])
    with pytest.raises(clp.InputError, match=re.escape(f"got {variable}={value!r}; {valid}")):
        clp.log_probs_from_logits(logits, labels)
    clp.log_probs_from_logits(logits, labels, backend="eager")  # asks no policy
