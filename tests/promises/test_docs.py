"""What the pages show works: commands run and print what stands there, run.yamls are valid.

In README.md, docs/ and the examples' READMEs:

- A ```console block after a comment `<!-- run in FOLDER -->` is run, in a copy of that folder (one copy
  a page): each `$ ` line is a command, the lines after it what it prints on both streams. `…` alone
  stands for any number of lines, within a line for any text.
- Every other `hpctrain …` in a block or between backticks must be taken by its verb's parser.
- A ```yaml block is a run.yaml, a pipeline.yaml or a profile, whole or in part: a whole run.yaml is
  planned without an error, a part has no unknown key and no wrong value.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

from hpctrain.base.errors import HpctrainError
from hpctrain.cli import group
from hpctrain.config import pipeline, recipe, run, site
from hpctrain.config.document import parse_yaml
from hpctrain.config.fields import check
from hpctrain.plan.load import load_plan

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
FENCE = re.compile(
    r"^(?:<!-- run in (?P<folder>\S+) -->\n)?(?P<tick>```+)(?P<lang>\w*)[^\n]*\n(?P<text>.*?)^(?P=tick)$",
    re.MULTILINE | re.DOTALL,
)
SPAN = re.compile(r"`(hpctrain [^`\n]+)`")
# What stands for something of the reader's own, or for several words at once.
WORDS = re.compile(r"[A-Z]+…$|…$|^…")
RUN_KEYS = {"name", "recipe", "time"}
USERS = ("sites", "trusted")  # keys of the user's config alone


class Block(NamedTuple):
    page: Path
    line: int
    lang: str
    text: str
    folder: str | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")) + 1,
            found["lang"],
            found["text"],
            found["folder"],
        )
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def name_of(item) -> str:
    page, line = item[0], item[1]
    return f"{page.relative_to(ROOT)}:{line}"


# --- commands that are run ---------------------------------------------------------------------

RUN = [page for page in PAGES if any(b.page == page and b.folder for b in BLOCKS)]


def sessions(text: str) -> list[tuple[str, list[str]]]:
    """(command, lines that it prints) of a console block."""
    out: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            out.append((line[2:], []))
        elif out and out[-1][0].endswith("\\") and not out[-1][1]:
            out[-1] = (out[-1][0] + "\n" + line, [])
        else:
            assert out, "a console block begins with a command"
            out[-1][1].append(line)
    return out


def is_shown(shown: list[str], printed: list[str]) -> bool:
    """Whether the printed lines are those shown, `…` standing for what is left out."""
    parts = []
    for line in shown:
        if line.strip() == "…":
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(".*".join(map(re.escape, line.split("…"))) + r"\n")
    return re.fullmatch("".join(parts), "".join(line + "\n" for line in printed)) is not None


def test_shown_knows_what_is_left_out() -> None:
    assert is_shown(["a", "…", "c…e"], ["a", "b", "b", "c d e"])
    assert is_shown(["…", "a"], ["a"])
    assert not is_shown(["a"], ["a", "b"])
    assert not is_shown(["a", "…"], ["b"])


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_output_shown_is_output_produced(page, tmp_path) -> None:
    env = {
        **{
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HPCTRAIN", "SLURM"))
        },
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "COLUMNS": "120",
        "LC_ALL": "C.UTF-8",
    }
    (tmp_path / "home").mkdir()
    for block in (block for block in BLOCKS if block.page == page and block.folder):
        folder = tmp_path / Path(block.folder).name
        if not folder.exists():
            shutil.copytree(ROOT / block.folder, folder)
        for command, shown in sessions(block.text):
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
            )
            printed = done.stdout.splitlines()

            assert is_shown(shown, printed), (
                f"{name_of(block)}: {command}\nshown:\n"
                + "\n".join(shown)
                + f"\nprinted:\n{done.stdout}"
            )


# --- commands that are parsed ------------------------------------------------------------------


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """(line, words after `hpctrain`) of every call on a page, in blocks of shell and between
    backticks."""
    out = []
    for block in blocks_of(page):
        if block.lang in ("", "sh", "bash", "console"):
            lines = block.text.replace("\\\n", "  ").splitlines()
            typed = [line for line in lines if block.lang != "console" or line.startswith("$ ")]
            for line in typed:
                if "hpctrain " in line:
                    out += [(block.line, words) for words in calls(line)]
    text = FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))
    for found in SPAN.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        out += [(line, words) for words in calls(found[1])]
    return out


def calls(line: str) -> list[list[str]]:
    """The words after `hpctrain` of each call in a line of shell, without redirections."""
    line = line.removeprefix("$ ")
    out = [words for inner in re.findall(r"\$\((hpctrain [^)]*)\)", line) for words in calls(inner)]
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set("();<>|&"):
            if words[:1] == ["hpctrain"]:
                out.append(words[1:])
            # what follows a redirection is a file
            words = ["a file"] if set(token) & set("<>") else []
        elif token == "--" and words[:1] == ["hpctrain"]:
            out.append(words[1:])
            words = []
        else:
            words.append(token)
    return out


def parse(words: list[str]) -> None:
    """Take `hpctrain` and its words apart as click would, without running anything."""
    command: click.Command = group
    context = click.Context(group, info_name="hpctrain")
    while words and words[0].startswith("--"):
        words = words[1:]  # of hpctrain itself, such as --debug
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if is_word(words[0]):
            return
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command, context = found, click.Context(found, info_name=name, parent=context)
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    assert not rest, f"too many words: {rest}"
    for param in command.params:
        value = values.get(param.name or "")
        given = value if isinstance(value, (list, tuple)) else [value]
        for item in given:
            known = isinstance(param.type, (click.Choice, click.IntRange, click.FloatRange))
            if known and isinstance(item, str) and not is_word(item):
                param.type.convert(item, param, context)


def is_word(text: str) -> bool:
    """Whether a text stands for a value of the reader's."""
    return bool(WORDS.search(text)) or text.isupper() or text.startswith("<")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_taken_by_its_parser(page) -> None:
    wrong = []
    for line, words in commands(page):
        try:
            parse([word for word in words if word not in ("…", "...")])
        except (click.ClickException, HpctrainError, AssertionError) as error:
            wrong.append(f"{page.name}:{line}: {shlex.join(words)}: {error!r}")

    assert not wrong


