"""What serves a shape, as a profile has it: the library's own rule, walked over that profile's store."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from compiled_logprobs.choose.memory import Choice, Memory
from compiled_logprobs.choose.rule import Context, walk
from compiled_logprobs.policy import Policy
from compiled_logprobs.problem import Problem, bucket
from compiled_logprobs.store.files import Store
from compiled_logprobs_dashboard.frames import Frames, Profile

Kind = Literal["exact", "nearest", "undecided", "rule", "none"]
KINDS: dict[str, Kind] = {"stored": "exact", "near": "nearest", "related": "nearest", "small": "rule"}
"""By the step of the library's rule that chose. Any other: not measured. Undecided is what least regret chose."""


class Answer(NamedTuple):
    """What a profile says of a shape."""

    kind: Kind
    problem: Problem
    """That is asked about, at the top of its bucket."""
    key: int | None
    """Of the decision, where there is one."""


def look_up(frames: Frames, profile: Profile, asked: Problem) -> Answer:
    """What a profile says of `asked`, with nothing measured."""
    store = {profile.source: _Listed(frames.stores[profile.source].root, tuple(frames.of(profile)["problem"]))}
    device = torch.device("cpu")  # which only measuring would ask for
    context = Context(asked, Policy("lookup"), device, profile.environment, store, Memory(), is_here=False)
    *_, (step, choice) = walk(context)
    top, decision = bucket(asked), choice.decision if isinstance(choice, Choice) else None
    key = None if decision is None else frames.keys.get((*profile, decision.problem))
    if decision is None or key is None:
        return Answer(KINDS.get(step, "none") if decision is None else "none", top, None)
    return Answer(KINDS.get(step, "none") if decision.is_decided else "undecided", top, key)


@dataclass(frozen=True)
class _Listed(Store):
    """A store whose files are listed already, those of one environment."""

    listed: tuple[Problem, ...]

    def alike(self, environment: str, problem: Problem) -> list[Problem]:
        return list(self.listed)
