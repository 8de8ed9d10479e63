"""Which templates may be loaded: those from which no value can reach a script unquoted. Pure.

Two rules. What writes must be one of the statements below, and of those only `{{ }}` writes values,
each ending in a filter that quotes. And each filter has its place: what is safe in a comment is not
in a command.

Places are judged line by line, with the text of the template alone; quotes that span lines and here
documents are read as if each line began outside of them. Where branches of an `if` lead to
different text before a value, every one of them is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from jinja2 import nodes

# Filter -> the places it is made for. `raw_shell` passes only what is one plain word everywhere.
FILTER_PLACES = {
    "q": {"word"},
    "qjoin": {"word"},
    "sbatch": {"directive"},
    "comment": {"comment"},
    "raw_shell": {"word", "quotes", "directive", "comment"},
}
_PLACE_NAMES = {
    "word": "a command",
    "quotes": "quotes",
    "directive": "an #SBATCH line",
    "comment": "a comment",
}
# Every other statement writes what no filter sees (`filter`, `call`), or changes what `{{ }}` does
# (`autoescape`).
_STATEMENTS = (
    nodes.Template,
    nodes.Extends,
    nodes.Block,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Macro,
    nodes.Assign,
    nodes.AssignBlock,
    nodes.With,
    nodes.If,
    nodes.For,
    nodes.Output,
)
_NAMES = {
    "FilterBlock": "filter",
    "CallBlock": "call",
    "ScopedEvalContextModifier": "autoescape",
    "FromImport": "import",
}
# What these write is already checked text; a variable of that name would not be.
_RESERVED = frozenset({"super", "caller", "self"})
_NO_FILTER = "an expression that does not end in a quoting filter (q, qjoin, sbatch, comment)"

# What changes the context in bash; a backslash takes the next letter with it, and `#` begins a
# comment only where a word could begin.
_SHELL = re.compile(r"""\\.|\$\(|\$\{|["'(){}]|(?<![^\s;|&()])#""")
_CLOSES = {'"': '"', "(": ")", "$(": ")", "${": "}"}

Finding = tuple[int, str]
# The text of the template before a place, on its line; a value counts as one letter. One for each
# way to get there.
_Lines = frozenset[str]
_LINE_START: _Lines = frozenset({""})


def lint_template(tree: nodes.Template) -> list[Finding]:
    """(line, what) of everything that could let a value out unquoted, in the order of the lines."""
    found = [*_statements(tree), *_names(tree)]
    _body(tree.body, _LINE_START, found)
    return sorted(set(found))


def _statements(tree: nodes.Template) -> Iterator[Finding]:
    for node in tree.find_all(nodes.Stmt):
        name = _NAMES.get(type(node).__name__, type(node).__name__)
        if not isinstance(node, _STATEMENTS):
            # Jinja gives no line to `autoescape`, but to what is in it.
            lines = [node.lineno, *[inner.lineno for inner in node.find_all(nodes.Stmt)]]
            yield (
                min(filter(None, lines), default=1),
                f"`{name}`, which can let a value out unquoted",
            )
        if isinstance(node, (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)):
            if not isinstance(node.template, nodes.Const):
                yield node.lineno, f"`{name.lower()}` of an expression: name the template itself"


def _names(tree: nodes.Template) -> Iterator[Finding]:
    for node in tree.find_all((nodes.Name, nodes.Macro, nodes.Import, nodes.FromImport)):
        for name in _RESERVED.intersection(_bound(node)):
            yield node.lineno, f"a variable called `{name}`, which is a name of Jinja's own"


def _bound(node: nodes.Node) -> Sequence[str]:
    """The names that a node gives a meaning to."""
    if isinstance(node, nodes.Name):
        return [] if node.ctx == "load" else [node.name]
    if isinstance(node, nodes.FromImport):
        return [name if isinstance(name, str) else name[1] for name in node.names]
    assert isinstance(node, (nodes.Macro, nodes.Import))
    return [node.name] if isinstance(node, nodes.Macro) else [node.target]


def _body(body: Iterable[nodes.Node], lines: _Lines, found: list[Finding]) -> _Lines:
    """Judge the statements of a body that is entered with `lines`; gives those it is left with."""
    for node in body:
        if isinstance(node, nodes.Output):
            lines = _output(node, lines, found)
        elif isinstance(node, nodes.If):
            branches = [node.body, *(other.body for other in node.elif_), node.else_]
            lines = frozenset().union(*(_body(branch, lines, found) for branch in branches))
        elif isinstance(node, nodes.For):
            # The second turn begins where the first one ends.
            around = lines | _body(node.body, lines, found)
            lines = around | _body(node.body, around, found) | _body(node.else_, lines, found)
        elif isinstance(node, (nodes.Block, nodes.Include)):
            # What stands there instead, in another file, is judged as if it began a line.
            if {_place(line) for line in lines} != {"word"}:
                what = "a block or include within quotes, a comment or an #SBATCH line"
                found.append((node.lineno, what))
            lines = _body(node.body, lines, found) if isinstance(node, nodes.Block) else lines
        elif isinstance(node, nodes.With):
            lines = _body(node.body, lines, found)
        elif isinstance(node, (nodes.Macro, nodes.AssignBlock)):
            _body(node.body, _LINE_START, found)
    return lines


def _output(output: nodes.Output, lines: _Lines, found: list[Finding]) -> _Lines:
    for node in output.nodes:
        if isinstance(node, nodes.TemplateData):
            lines = frozenset((line + node.data).rpartition("\n")[2] for line in lines)
            continue
        if isinstance(node, nodes.Filter) and node.name in FILTER_PLACES:
            for place in {_place(line) for line in lines} - FILTER_PLACES[node.name]:
                found.append((node.lineno, _misplaced(node.name, place)))
        elif not _is_super(node):
            found.append((node.lineno, _NO_FILTER))
        lines = frozenset(line + "x" for line in lines)
    return lines


def _misplaced(name: str, place: str) -> str:
    (made_for,) = FILTER_PLACES[name]
    return f"the filter {name} within {_PLACE_NAMES[place]}; it quotes for {_PLACE_NAMES[made_for]}"


def _is_super(node: nodes.Node) -> bool:
    """`super()`: the text of the same block in the template below, which was judged there."""
    return (
        isinstance(node, nodes.Call)
        and isinstance(node.node, nodes.Name)
        and node.node.name == "super"
        and not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
    )


def _place(line: str) -> str:
    """What follows `line`: a `word` of a command, or more `quotes`, `directive` or `comment`.

    Bash begins a new context inside `$( )`, also within double quotes, and single quotes mean
    nothing between those.
    """
    if line.startswith("#SBATCH"):
        return "directive"
    inside: list[str] = []
    position = 0
    while match := _SHELL.search(line, position):
        token, innermost, position = match[0], inside[-1] if inside else "", match.end()
        if token == _CLOSES.get(innermost):
            inside.pop()
        elif token in ("$(", "${", '"') or (token == "(" and innermost == "$("):
            inside.append(token)
        elif token == "'" and not _double_quoted(inside):
            # Nothing has a meaning up to the next one, a backslash neither.
            position = line.find("'", position) + 1
            if not position:
                return "quotes"
        elif token == "#" and innermost in ("", "$(", "("):
            return "comment"
    return "quotes" if _double_quoted(inside) else "word"


def _double_quoted(inside: Sequence[str]) -> bool:
    """Whether double quotes hold here: those of the innermost `$( )` only."""
    since = len(inside) - inside[::-1].index("$(") if "$(" in inside else 0
    return '"' in inside[since:]