def test_commands_are_found_and_wrong_ones_refused() -> None:
    assert calls('$ sbatch "$(hpctrain render -o x)"  # hpctrain no') == [["render", "-o", "x"]]
    assert calls("cd a && hpctrain check > b; hpctrain plan") == [["check"], ["plan"]]
    assert calls("hpctrain sandbox shell -- hpctrain plan") == [["sandbox", "shell"], ["plan"]]
    assert sum(len(commands(page)) for page in PAGES) > 100
    for wrong in ("chek", "check --bogus", "check a b", "schema rum", "chain --extend x"):
        with pytest.raises((click.ClickException, HpctrainError, AssertionError)):
            parse(wrong.split())


# --- YAML --------------------------------------------------------------------------------------

YAML = [block for block in BLOCKS if block.lang in ("yaml", "yml")]


@pytest.mark.parametrize("block", YAML, ids=name_of)
def test_every_yaml_is_valid(block, tmp_path) -> None:
    data = yaml.safe_load(block.text)
    if set(data) >= RUN_KEYS and ("site" in data or "account" in data):
        check_run(block, data, tmp_path)
        return
    kinds = {"stages": pipeline.FIELDS, "module": recipe.FIELDS}
    fields = next((known for key, known in kinds.items() if key in data), None)
    if fields is None:
        fields = run.FIELDS if not set(data) - {*run.FIELDS, *USERS} else site.FIELDS
    document = parse_yaml(block.text, name_of(block))
    for key in USERS:
        document.data.pop(key, None)
    if fields is pipeline.FIELDS:
        document.data.setdefault("name", "x")
        document.data.setdefault("schema_version", 1)
    _, problems = check(document, fields)

    assert not [str(p) for p in problems if "is missing" not in p.what or fields is pipeline.FIELDS]


def check_run(block, data, tmp_path) -> None:
    """A whole run.yaml beside the files that it names: those of the example of its site and recipe."""
    for source in sorted(ROOT.glob("examples/*/*")):
        if source.suffix in (".yml", ".sh") or source.name.startswith("config"):
            target = tmp_path / source.name
            if source.is_file() and not target.exists():
                shutil.copy(source, target)
    path = tmp_path / "run.yaml"
    path.write_text(block.text, encoding="utf-8")

    plan = load_plan(str(path)).plan

    assert not [str(problem) for problem in plan.errors]


# --- references and links ----------------------------------------------------------------------


def test_what_is_made_from_the_code_is_not_stale() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/reference"), "--check"], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr


LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page) -> None:
    lost = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            lost.append(target)

    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_begins_at_the_margin(page) -> None:
    # Within a list Python-Markdown and GitHub ask for other margins, and nobody would test it.
    text = FENCE.sub("", page.read_text(encoding="utf-8"))

    assert not re.findall(r"^ *```.*|^ {1,3}[-*] .*", text, re.MULTILINE)


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/README.md"
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for target in LINK.findall(index.read_text())
    }

    assert not [
        page for page in PAGES if page.parent != ROOT and page != index and page not in linked
    ]


@pytest.mark.parametrize("example", ["lumi-neox-sft", "hello", "own-program", "hf-sft", "lumi-dpo"])
def test_every_file_of_a_run_directory_is_explained(example, tmp_path) -> None:
    from hpctrain.plan.run_dir import run_files

    rows = re.findall(
        r"^\| (`[^|]*) \|", (ROOT / "docs/run-directory.md").read_text(), re.MULTILINE
    )
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    loaded = load_plan(str(ROOT / "examples" / example / "run.yaml"), out_dir=str(tmp_path / "run"))

    files = {name.split("/")[0] + "/" * ("/" in name) for name in run_files(loaded)}
    assert not [name for name in files if not any(fnmatch.fnmatch(name, known) for known in names)]


def test_the_site_has_every_page_with_its_links(tmp_path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools/site_pages.py"),
            tmp_path / "pages",
            tmp_path / "mkdocs.yml",
        ],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    made = sorted((tmp_path / "pages").rglob("*.md"))
    sites = [page for page in made if "site_profiles" in page.parts]
    assert len(made) - len(sites) == len(PAGES) - 1  # not the repository's own README.md
    nav = yaml.safe_load((tmp_path / "mkdocs.yml").read_text())["nav"]
    named = [
        page
        for section in nav
        for pages in section.values()
        if isinstance(pages, list)
        for page in pages
    ]
    assert len(named) == len(made) - len(sites) - 1
    for page in made:
        for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            path = target.partition("#")[0]
            assert not path or ":" in target or (page.parent / path).exists(), (page, target)
