"""How backends, outcomes and verdicts look: a colour, and always a letter, symbol or word beside it.

The colours are those of Okabe and Ito, which people with any kind of colour blindness can tell apart; they hold on
white and on near-black. None carries a meaning alone.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple


class Look(NamedTuple):
    """How a backend is drawn."""

    colour: str
    letter: str
    symbol: str
    dash: str


BACKENDS = {
    "cpp": Look("#0072B2", "P", "square", "solid"),
    "compiled": Look("#E69F00", "C", "circle", "dash"),
    "triton": Look("#56B4E9", "T", "star", "longdash"),
    "flash_attn": Look("#009E73", "F", "diamond", "dot"),
    "eager": Look("#CC79A7", "E", "triangle-up", "dashdot"),
}
_OTHERS = (
    Look("#D55E00", "", "cross", "longdashdot"),
    Look("#B3A400", "", "pentagon", "solid"),
    Look("#8F6BC1", "", "hexagon", "dash"),
    Look("#7F7F7F", "", "x", "dot"),
)
NEUTRAL = "#8A8F98"
"""Of what was not measured, and of lines that compare; readable on white and on near-black."""
GOOD, BAD, DOUBTFUL = "#009E73", "#D4002A", "#B3A400"
WRONG = "✗"
"""The letter of what failed a check, beside a backend's own; its colour is `BAD`."""

OUTCOMES = {"chosen": "★ chosen", "slower": "▽ slower", "tie": "≈ tie", "wrong": "✗ WRONG", "oom": "✗ out of memory"}
OUTCOMES |= {name: f"✗ {name}" for name in ("failed", "timeout", "crashed")}
OUTCOMES |= {name: f"– {name}" for name in ("unavailable", "unsupported")}
"""Glyph and word of a candidate's outcome."""


def looks(backends: Iterable[str], among: Iterable[str] = ()) -> dict[str, Look]:
    """How each of `backends` is drawn: those that come with the package always alike, others by the order of all names.

    `among` are all that there are, so that one has the same letter and colour whatever it is drawn beside.
    """
    names = list(dict.fromkeys(backends))
    others = _of_others(tuple(sorted({*names, *among} - BACKENDS.keys())))
    return {name: BACKENDS.get(name) or others[name] for name in names}


@lru_cache(maxsize=8)
def _of_others(names: tuple[str, ...]) -> dict[str, Look]:
    by_name: dict[str, Look] = {}
    taken = {look.letter for look in BACKENDS.values()}
    for number, name in enumerate(names):
        wanted = [letter for letter in name.upper() if letter.isascii() and letter.isalnum()]
        letter = next((letter for letter in (*wanted, *"ABDGHIJKLMNOQRSTUVWXYZ0123456789") if letter not in taken), "?")
        taken.add(letter)
        by_name[name] = _OTHERS[number % len(_OTHERS)]._replace(letter=letter)
    return by_name


UNDECIDED = "? undecided"
"""Of what the rounds could not decide."""


def outcome(name: str) -> str:
    """Glyph and word of an outcome."""
    return OUTCOMES.get(name, f"? {plain_line(name)}")


def plain_line(text: object, longest: int = 300) -> str:
    """Put `text`, from anywhere, on one line, without characters that are invisible or turn the line round."""
    kept = "".join(" " if character.isspace() else character for character in str(text)[: 4 * longest])
    kept = "".join(character for character in kept if unicodedata.category(character)[0] != "C")
    return kept if len(kept) <= longest else kept[: longest - 1] + "…"


def plain(text: object, longest: int = 300) -> str:
    """`text` as Markdown that shows just that: no markup, links, colours, icons or formulas."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+\-.!|~>$:<&])", r"\\\1", plain_line(text, longest))
    return escaped.replace("www", "w\u200bww").replace("@", "@\u200b")  # which would become links by themselves


def plain_in_chart(text: object, longest: int = 120) -> str:
    """`text` for plotly, which takes `<b>`, `<a href>` and `%{x}` for instructions and `$` for a formula."""
    line = plain_line(text, longest)
    for character, instead in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("%{", "%\u200b{"), ("$", "\uff04")):
        line = line.replace(character, instead)
    return line
