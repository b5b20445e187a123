"""The key of a decision: all that matters changes it, and nothing else does."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiled_logprobs.machine.environment import MATCHED, Environment, as_matched, environment_of
from compiled_logprobs.problem import Problem, bucket

HERE = environment_of("cpu")
FACTS = [field.name for field in dataclasses.fields(Environment)]
VALUES = st.one_of(st.none(), st.integers(0, 2**40), st.text(max_size=20))


@pytest.mark.parametrize("device_type", MATCHED)
@given(name=st.sampled_from(FACTS), value=VALUES)
def test_a_fact_of_the_environment_changes_the_key_exactly_if_it_is_matched(device_type, name, value):
    here = dataclasses.replace(HERE, device_type=device_type, memory_bytes=80 * 2**30)
    other = dataclasses.replace(here, **{name: value})
    counts = name in (*MATCHED[device_type], "device_type") and as_matched(name, value) != getattr(here, name)
    assert (other.fingerprint() != here.fingerprint()) == counts


@given(st.integers(1, 2**40))
def test_the_top_of_a_bucket_is_the_next_half_octave_and_its_own_top(rows):
    problem = Problem("cpu", rows, 7, torch.float32)
    top = bucket(problem).rows
    tops = {2**k for k in range(42)} | {3 * 2**k for k in range(41)}
    assert top == min(t for t in tops if t >= rows)
    assert bucket(problem._replace(rows=top)).rows == top
    assert bucket(problem._replace(rows=top + 1)).rows > top  # the edge is exact
    assert bucket(problem)._replace(rows=rows) == problem  # and nothing but N is rounded
