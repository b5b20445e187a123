"""The question: it comes back from its dict and from its name, and no two share one."""

import json
import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import (
    DTYPES,
    FROM_HIDDEN,
    Problem,
    collapse,
    layout_of,
    problem_from_dict,
    problem_from_name,
    problem_name,
    problem_to_dict,
)

PROBLEM = Problem("cpu", 512, 151936, torch.bfloat16, needs_grad=True)
KINDS = {
    str: st.sampled_from(["cpu", "cuda", "xpu", "n1", "my_device"]),
    int: st.integers(0, 10**18 - 1) | st.integers(0, 12),
    bool: st.booleans(),
    int | None: st.none() | st.integers(1, 10**18 - 1) | st.integers(1, 12),
    torch.dtype: st.sampled_from(DTYPES),
}
FIELDS = typing.get_type_hints(Problem)  # from the class, so that a field that is added to it is tried, too
PROBLEMS = st.builds(
    Problem,
    **{name: KINDS[kind] if kind in KINDS else st.sampled_from(typing.get_args(kind)) for name, kind in FIELDS.items()},
)


@given(PROBLEMS)
def test_a_problem_comes_back_from_its_dict_and_from_its_name(problem):
    assert problem_from_dict(json.loads(json.dumps(problem_to_dict(problem)))) == problem
    name = problem_name(problem)
    assert problem_from_name(name) == problem
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")  # lower case: some file systems know no other
    assert len(name) < 200


@given(st.text("cpu-nv0123456789float_kgrdtys", max_size=60))
def test_a_name_that_was_given_to_none_is_none(name):
    problem = problem_from_name(name)
    assert problem is None or problem_name(problem) == name


@given(PROBLEMS, PROBLEMS, st.sampled_from(Problem._fields))
def test_two_problems_share_a_name_only_if_they_are_equal(first, second, field):
    assert (problem_name(first) == problem_name(second)) == (first == second)
    # Two random ones differ in more than a name might forget.
    almost = first._replace(**{field: getattr(second, field)})
    assert (problem_name(first) == problem_name(almost)) == (first == almost)


def test_names_show_what_differs_from_a_plain_forward():
    assert problem_name(Problem("cpu", 512, 151936, torch.float32)) == "cpu-n512-v151936-float32"
    options = 3, True, True, True, True, True, "per_token", True, True, "rows", False
    every = Problem("cuda", 4, 8, torch.float16, torch.float64, *options)
    assert problem_name(every) == (
        "cuda-n4-v8-float16-out_float64-k3-grad-entropy-logsumexp-argmax-sum_p_squared-t_per_token-masked-inplace-"
        "layout_rows-unaligned"
    )
    hidden = {"hidden": 1024, "weight_grad": True, "bias": True, "softcap": True, "memory_limit": 2**26}
    assert problem_name(PROBLEM._replace(**hidden)) == (
        "cpu-n512-v151936-bfloat16-grad-h1024-weight_grad-bias-softcap-within_67108864"
    )


def test_what_an_earlier_release_stored_asks_for_no_more_than_it_says():
    earlier = problem_to_dict(PROBLEM._replace(entropy=True))
    for name in ("logsumexp", "argmax", "sum_p_squared", *FROM_HIDDEN):
        del earlier[name]
    assert problem_from_dict(earlier) == PROBLEM._replace(entropy=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": -1}, "the problem's rows is -1; valid is an integer from 0"),
        ({"vocab": 5.0}, "vocab is 5.0"),
        ({"dtype": "int8"}, "dtype is 'int8'; valid is one of float32, bfloat16"),
        ({"temperature": "hot"}, "valid is one of none, number, per_token"),
        ({"needs_grad": 1}, "needs_grad is 1; valid is true or false"),
        ({"device_type": "../../elsewhere"}, "device_type is '../../elsewhere'"),
        ({"colour": "red"}, "colour; valid is an object of device_type, rows"),
    ],
    ids=str,
)
def test_a_problem_that_cannot_be_is_refused(change, reason):
    with pytest.raises(ProfileError) as error:
        problem_from_dict({**problem_to_dict(PROBLEM), **change})
    assert reason in str(error.value)
    for other in ({"rows": 1}, [], None, "cpu"):
        with pytest.raises(ProfileError, match="a problem is "):
            problem_from_dict(other)


LOGITS = torch.zeros(3, 4, 2, 8)
VIEWS = {
    "contiguous": (LOGITS, ("flat", True)),
    "of one row": (LOGITS[2, 3, 1], ("flat", True)),
    "of one row among others": (LOGITS[:1, -1, :1], ("flat", True)),
    "odd": (torch.zeros(3, 4, 7), ("flat", False)),
    "from an odd place on": (torch.zeros(3 * 8 + 1)[1:].view(3, 8), ("flat", False)),
    "every other row": (LOGITS[..., 1, :], ("rows", True)),
    "some columns": (torch.zeros(2, 3, 9)[..., :8], ("rows", False)),
    "sliced": (LOGITS[:, :-1], ("slice", True)),
    "sliced, of one row each": (LOGITS[:, :1, :1], ("rows", True)),
    "expanded": (torch.zeros(1, 8).expand(5, 8), ("rows", True)),
    "transposed": (torch.zeros(8, 5).T, ("flat", True)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_the_layout_is_that_of_what_backends_see(name):
    logits, expected = VIEWS[name]
    collapsed = collapse(logits)
    assert layout_of(logits) == layout_of(collapsed) == expected
    leading = sum(size > 1 for size in collapsed.shape[:-1])
    assert torch.equal(collapsed, logits.reshape(collapsed.shape)) and (leading == 2) == (expected[0] == "slice")
    assert name == "transposed" or collapsed.data_ptr() == logits.data_ptr()
