"""What stands in somebody's files does not speak to the terminal."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from hpctrain.base import terminal

EVIL = "a\x1b]0;title\x07\x1b[2J\x9b31m\u202edcba\x1b[8m\r\x08"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def tty(monkeypatch):
    """Take stdout and stderr for terminals, from the call on (pytest's own are set in between)."""

    def take():
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return take


@pytest.mark.parametrize("say", [terminal.data, terminal.info, terminal.next_step])
def test_a_terminal_gets_lines_and_our_colours_and_nothing_else(tty, say):
    out, err = tty()
    say(terminal.paint("red", "red") + EVIL + "\n\tsecond line")

    said = out.getvalue() + err.getvalue()
    left = said.replace("\x1b[31m", "").replace("\x1b[0m", "").replace("\x1b[1m", "")
    assert left.replace("\n", "").replace("\t", "").isprintable()
    assert "\x1b[31mred\x1b[0m" in said and "\\x1b]0;title" in said and "\n\tsecond line" in said


def test_a_field_makes_no_row(tty):
    out, _ = tty()
    terminal.table(
        [("run\nforged  row", EVIL), ("b", terminal.paint("ok", "green"))], ("one", "two")
    )

    assert len(out.getvalue().splitlines()) == 3
    assert "\x1b]" not in out.getvalue() and "\x1b[32mok\x1b[0m" in out.getvalue()


def test_a_pipe_gets_the_answer_byte_for_byte(capsys):
    terminal.data(EVIL)
    assert capsys.readouterr().out == EVIL + "\n"


def test_json_says_the_same_and_is_printable(capsys):
    terminal.data_json(name=EVIL, plain="ā")
    out = capsys.readouterr().out
    assert json.loads(out)["name"] == EVIL
    assert out.replace("\n", "").isprintable()


def test_no_row_is_wider_than_the_terminal_and_no_word_is_lost(tty, monkeypatch):
    rows = [("name", "word " * 40, "x" * 70), ("other", terminal.paint("ok", "green"), "why " * 30)]
    for columns in (40, 80, 100, 400):
        monkeypatch.setattr(terminal, "_columns", lambda columns=columns: columns)
        out, _ = tty()
        terminal.table(rows, ("one", "two", "three"))
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())

        assert max(map(len, plain.splitlines())) <= columns
        assert plain.count("word") == 40 and plain.count("why") == 30 and plain.count("x") == 70
        assert len(plain.splitlines()) == 3 or columns < 400


def test_a_colour_takes_no_room_in_a_column(tty):
    out, _ = tty()
    terminal.table([(terminal.paint("ok", "green"), "a"), ("failed", "b")])

    first, second = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()
    assert first.index("a") == second.index("b")
