"""Values as shell words and #SBATCH values: what bash and sbatch's own rules read back is the
value."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.base.shell import (
    ShellText,
    comment,
    node_path,
    output_pattern,
    quote,
    quote_all,
    sbatch_value,
    variable,
)

NASTY = [
    "",
    "a b",
    "it's",
    '"',
    "\\",
    "\\\\'",
    "$HOME $(id) `id` ${x}",
    "a\nb",
    "#",
    "a,b",
    "*?[a]~",
    "!x",
    "-n",
    "é\u2028",
    "\x1b[31m",
]
TEXT = st.text(
    alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60
)


def bash(script, **environ):
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": "/usr/bin:/bin", **environ}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_sbatch_reads(text):
    """What `_get_argument` of sbatch (src/sbatch/opt.c) makes of a directive's value: the first
    word, unquoted."""
    out, quoted, index = [], "", 0
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 1
            out.append(text[index])
        elif quoted:
            quoted = "" if char == quoted else quoted
            out += [] if not quoted else [char]
        elif char in "'\"":
            quoted = char
        elif char.isspace() or char == "#":
            break
        else:
            out.append(char)
        index += 1
    assert not quoted
    return "".join(out)


@pytest.mark.parametrize("value", NASTY)
def test_bash_reads_a_quoted_word_back(value):
    assert bash(f"printf %s {quote(value)}").decode() == value


@given(st.lists(TEXT, max_size=5))
def test_words_stay_apart_and_whole(values):
    assert shlex.split(quote_all(values)) == values


def test_a_comma_is_quoted_and_a_plain_word_is_not():
    assert quote("a,b") == "'a,b'" and quote("a,b c") == "'a,b c'"
    assert quote("a-b/c.d") == "a-b/c.d" and quote(7) == "7"


def test_what_is_shell_text_already_is_not_quoted_again():
    assert quote_all(["a b", ShellText('"$X"'), "c"]) == "'a b' \"$X\" c"
    assert isinstance(quote("a"), ShellText) and isinstance(quote_all([]), ShellText)


def test_a_nul_can_be_no_argument():
    with pytest.raises(ValueError, match="NUL"):
        quote("a\0b")


@pytest.mark.parametrize(
    "value", ["a b", "it's", 'say "x"', "\\", 'a\\"b', "C:\\dir", "#x", "a,b", "é", "$HOME"]
)
def test_sbatch_reads_a_directives_value_back(value):
    assert as_sbatch_reads(sbatch_value(value)) == value


@given(TEXT.filter(lambda text: text.isprintable() and text))
def test_sbatch_reads_any_printable_value_back(value):
    assert as_sbatch_reads(sbatch_value(value)) == value


def test_a_plain_directive_stays_plain_and_is_no_shell_text():
    assert sbatch_value("nid[1-3],a:b@c=~/x.%j") == "nid[1-3],a:b@c=~/x.%j"
    assert sbatch_value("$(id)") == '"$(id)"'
    for value in ("plain", "not plain"):
        assert not isinstance(sbatch_value(value), ShellText)


@pytest.mark.parametrize(
    ("value", "words"),
    [("", "it is empty"), ("a\nb", "control character"), ("\x7f", "control character")],
)
def test_what_no_directive_can_hold_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        sbatch_value(value)


def test_percent_signs_of_a_path_are_not_sbatchs():
    assert output_pattern("/a%j/100%%") == "/a%%j/100%%%%"


@pytest.mark.parametrize("char", ["\n", "\r", "\x00", "\x1f", "\x7f", "\u0085", "\u2028", "\u2029"])
def test_a_comment_cannot_end_its_line(char):
    assert comment(f"a{char}b") == "a?b" and not isinstance(comment("a"), ShellText)


def test_a_comment_keeps_everything_else():
    assert comment("a\u00e9 b$(x)") == "a\u00e9 b$(x)" and comment(5) == "5"


def test_a_variable_expands_on_the_node_as_one_word():
    assert variable("A_1") == '"$A_1"' and isinstance(variable("A_1"), ShellText)
    assert bash(f"printf '<%s>' {variable('X')}", X="a  b") == b"<a  b>"
    for name in ("1A", "A-B", "A B", "", "Ä", "A\n"):
        with pytest.raises(ValueError, match="not a variable name"):
            variable(name)


def test_a_path_on_the_node_is_made_of_its_folder_user_and_job():
    text = node_path("{tmp}/{user}-{job}/x", "/scratch/local")
    assert bash(f"printf %s {text}", USER="me", SLURM_JOB_ID="7") == b"/scratch/local/me-7/x"
    assert isinstance(text, ShellText)
    nobody = bash(f"unset USER; printf %s {node_path('{user}', '/t')}")
    assert nobody.isdigit()


@pytest.mark.parametrize("literal", ['a"b', "$(touch PWN)", "`id`", "\\", "$HOME", "a b", "it's"])
def test_the_fixed_parts_of_a_path_on_the_node_stay_as_they_are(literal):
    script = f"printf %s {node_path('{tmp}/' + literal, '/t ' + literal)}"
    assert bash(script, HOME="/home").decode() == f"/t {literal}/{literal}"
