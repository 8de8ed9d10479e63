"""Whose files may be run or unpickled: the one rule for templates, profiles, caches, programs.

On the disks of a centre anyone may make a folder, and a project's members may write into each
other's. What is only read is read from anywhere; what becomes code must be nobody else's.
"""

from __future__ import annotations

import functools
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from typing import NamedTuple

from hpctrain.base.errors import Refused, UsageError
from hpctrain.base.paths import no_user_config, user_dir
from hpctrain.config.document import Document, load_yaml

_MAX_LINKS = 40  # as the kernel's own limit, path_resolution(7)


class Doubt(NamedTuple):
    """Why a path is not trusted, and what would make it so: each the half of a sentence."""

    why: str
    remedy: str


def _config_path() -> str:
    return os.path.join(user_dir(), "config.yaml")


def user_config() -> Document | None:
    """The user's own config file; None where there is none, or HPCTRAIN_NO_USER_CONFIG is set.

    Raises UsageError where it is not a mapping.
    """
    path = _config_path()
    if no_user_config() or not os.path.isfile(path):
        return None
    document = load_yaml(path)
    if document.data is None:
        return None
    if not isinstance(document.data, dict):
        raise UsageError("the user's config is a mapping of run.yaml keys to values", where=path)
    return document


def trusted(path: str) -> bool:
    """Whether `find_doubt` finds none."""
    return find_doubt(path) is None


def require_trust(path: str, what: str, above: bool = True) -> None:
    """Raises Refused, which says how to trust, where `what` at `path` could be somebody else's.

    Without `above` the folders above are let be: for data, of which nothing is run.
    """
    doubt = find_doubt(path, above)
    if doubt:
        raise Refused(f"{what} is not used: {doubt.why}", where=path, hint=doubt.remedy)


def find_doubt(path: str, above: bool = True) -> Doubt | None:
    """Why nothing at `path` is run or unpickled; None where it is trusted.

    It and every folder above must belong to me, to root, or to an owner named under `trusted:` of
    the user's config, and nobody else may write there. Folders above with the sticky bit (/tmp)
    may be everyone's: what lies in them is its owner's alone. A link is judged as what it is, and
    then what it leads to is. Of what is not there, the folders that are count. Whose rules: git's
    safe.directory, OpenSSH's StrictModes, path_resolution(7).
    """
    doubt = _first_doubt(path, frozenset(), above)
    if doubt and not _first_doubt(_config_path(), frozenset()):
        return _first_doubt(path, frozenset(_named()), above)
    return doubt


def _first_doubt(path: str, named: frozenset[str], above: bool = True) -> Doubt | None:
    way = _way(path) if above else [path]
    try:
        entries = [(entry, os.lstat(entry)) for entry in way if os.path.lexists(entry)]
    except OSError as error:
        return Doubt(f"it cannot be looked at ({error.strerror or error})", "")
    for number, (entry, status) in enumerate(entries, 1):
        found = _doubt_of(entry, status, number < len(entries), named)
        if found:
            return found
    return None


def _way(path: str) -> Iterator[str]:
    """Every name that the kernel comes by on its way to `path`, links and what they lead to."""
    left = os.path.join(os.getcwd(), path).split("/")[::-1]
    here, num_links = "/", 0
    yield here
    while left:
        name = left.pop()
        if name in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)
            continue
        here = os.path.join(here, name)
        yield here
        if os.path.islink(here):
            num_links += 1
            if num_links > _MAX_LINKS:
                raise OSError("it is a link that leads to itself")
            target = os.readlink(here)
            here = "/" if target.startswith("/") else os.path.dirname(here)
            left += target.split("/")[::-1]


def _doubt_of(
    entry: str, status: os.stat_result, above: bool, named: frozenset[str]
) -> Doubt | None:
    mode, uid, gid = status.st_mode, status.st_uid, status.st_gid
    if uid not in (os.geteuid(), _root()) and _user(uid) not in named:
        return Doubt(f"`{entry}` belongs to {_user(uid)}", _name_it(_user(uid)))
    if stat.S_ISLNK(mode) or (above and mode & stat.S_ISVTX):
        return None
    if mode & stat.S_IWOTH:
        return Doubt(f"anybody may write in `{entry}`", f"chmod o-w {entry}")
    if mode & stat.S_IWGRP and gid != 0 and not _is_my_own(gid):
        group = f"group:{_group(gid)}"
        if group not in named:
            why = f"the group {_group(gid)} may write in `{entry}`"
            return Doubt(why, f"chmod g-w {entry}, or {_name_it(group)}")
    return None


def _name_it(name: str) -> str:
    return f"to trust them with your account: `trusted: [{name}]` in {_config_path()}"


def _named() -> list[str]:
    """The owners (`NAME`, `group:NAME`) whose files the user's config lets hpctrain run."""
    document = user_config()
    names = document.get("trusted") if document else None
    if names is not None and not isinstance(names, list):
        raise UsageError(
            "`trusted` is a list of users, and of groups as group:NAME",
            where=document.where("trusted") if document else "",
        )
    return [str(name) for name in names or []]


@functools.cache
def _root() -> int:
    """The id that root's files have here: in a rootless container, where root has none, the
    kernel's stand-in for whoever has none (user_namespaces(7))."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            if all(line.split()[1] != "0" for line in file):
                with open("/proc/sys/kernel/overflowuid", encoding="ascii") as number:
                    return int(number.read())
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _is_my_own(gid: int) -> bool:
    """Whether a group is mine alone, as Debian and Fedora give one to each user."""
    try:
        group, me = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return (group.gr_name, gid) == (me.pw_name, me.pw_gid) and set(group.gr_mem) <= {me.pw_name}


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
