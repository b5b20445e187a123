"""Colours that everybody can tell apart, a letter beside each, and text from anywhere that stays text."""

import itertools
import math
import re
from typing import get_args

import pytest
from compiled_logprobs_dashboard import looks as module
from compiled_logprobs_dashboard.looks import (
    BACKENDS,
    MOST_BACKENDS,
    foremost,
    looks,
    outcome,
    plain,
    plain_in_chart,
    plain_line,
)

from compiled_logprobs.backends import BUILT_IN
from compiled_logprobs.decision import Outcome
from tests.helpers.dashboard_crowd import crowded
from tests.helpers.dashboard_stores import good

# Brettel, Viénot and Mollon's simulation as Viénot (1999) made it linear: linear RGB as one without L or M cones sees
# it.
BLIND = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)),
    "deuteranopia": ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1)),
}


def linear(colour: str) -> list[float]:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def lab(rgb: list[float]) -> tuple[float, float, float]:
    matrix = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [sum(a * b for a, b in zip(line, rgb, strict=True)) for line in matrix]
    f = [
        t ** (1 / 3) if (t := max(0.0, value) / white) > 0.008856 else 7.787 * t + 16 / 116
        for value, white in zip(xyz, (0.9505, 1.0, 1.089), strict=True)
    ]
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


@pytest.mark.parametrize("sight", BLIND)
def test_backends_are_told_apart_by_colour(sight):
    seen = {}
    for name, look in BACKENDS.items():
        rgb = linear(look.colour)
        seen[name] = lab([sum(a * b for a, b in zip(line, rgb, strict=True)) for line in BLIND[sight]])
    for one, other in itertools.combinations(seen, 2):
        assert math.dist(seen[one], seen[other]) > 15, (one, other)


@pytest.mark.parametrize("background", ["#ffffff", "#0e1117"])
def test_colours_stand_out_from_light_and_dark(background):
    def luminance(colour: str) -> float:
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))

    for colour in (*(look.colour for look in BACKENDS.values()), module.NEUTRAL, module.GOOD, module.BAD):
        dark, light = sorted((luminance(colour), luminance(background)))
        assert (light + 0.05) / (dark + 0.05) > 2.0, colour


def test_no_colour_stands_alone():
    named = looks([*BUILT_IN, "third", "fourth", "cobra", "<b>"])
    for attribute in ("letter", "colour"):
        assert len({getattr(look, attribute) for look in named.values()}) == len(named), attribute
    assert all(len(look.letter) == 1 and look.symbol and look.dash for look in named.values())
    assert len({look.symbol for look in BACKENDS.values()}) == len(BACKENDS)
    assert set(BACKENDS) == set(BUILT_IN)


def test_a_backend_looks_the_same_whatever_is_beside_it():
    assert looks(["third", "cpp"])["cpp"] == looks(["cpp"])["cpp"] == BACKENDS["cpp"]
    assert looks(["b", "a"]) == looks(["a", "b"])
    assert list(looks(["eager", "cpp"])) == ["eager", "cpp"]


def test_a_backend_looks_the_same_on_every_page():
    known = ["mat", "cpp", "mast", "star"]
    alone, beside = looks(["mat"], known)["mat"], looks(["star", "mast", "mat"], known)["mat"]
    assert alone == beside != looks(["mat"])["mat"]
    assert list(looks(["mat"], known)) == ["mat"]
    for built_in in BACKENDS.values():  # also where it is not drawn
        assert built_in.letter not in {look.letter for look in looks(["pear", "fig", "cherry", "egg"]).values()}


def test_every_outcome_has_a_glyph_and_a_word():
    assert set(module.OUTCOMES) == set(get_args(Outcome))
    assert len(set(module.OUTCOMES.values())) == len(module.OUTCOMES)
    assert outcome("<b>") == "? <b>"


HOSTILE = [
    "<b onclick=alert(1)>x</b>",
    "[x](http://example.invalid)",
    "![x](http://example.invalid/x.png)",
    "http://example.invalid www.example.invalid a@example.invalid",
    ":red[x] :material/home: :sunglasses:",
    "$x^2$ `code` **bold** _it_ ~~gone~~",
    "# head",
    "1. one",
    "- item",
    "a\nb\n\n---\n| a | b |",
    "&lt;b&gt; \\[x\\]",
    "x\u202egnp.exe\u200b\x00\x1b[31m",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_just_the_text(text):
    escaped = plain(text)
    # What is left after the escapes are taken out has no character that Markdown, HTML or Streamlit takes for more than
    # itself.
    bare = re.sub(r"\\.", "", escaped)
    assert not re.search(r"[\\`*_{}\[\]()#|~$<>:&]", bare), bare
    assert "\n" not in escaped and "www." not in re.sub(r"\\", "", escaped)


@pytest.mark.parametrize("text", HOSTILE)
def test_charts_show_just_the_text(text):
    shown = plain_in_chart(text)
    assert "<" not in shown and ">" not in shown and "%{" not in shown and "$" not in shown and "\n" not in shown


def test_a_line_is_cut_and_clean():
    assert plain_line("x" * 10_000, 50) == "x" * 49 + "…"
    assert plain_line("a\u202eb\x00c\td") == "abc d"
    assert plain_line(None) == "None"


def test_the_foremost_are_the_chosen_the_baseline_and_the_fastest():
    decision = crowded(failing=5)
    part, left_out = foremost(decision)
    assert len(part.candidates) == MOST_BACKENDS and left_out == len(decision.candidates) - MOST_BACKENDS
    assert {"cpp", "eager", "compiled", "crowd000", "crowd016"} <= set(part.candidates)
    part, _ = foremost(decision, failures_first=True)
    assert {"cpp", "eager", "crowd195", "crowd199", "crowd000"} <= set(part.candidates)
    assert foremost(good()) == (good(), 0)
