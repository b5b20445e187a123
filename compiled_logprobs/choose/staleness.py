"""Whether a decision still holds: what it chose, and what else was measured."""

from datetime import datetime, timedelta, timezone

from compiled_logprobs.backends import backends_for, code_of, is_built_in, is_loaded, target_of, why_not
from compiled_logprobs.backends.base import AnyBackend
from compiled_logprobs.decision import TIME, Decision

TRANSIENT = ("failed", "oom", "timeout", "crashed")
"""Outcomes that may have had a cause outside of the candidate, such as a full disk."""
TRANSIENT_FOR = timedelta(days=1)
"""How long they count."""


def holds(decision: Decision, backend: str) -> bool:
    """Whether `backend` is what was measured, and can run here."""
    return why_not_holds(decision, backend) is None


def why_not_holds(decision: Decision, name: str) -> str | None:
    """Why the backend called `name` is not what was measured, or cannot run here; None if it is and can."""
    if name not in backends_for(decision.problem):
        return f"it chose backend {name!r:.80}, which is not registered here"
    reason = why_not(name, decision.problem)
    if reason is not None:
        return f"backend {name!r} cannot run here: {reason}"
    is_same = code_of(name, decision.problem) == decision.candidates[name].fingerprint
    return None if is_same else f"backend {name!r} has changed since it was measured"


def changed(decision: Decision) -> dict[str, str]:
    """How today's candidates differ from those that were measured, by name. None is imported to find out."""
    names = [name for name in backends_for(decision.problem) if name not in decision.left_out]
    reasons = {name: _how_it_changed(decision, name) for name in names}
    return {name: f"backend {name!r} {reason}" for name, reason in reasons.items() if reason is not None}


def _how_it_changed(decision: Decision, name: str) -> str | None:
    if name not in decision.candidates:
        can_be_asked = is_built_in(name) or is_loaded(name)
        is_unable = can_be_asked and why_not(name, decision.problem) is not None  # and so changes nothing
        return None if is_unable else "was registered after this was measured"
    candidate = decision.candidates[name]
    a_day_ago = (datetime.now(timezone.utc) - TRANSIENT_FOR).strftime(TIME)
    if candidate.outcome in TRANSIENT and (candidate.measured_at or decision.measured_at) < a_day_ago:
        return f"{candidate.outcome} when this was measured, which may have had a cause that is gone"
    if not is_built_in(name) and not is_loaded(name):
        return None
    if candidate.outcome in ("unavailable", "unsupported"):
        target = target_of(name)
        is_local = isinstance(target, AnyBackend) or target.startswith("__main__:")  # so that no worker can import it
        can_now = not is_local and why_not(name, decision.problem) is None
        return "could not run this when it was measured, and can now" if can_now else None
    return "has changed since this was measured" if code_of(name, decision.problem) != candidate.fingerprint else None
