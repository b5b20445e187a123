"""Process groups in the originals' arguments: one rank is served here, more are refused."""

from typing import Any

from compiled_logprobs.errors import InputError


def require_one_rank(**groups: Any) -> None:
    """Raise InputError, which names the argument, unless each of `groups` is None or has one rank."""
    for name, group in groups.items():
        ranks = 1 if group is None else group.size()
        if ranks > 1:
            raise InputError(
                f"got a {name} of {ranks} ranks; None or a group of one rank is valid: logits that are split over ranks are not "
                "served here. Keep the framework's own function for them (unpatch it), or gather the logits first."
            )


def require_whole_vocabulary(vocab: int, start: int, end: int) -> None:
    """Raise InputError unless [start, end) is all of the `vocab` columns that one rank has."""
    if (start, end) != (0, vocab):
        raise InputError(
            f"got the vocabulary's part from {start} to {end} for logits with {vocab} columns; 0 to {vocab} is valid with one "
            "rank. Keep the framework's own function for logits that are split over ranks."
        )
