"""The only place where a value becomes shell or #SBATCH text. Two grammars, two filters.

Shell words go through `quote`; `#SBATCH` lines are read by sbatch's own parser (SchedMD/slurm
src/sbatch/opt.c, `_get_argument`: a backslash escapes even inside single quotes, an unquoted `#`
starts a comment, nothing expands), so their values go through `sbatch_value`. Text that must expand
on the node is a type of its own, made only here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

from hpctrain.base.text import text_problem

_PLAIN_SBATCH = re.compile(r"[A-Za-z0-9_@%+=:,./^~\[\]-]+", re.ASCII)
_COMMENT_BREAK = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]")


class ShellText(str):
    """Text that is shell already and expands where it runs. Made by this module only, from fixed
    parts."""


def quote(value: object) -> ShellText:
    """One shell word that means exactly `value`. Raises ValueError for NUL, which no argument can
    hold."""
    text = str(value)
    if "\0" in text:
        raise ValueError("a NUL byte cannot be part of a shell word")
    word = shlex.quote(text)
    # A bare comma is fine for bash, but reads like a separator in an array (shellcheck SC2054).
    return ShellText(f"'{word}'" if word == text and "," in text else word)


def quote_all(values: Iterable[object]) -> ShellText:
    """Shell words, one per value, separated by spaces; a ShellText among them stays as it is."""
    return ShellText(
        " ".join(value if isinstance(value, ShellText) else quote(value) for value in values)
    )


# A shell word: plain letters, quotes, `$name`, `${…}` and `$(…)`, but nothing that ends a command.
_WORD = re.compile(
    r"""(?:[^\s\\'"`$;&|<>()#]|\\.|'[^']*'|"(?:[^"\\`]|\\.)*"|\$\{[^{}]*\}"""
    r"""|\$\((?:[^()'"`]|'[^']*'|"[^"`]*"|\((?:[^()'"`]|'[^']*'|"[^"`]*")*\))*\)|\$(?!\()|(?<=\S)\#)+""",
    re.DOTALL,
)


def expanding_words(text: str) -> list[ShellText]:
    """The words of a line of shell, each still to expand where it runs. Raises ValueError for what
    is more than one command's words: an operator, a comment, quotes that do not end."""
    words, place = [], 0
    while place < len(text):
        found = _WORD.match(text, place)
        if found:
            words.append(ShellText(found[0]))
            place = found.end()
        elif text[place].isspace():
            place += 1
        else:
            raise ValueError(f"`{text[place : place + 20]}` is not part of a word")
    return words


def one_expanding_word(text: str) -> ShellText:
    """A text whose `$VARIABLES` expand where it runs, and which stays one word. Raises ValueError
    for what cannot."""
    (word,) = expanding_words('"' + text.replace('"', '\\"') + '"')
    return word


def script(text: str) -> ShellText:
    """Lines of the user's own that the job runs as they are."""
    return ShellText(text.rstrip("\n") + "\n")


def sbatch_value(value: object) -> str:
    """A directive's value that sbatch reads back as exactly `value`. Raises ValueError for control
    characters.

    It is no shell text: between double quotes a shell would still expand it.
    """
    text = str(value)
    if not text or text_problem(text):
        raise ValueError(
            f"{text!r} cannot be the value of an #SBATCH line:"
            f" {text_problem(text) or 'it is empty'}"
        )
    if _PLAIN_SBATCH.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def output_pattern(path: str) -> str:
    """A path for --output in which every literal percent sign is doubled, since sbatch expands %j
    and the like."""
    return path.replace("%", "%%")


def comment(value: object) -> str:
    """Text for the rest of a comment line: it cannot end the line."""
    return _COMMENT_BREAK.sub("?", str(value))


def variable(name: str) -> ShellText:
    """A variable that expands on the node: `"$NAME"`."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
        raise ValueError(f"{name!r} is not a variable name")
    return ShellText(f'"${name}"')


def node_path(pattern: str, tmp: str) -> ShellText:
    """A double-quoted path in which {tmp}, {user} and {job} become the node's folder, the user and
    the job's id there."""
    parts: Mapping[str, str] = {"{user}": "${USER:-$UID}", "{job}": "${SLURM_JOB_ID}"}
    out = []
    for piece in re.split(r"(\{tmp\}|\{user\}|\{job\})", pattern.replace("{tmp}", tmp)):
        out.append(parts[piece] if piece in parts else re.sub(r'([\\"$`!])', r"\\\1", piece))
    return ShellText('"' + "".join(out) + '"')
