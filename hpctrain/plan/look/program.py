"""The program that the step runs: command, script, module, packages, and the working copy they come
from. Nothing is started: an environment of somebody's own may not run before it is asked to."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpctrain.base.errors import Problem
from hpctrain.config.fields import nearest
from hpctrain.plan.look.reading import Reader, environment
from hpctrain.recipes.facts import Copy, Packages, Program

_SCRIPT = re.compile(r"[^-$={}][^$={}]*\.(py|sh|bash|pl|R|jl)\Z")
_PYTHON = re.compile(r"python[\d.]*\Z")
_HEX = re.compile(r"[0-9a-f]{40}\Z")


@dataclass(frozen=True)
class Place:
    """What is known of where the step runs. `here`: this machine is the site. `open_air`: it runs
    as a login shell would, without container, modules or activation."""

    here: bool
    open_air: bool


def problems(program: Program, place: Place, reader: Reader) -> Iterator[Problem]:
    """A command, script or module that is not there."""
    words = program.words
    if not words or not words[0]:
        return
    if "/" in words[0]:
        yield from _script(program, 0, place, reader)
    elif place.here and place.open_air and is_lacking(words[0]):
        yield Problem(
            f"there is no program `{words[0]}`",
            program.where_of(0),
            why="it is in none of the folders of this shell's PATH",
            hint=nearest(words[0], _programs(reader)),
        )
    for index, word in enumerate(words[1:], 1):
        if word == "-m" and _PYTHON.match(os.path.basename(words[0])) and index + 1 < len(words):
            yield from _module(program, index + 1, place, reader)
            return
        if _SCRIPT.match(word) and not words[index - 1].startswith("--"):
            yield from _script(program, index, place, reader)
            return


def _script(program: Program, index: int, place: Place, reader: Reader) -> Iterator[Problem]:
    path = os.path.normpath(os.path.join(program.workdir, program.words[index]))
    if "$" in path or "{" in path or reader.size(path) is not None:
        return
    folder = os.path.dirname(path)
    reader.turn_to(folder)
    if not os.path.isdir(folder) and not place.here:
        return  # the whole folder is elsewhere
    what = f"there is no `{program.words[index]}`"
    if os.path.isdir(path):
        what = f"`{program.words[index]}` is a folder, no program"
    yield Problem(
        what,
        program.where_of(index),
        why=f"looked for as {path}",
        hint=nearest(os.path.basename(path), reader.names(folder)),
        level="error" if place.here and place.open_air else "warning",
    )


def _module(program: Program, index: int, place: Place, reader: Reader) -> Iterator[Problem]:
    """`python -m a.b`: a package of the working directory must have it, others be installed."""
    name = program.words[index]
    if "$" in name or "{" in name:
        return
    parts = name.split(".")
    inside = os.path.join(program.workdir, parts[0])
    if _is_module(inside, reader):
        if not _is_module(os.path.join(program.workdir, *parts), reader):
            yield Problem(
                f"there is no module `{name}`",
                program.where_of(index),
                why=f"`{parts[0]}` of {program.workdir} has none of that name",
                hint=nearest(parts[-1], reader.names(os.path.join(inside, *parts[1:-1]))),
            )
        return
    folders = installed(program.words[0], reader) if place.here and place.open_air else []
    if folders and not any(_is_module(os.path.join(one, parts[0]), reader) for one in folders):
        yield Problem(
            f"there is no module `{name}`",
            program.where_of(index),
            why=f"neither in {program.workdir} nor among the packages of `{program.words[0]}`",
        )


def _is_module(path: str, reader: Reader) -> bool:
    return reader.size(path + ".py") is not None or os.path.isdir(path)


def package_problems(packages: Packages, place: Place, reader: Reader) -> Iterator[Problem]:
    """Packages that the run will import and that its Python has not, told from the names in its
    folders."""
    if not place.here or not place.open_air:
        return
    if "/" not in packages.python and is_lacking(packages.python):
        yield Problem(
            f"there is no program `{packages.python}`",
            packages.where,
            why="it is in none of the folders of this shell's PATH",
            hint="recipe_options: {python: /path/to/python}, or a container",
        )
        return
    folders = installed(packages.python, reader)
    known = {_plain(name) for folder in folders for name in reader.names(folder)}
    for name, (why, where) in packages.wanted.items():
        if known and _plain(name) not in known:
            yield Problem(
                f"the package `{name}` is not installed for `{packages.python}`",
                where,
                why=f"{why}; looked for in {folders[0]}",
                hint=f"pip install '{name}'; `hpctrain doctor` knows which version",
            )


def _plain(name: str) -> str:
    """A package's name as pip compares it, of `Name-1.0.dist-info` and the like too."""
    stem = re.sub(r"-[^-]*(-py[\d.]+)?\.(dist-info|egg-info)\Z", "", name)
    return re.sub(r"[-_.]+", "-", stem).lower()


