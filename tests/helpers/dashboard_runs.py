"""Profile runs for the dashboard's tests: what is asked for, and events as a run writes them."""

import dataclasses
import json
import time
from collections.abc import Callable

from compiled_logprobs_dashboard.runs import Request

from compiled_logprobs.problem import problem_to_dict

LIMIT_S = 120
TINY = Request(
    "cpu", vocabs=(512,), rows=(4,), dtypes=("float32",), modes=("forward",), backends=("eager",), budget_s=2.0
)
LONG = dataclasses.replace(TINY, rows=tuple(2**n for n in range(2, 18)), budget_s=60.0)
"""Many problems: long enough to be interrupted, and each is over in a second or so."""
PROBLEM = problem_to_dict(TINY.problems()[0])


def event(name: str, **fields: object) -> bytes:
    """A line of a run."""
    return json.dumps({"event": name, **fields}).encode() + b"\n"


START = event("start", device="cpu", environment="0" * 16, problems=[PROBLEM, {**PROBLEM, "rows": 8}])
FIRST = event("problem", problem=PROBLEM, known=False, index=1, total=2)


def wait_until(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)
