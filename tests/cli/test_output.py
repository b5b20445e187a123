"""The one table of the command line: what it shows in which width, and that it cuts nothing."""

import sys

import pytest
from rich.text import Text

from compiled_logprobs.cli.main import main
from compiled_logprobs.cli.output import Column, print_table

COLUMNS = [
    Column("rows", right=True),
    "winner",
    Column("interval", 1),
    Column("memory", 2, right=True),
    Column("from", 3),
]
ROWS = [
    ("64", "cpp", "1.20 to 1.40", "1234567 MiB", ""),
    (),
    ("4096", Text("compiled", "red"), "2.00 to 3.00", "5 MiB", ""),
]


def printed(capsys, rows=ROWS, columns=COLUMNS) -> list[str]:
    print_table("A title", columns, rows)
    blank, title, *lines = capsys.readouterr().out.splitlines()
    assert (blank, title) == ("", "A title")
    return lines


def test_without_a_terminal_it_is_plain_text_with_all_columns_that_hold_something(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert printed(capsys) == [
        "rows  winner    interval           memory",
        "  64  cpp       1.20 to 1.40  1234567 MiB",
        "",
        "4096  compiled  2.00 to 3.00        5 MiB",
    ]


@pytest.mark.parametrize(
    ("width", "heading", "dropped"),
    [
        (41, "rows  winner    interval           memory", None),
        (40, "rows  winner    interval", "memory"),
        (20, "rows  winner", "interval, memory"),
        (5, "rows  winner", "interval, memory"),
    ],
)
def test_in_a_narrow_terminal_whole_columns_go_and_nothing_is_cut(capsys, monkeypatch, width, heading, dropped):
    monkeypatch.setenv("COLUMNS", str(width))
    first, *lines = printed(capsys)
    assert first == heading and lines[2].startswith("4096  compiled")
    assert " ".join(" ".join(lines[3:]).split()) == (f"A wider terminal also shows: {dropped}." if dropped else "")


def test_a_sentence_goes_on_below_itself_and_a_word_is_never_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    rows = [("eager", f"it needs {'x' * 30} to run")]
    assert printed(capsys, rows, ["backend", Column("why", folds=True)]) == [
        "backend  why",
        "eager    it needs",
        f"         {'x' * 30}",
        "         to run",
    ]


@pytest.mark.parametrize(("name", "colours"), [("", True), ("NO_COLOR", False)])
def test_a_terminal_has_colours_unless_they_are_forbidden(capsys, monkeypatch, name, colours):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if it was one
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if name:
        monkeypatch.setenv(name, "1")
    print_table("A title", COLUMNS, ROWS)
    assert ("\x1b[" in capsys.readouterr().out) == colours


def test_a_width_of_0_is_none(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr(sys, "argv", ["compiled-logprobs", "doctor"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "C++ compiler" in capsys.readouterr().out
