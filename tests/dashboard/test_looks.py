"""Colours that everybody can tell apart, a letter beside each, and text from anywhere that stays text."""

import itertools
import re
from typing import get_args

import pytest
from compiled_logprobs_dashboard import looks as module
from compiled_logprobs_dashboard.looks import (
    BACKENDS,
    looks,
    outcome,
    plain,
    plain_in_chart,
    plain_line,
)

from compiled_logprobs.backends import BUILT_IN
from compiled_logprobs.decision import Outcome

OKABE_ITO = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"}
"""Which people with any kind of colour blindness can tell apart."""


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_are_told_apart_by_all_and_stand_out_from_light_and_dark():
    colours = {look.colour for look in BACKENDS.values()}
    assert len(colours) == len(BACKENDS) and colours <= OKABE_ITO
    for colour, background in itertools.product(
        (*colours, module.NEUTRAL, module.GOOD, module.BAD), ("#ffffff", "#0e1117")
    ):
        dark, light = sorted((luminance(colour), luminance(background)))
        assert (light + 0.05) / (dark + 0.05) > 2.0, colour


def test_no_colour_stands_alone():
    named = looks([*BUILT_IN, "third", "fourth", "cobra", "<b>"])
    for attribute in ("letter", "colour"):
        assert len({getattr(look, attribute) for look in named.values()}) == len(named), attribute
    assert all(len(look.letter) == 1 and look.symbol and look.dash for look in named.values())
    assert len({look.symbol for look in BACKENDS.values()}) == len(BACKENDS)
    assert set(BACKENDS) == set(BUILT_IN)


def test_a_backend_looks_the_same_on_every_page():
    assert looks(["third", "cpp"])["cpp"] == looks(["cpp"])["cpp"] == BACKENDS["cpp"]
    assert looks(["b", "a"]) == looks(["a", "b"])
    known = ["mat", "cpp", "mast", "star"]
    alone, beside = looks(["mat"], known), looks(["star", "mast", "mat"], known)
    assert list(alone) == ["mat"] and alone["mat"] == beside["mat"] != looks(["mat"])["mat"]
    letters = {look.letter for look in looks(["pear", "fig", "cherry", "egg"]).values()}
    assert not letters & {look.letter for look in BACKENDS.values()}, "also where those are not drawn"


def test_every_outcome_has_a_glyph_and_a_word():
    assert set(module.OUTCOMES) == set(get_args(Outcome))
    assert len(set(module.OUTCOMES.values())) == len(module.OUTCOMES)
    assert outcome("<b>") == "? <b>"


HOSTILE = [
    "<b onclick=alert(1)>x</b> [x](http://example.invalid) ![x](http://example.invalid/x.png)",
    "http://example.invalid www.example.invalid a@example.invalid :red[x] :material/home: :sunglasses:",
    "$x^2$ `code` **bold** _it_ ~~gone~~ # head",
    "1. one\n- item\na\nb\n\n---\n| a | b |",
    "&lt;b&gt; \\[x\\] x\u202egnp.exe\u200b\x00\x1b[31m %{x}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_and_charts_show_just_the_text(text):
    escaped, drawn = plain(text), plain_in_chart(text)
    # Without the escapes, no character is left that Markdown, HTML or Streamlit takes for more than itself.
    bare = re.sub(r"\\.", "", escaped)
    assert not re.search(r"[\\`*_{}\[\]()#|~$<>:&\n]", bare), bare
    assert not re.search(r"www\.|@\w", re.sub(r"\\", "", escaped)), "which would become links by themselves"
    assert not any(mark in drawn for mark in ("<", ">", "%{", "$", "\n")), drawn


def test_a_line_is_cut_and_clean():
    assert plain_line("x" * 10_000, 50) == "x" * 49 + "…" and plain_line("a\u202eb\x00c\td") == "abc d"
