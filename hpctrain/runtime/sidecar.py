"""hpctrain's own folder beside a checkpoint folder: locks, what was set aside, what people decided.

The checkpoint folder belongs to the framework: accelerate loads the newest entry whatever it is,
others refuse to begin where anything lies.
"""

import errno
import os
import re
from typing import Any, Callable, Dict, List, Optional

from .files import OddFile, append_record, free_name, make_folder, read_records, sync_folder

ENDING = ".hpctrain"
ACTS = "acts.jsonl"
KINDS = ("interrupted-", "aside-")
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def beside(folder: str) -> str:
    """The usual place: `<checkpoint folder>.hpctrain`, by the folder's real name, so that two runs
    that reach it by different links meet."""
    return os.path.realpath(folder) + ENDING


def place_of(folder: str, run_dir: str = "") -> str:
    """Where hpctrain's files for `folder` are now, or would be made; asks and makes nothing."""
    usual, spare = beside(folder), _spare(run_dir)
    return spare if spare and not os.path.isdir(usual) and os.path.isdir(spare) else usual


def make_place(folder: str, run_dir: str, say: Callable[[str], None]) -> str:
    """Make hpctrain's folder for `folder`: beside it, or in the run directory where that may not be
    written, which is said. Raises OSError when neither can be."""
    usual, spare = beside(folder), _spare(run_dir)
    if os.path.isdir(usual):
        if not spare or os.access(usual, os.W_OK | os.X_OK):
            return usual
    else:
        try:
            make_folder(usual)
            if os.path.isdir(usual):
                return usual
            if not spare:
                raise OSError(errno.ENOTDIR, "something else has this name", usual)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE or not spare:
                raise
    say("`{}` cannot be written: locks and what is set aside go to `{}`".format(usual, spare))
    make_folder(spare)
    return spare


def _spare(run_dir: str) -> str:
    return os.path.join(run_dir, "checkpoints" + ENDING) if run_dir else ""


def set_aside(folder: str, place: str, name: str, kind: str) -> str:
    """Move `name` out of the framework's folder, to the first free name there; returns its new
    path.

    A link is made anew, so that it still leads where it led. Where `place` is on another file
    system, it stays in the folder under a hidden name. Raises FileNotFoundError when it is gone.
    """
    source = os.path.join(folder, name)
    make_folder(place)
    target = os.path.join(place, free_name(place, kind + name))
    if os.path.islink(source):
        leads = os.path.join(os.path.dirname(source), os.readlink(source))
        os.symlink(os.path.relpath(leads, place), target)
        os.unlink(source)
    else:
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            target = os.path.join(folder, free_name(folder, "." + kind + name))
            os.rename(source, target)
    sync_folder(folder)
    sync_folder(place)
    return target


def kept_aside(folder: str, place: str) -> Dict[str, str]:
    """What was set aside, by name, with its path: in `place`, and by older versions in the
    folder."""
    found: Dict[str, str] = {}
    for where, hidden in ((place, ""), (folder, "."), (folder, "")):
        try:
            names = os.listdir(where)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            if name.startswith(tuple(hidden + kind for kind in KINDS)):
                found.setdefault(name.lstrip("."), os.path.join(where, name))
    return found


def original_name(name: str) -> str:
    """The name that something set aside had in the checkpoint folder."""
    plain = re.sub(r"\A(?:interrupted|aside)-", "", name)
    return re.sub(r"\.\d+\Z", "", plain)


def note_act(place: str, act: Dict[str, Any]) -> None:
    """Record what a person decided about the folder, before it is done."""
    make_folder(place)
    append_record(os.path.join(place, ACTS), act)


def acts(place: str) -> List[Dict[str, Any]]:
    """What people decided about the folder, oldest first."""
    try:
        return read_records(os.path.join(place, ACTS))
    except (OddFile, NotADirectoryError):
        return []


def last_act(place: str) -> Optional[Dict[str, Any]]:
    """The last decision to go back (`checkpoint use`), None when nobody ever did."""
    found = [act for act in acts(place) if act.get("event") == "use"]
    return found[-1] if found else None
