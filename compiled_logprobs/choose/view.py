"""The stores as this process sees them: as they are at each look; on a rank, as they were at its first look.

Ranks come to a problem at different moments, and what another process stores in between would have them choose differently. So
a rank reads all that the stores hold for its environment when it first looks anything up, and what is stored later is not there
for it, whoever stores it. Ranks whose first looks find the same therefore see the same for good. What `tune(group=...)` agreed
upon does not go by the stores: it is in each rank's memory.
"""

from dataclasses import dataclass, field

from compiled_logprobs.decision import Decision
from compiled_logprobs.policy import is_rank
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import stores
from compiled_logprobs.store.files import Store

_frozen: dict[str, "FrozenStore"] = {}


def view(environment: str) -> dict[str, Store]:
    """What `stores` gives, to look for decisions of this environment; for a rank, what it gave first, as they were then."""
    if not is_rank():
        return stores()
    if not _frozen:
        _frozen.update({label: FrozenStore(store.root) for label, store in stores().items()})
    for store in _frozen.values():
        store.freeze(environment)  # all at once, whichever will be asked
    return dict(_frozen)


@dataclass(frozen=True)
class FrozenStore(Store):
    """A store of which all that it holds for an environment is read at once, and never again."""

    _seen: dict[str, dict[Problem, Decision]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def freeze(self, environment: str) -> dict[Problem, Decision]:
        """What it holds for `environment`, as it was at the first time that this was asked."""
        if environment not in self._seen:
            found = {decision.problem: decision for _, decision in self.decisions(environment)}
            self._seen.setdefault(environment, found)  # another thread may have been quicker
        return self._seen[environment]

    def read(self, environment: str, problem: Problem) -> Decision | None:
        """As `Store.read`, then."""
        return self.freeze(environment).get(problem)

    def near(self, environment: str, problem: Problem) -> list[Problem]:
        """As `Store.near`, then."""
        others = {other for other in self.freeze(environment) if other._replace(rows=problem.rows) == problem}
        return sorted(others - {problem})
