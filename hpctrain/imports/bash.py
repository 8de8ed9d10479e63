"""A bash script as its top-level statements and their commands, by tree-sitter. Nothing is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault
from hpctrain.base.shell import expanding_words

_ASSIGNED = re.compile(
    r"(?:export\s+|(?:declare|local|readonly)\s+(?:-\w+\s+)?)?([A-Za-z_]\w*)="
    r"(?:\"(.*)\"|'(.*)'|\((.*)\)|([^\s\"'(;]+))",
    re.DOTALL,
)


@dataclass(frozen=True)
class Command:
    """One simple command: its words as they are written, the assignments before it, and whether a
    pipe or a redirection follows."""

    words: tuple[str, ...]
    assigned: tuple[str, ...]
    piped: str = ""


@dataclass(frozen=True)
class Statement:
    """One top-level statement: its text, kind (tree-sitter's), line, whether `&` ends it, and every
    command in it, however deep."""

    text: str
    kind: str
    line: int
    background: bool
    commands: tuple[Command, ...]
    broken: bool = False

    @property
    def single(self) -> Command | None:
        """Its one command, None where it is more than that (a pipe into `tee` is not)."""
        plain = self.kind in ("command", "pipeline", "redirected_statement")
        return self.commands[0] if plain and self.commands else None


def statements(text: str) -> list[Statement]:
    """The top-level statements in their order, comments left out. Raises EnvironmentFault where
    tree-sitter is not installed."""
    root = _parse(text.encode()).root_node
    found: list[Statement] = []
    for node in root.children:
        if node.type == "&" and found:
            found[-1] = _in_background(found[-1])
        if node.is_named and node.type != "comment" and node.text.strip():
            found.append(
                Statement(
                    node.text.decode(),
                    node.type,
                    node.start_point[0] + 1,
                    False,
                    tuple(_commands(node)),
                    node.has_error,
                )
            )
    return found


def constants(found: list[Statement]) -> dict[str, str]:
    """Variables that are assigned once, at the top level, a literal or one made of such."""
    values: dict[str, str] = {}
    counts: dict[str, int] = {}
    for statement in found:
        for name in re.findall(r"(?:^|[\s;(])([A-Za-z_]\w*)\+?=", statement.text):
            counts[name] = counts.get(name, 0) + 1
    for statement in found:
        if statement.kind not in (
            "variable_assignment",
            "declaration_command",
            "variable_assignments",
        ):
            continue
        for name, value in re.findall(
            r"([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|[^\s;\"']*)", statement.text
        ):
            plain = expanded(value, values)
            if counts.get(name) == 1 and plain is not None:
                values[name] = plain
    return values


def texts(found: list[Statement]) -> dict[str, list[str]]:
    """The words of variables that are assigned once, at the top level, as one text or a list."""
    values: dict[str, list[list[str]]] = {}
    for statement in found:
        one = _ASSIGNED.fullmatch(statement.text)
        if one:
            text = next(filter(None, one.groups()[1:]), "").replace("\\\n", " ")
            try:
                values.setdefault(one[1], []).append(list(expanding_words(text)))
            except ValueError:
                values.setdefault(one[1], []).append([])
        else:
            for name in re.findall(r"([A-Za-z_]\w*)\+?=", statement.text):
                values.setdefault(name, []).append([])
    return {name: words[0] for name, words in values.items() if len(words) == 1 and words[0]}


def expanded(word: str, values: dict[str, str]) -> str | None:
    """A word with the known variables filled in and its quotes taken off; None where something of
    it is not known."""
    if len(word) > 1 and word[0] == word[-1] == "'":
        return word[1:-1]
    text = re.sub(
        r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))",
        lambda one: values.get(one[1] or one[2], one[0]),
        word.replace('"', ""),
    )
    return None if re.search(r"[$`\\'*?]", text) else text


def _parse(source: bytes) -> Any:
    try:
        import tree_sitter
        import tree_sitter_bash
    except ImportError as error:
        raise EnvironmentFault(
            "`hpctrain import` reads bash with tree-sitter, which is not installed",
            hint="pip install 'hpctrain[import]'",
        ) from error
    language = tree_sitter.Language(tree_sitter_bash.language())
    return tree_sitter.Parser(language).parse(source)


def _in_background(statement: Statement) -> Statement:
    return Statement(
        statement.text, statement.kind, statement.line, True, statement.commands, statement.broken
    )


def _commands(node: Any, piped: str = "") -> Iterator[Command]:
    if node.type == "command":
        words, assigned = [], []
        for child in node.children:
            if child.type == "variable_assignment":
                assigned.append(child.text.decode())
            elif child.is_named and child.type not in ("file_redirect", "herestring_redirect"):
                words.append(child.text.decode())
        yield Command(tuple(words), tuple(assigned), piped)
    elif node.type == "declaration_command":
        words = [child.text.decode() for child in node.children if child.is_named]
        yield Command((node.children[0].text.decode(), *words), (), piped)
    for child in node.children:
        rest = piped
        if node.type in ("redirected_statement", "pipeline"):
            rest = (
                node.text.decode()[len(child.text.decode()) :].strip()
                if child == node.children[0]
                else piped
            )
        yield from _commands(child, rest)