def which(name: str) -> str | None:
    """The program of this name that this shell would start."""
    for folder in environment("PATH").split(os.pathsep):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def is_lacking(name: str) -> bool:
    """Whether this shell would find no program of this name, though its PATH leads somewhere."""
    folders = environment("PATH").split(os.pathsep)
    return any(map(os.path.isdir, folders)) and not which(name)


def _programs(reader: Reader) -> list[str]:
    return [
        name for folder in environment("PATH").split(os.pathsep) for name in reader.names(folder)
    ]


def installed(python: str, reader: Reader) -> list[str]:
    """The folders that a Python imports packages from, by the rules of `site` (docs.python.org);
    empty where they cannot be told."""
    path = python if "/" in python else which(python)
    if not path:
        return []
    found = [one for one in environment("PYTHONPATH").split(os.pathsep) if one]
    prefixes = [os.path.dirname(os.path.dirname(path))]
    config = os.path.join(prefixes[0], "pyvenv.cfg")
    own = reader.size(config) is not None
    if not own or b"include-system-site-packages = true" in reader.read(config, 0, 4096).lower():
        real = os.path.realpath(path)
        prefixes += [os.path.dirname(os.path.dirname(real)), "/usr/local"]
        found.append(os.path.expanduser("~/.local/lib"))
    for prefix in dict.fromkeys(prefixes):
        for lib in ("lib", "lib64"):
            for name in reader.names(os.path.join(prefix, lib)):
                if name.startswith("python3"):
                    top = os.path.join(prefix, lib, name)
                    found += [top, os.path.join(top, "site-packages")]
                    found.append(os.path.join(top, "dist-packages"))
    return [folder for folder in dict.fromkeys(found) if os.path.isdir(folder)]


def copy_problems(copy: Copy, reader: Reader) -> Iterator[Problem]:
    """A working copy at another branch or commit than the job asks for."""
    if not (copy.branch or copy.commit):
        return
    reader.turn_to(copy.folder)
    if not os.path.isdir(copy.folder):
        return
    git = _git_folder(copy.folder, reader)
    head = _text(os.path.join(git, "HEAD"), reader) if git else ""
    if not head:
        yield Problem(
            f"`{copy.folder}` is no git working copy, and {copy.why}",
            copy.where,
            hint="clone it there",
            level="warning",
        )
        return
    name = head[5:].strip() if head.startswith("ref:") else ""
    commit = _commit(git, name, reader) if name else head
    wanted = copy.commit or _commit(git, f"refs/heads/{copy.branch}", reader)
    if name == f"refs/heads/{copy.branch}" or (wanted and commit and commit.startswith(wanted)):
        return
    at = name.replace("refs/heads/", "branch ") or f"commit {head[:12]}"
    if copy.commit:
        at = f"commit {commit[:12] or 'unknown'}"
    need = f"commit {copy.commit}" if copy.commit else f"branch {copy.branch}"
    yield Problem(
        f"`{copy.folder}` is at {at}, and the run needs {need}",
        copy.where_wanted or copy.where,
        why=copy.why,
        hint=shlex.join(["git", "-C", copy.folder, "checkout", copy.commit or copy.branch or ""]),
    )


def _text(path: str, reader: Reader) -> str:
    try:
        return reader.read(path, 0, 4096).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _git_folder(folder: str, reader: Reader) -> str:
    path = os.path.join(folder, ".git")
    text = _text(path, reader) if reader.size(path) is not None else ""
    if text.startswith("gitdir:"):  # a worktree
        return os.path.normpath(os.path.join(folder, text[len("gitdir:") :].strip()))
    return path if os.path.isdir(path) else ""


def _commit(git: str, name: str, reader: Reader) -> str:
    """The commit that a ref names, empty where nothing tells."""
    common = _text(os.path.join(git, "commondir"), reader)
    for top in dict.fromkeys([git, os.path.normpath(os.path.join(git, common))]):
        text = _text(os.path.join(top, name), reader)
        if _HEX.match(text):
            return text
        packed = os.path.join(top, "packed-refs")
        size = reader.size(packed)
        lines = reader.read(packed, 0, size).decode("utf-8", "replace").splitlines() if size else []
        for line in lines:
            if line.endswith(" " + name):
                return line.split(" ")[0]
    return ""


def shared_copies(copies: Sequence[tuple[str, Copy]]) -> Iterator[Problem]:
    """(stage, working copy) of a pipeline that need different versions of one folder."""
    first: dict[str, tuple[str, Copy]] = {}
    for stage, copy in copies:
        wanted = copy.branch or copy.commit
        if not wanted:
            continue
        other, before = first.setdefault(os.path.realpath(copy.folder), (stage, copy))
        if wanted != (before.branch or before.commit):
            yield Problem(
                f"stages `{other}` and `{stage}` share the working copy `{copy.folder}`, and need"
                f" {before.branch or before.commit} and {wanted} of it",
                copy.where,
                why="it can be at one of them only, so one of the stages could never start",
                hint=shlex.join(["git", "-C", copy.folder, "worktree", "add", "../NAME", wanted])
                + ", and name that folder",
            )
