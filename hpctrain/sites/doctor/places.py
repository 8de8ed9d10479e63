"""Disks, quotas, inodes, caches and working copies: looked at, and a cache by really writing a file
that is removed again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from hpctrain.base.units import format_size
from hpctrain.sites.doctor.findings import NOT_SEEN, OK, PROBLEM, WARNING, Finding

# Where packages write without being asked, and what they take when the variable is not set.
CACHES = (
    ("HF_HOME", "~/.cache/huggingface"),
    ("TORCH_HOME", "~/.cache/torch"),
    ("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions"),
    ("TRITON_CACHE_DIR", "~/.triton/cache"),
    ("PIP_CACHE_DIR", "~/.cache/pip"),
    ("SINGULARITY_CACHEDIR", "~/.singularity/cache"),
    ("TMPDIR", "/tmp"),
)
_FULL, _ALMOST_FULL = 0.98, 0.9
_LFS = re.compile(
    r"^\s*(\d+)\*?\s+(\d+)\s+(\d+)\s+(?:-|\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\s", re.MULTILINE
)


def disks(paths: Mapping[str, str], needed_gib: float = 1.0) -> Iterator[Finding]:
    """Free space and inodes of the file systems under `paths` (what -> path), and Lustre's quota
    where `lfs` is here."""
    for what, path in paths.items():
        here = nearest_existing(path)
        if here is None:
            yield Finding("disk", what, NOT_SEEN, f"{path} is not on this machine")
            continue
        facts = os.statvfs(here)
        free, total = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
        inodes = facts.f_favail / facts.f_files if facts.f_files else 1.0
        text = f"{format_size(free)} of {format_size(total)} free at {here}"
        if free < needed_gib * 1024**3 or (facts.f_files and inodes < 1 - _FULL):
            yield Finding(
                "disk",
                what,
                PROBLEM,
                text + (f", {100 * inodes:.0f}% of the inodes" if inodes < 0.1 else ""),
                "free space, or use another file system",
            )
        else:
            yield Finding("disk", what, OK, text)
        yield from _lustre_quota(what, here)


def _lustre_quota(what: str, path: str) -> Iterator[Finding]:
    if not shutil.which("lfs"):
        return
    try:
        said = subprocess.run(
            ["lfs", "quota", "-q", "-u", str(os.getuid()), path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    yield from judge_quota(what, said)


def judge_quota(what: str, said: str) -> Iterator[Finding]:
    """The answer of `lfs quota -q`: KiB used, soft and hard limit, grace, then the same of files. A
    limit of 0 is none."""
    found = _LFS.search(re.sub(r"^\s*/\S+", "", said, flags=re.MULTILINE))
    if not found:
        return
    used, soft, hard, files, soft_files, hard_files = map(int, found.groups())
    for name, value, limit in (
        ("space", used, hard or soft),
        ("files", files, hard_files or soft_files),
    ):
        if not limit:
            continue
        share = value / limit
        shown = (
            f"{format_size(value * 1024)} of {format_size(limit * 1024)}"
            if name == "space"
            else f"{value:,} of {limit:,} files"
        )
        result = WARNING if share > _ALMOST_FULL else OK
        if share > _FULL:
            result = PROBLEM
        yield Finding(
            "disk",
            f"{what} quota, {name}",
            result,
            f"{shown} used ({100 * share:.0f}%)",
            "delete or move something" if result != OK else "",
        )


def caches(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether each cache folder can really be written, and a warning for those in the home
    directory."""
    home = os.path.expanduser("~")
    for name, fallback in CACHES:
        value = environ.get(name) or os.path.expanduser(fallback)
        here = nearest_existing(value)
        if here is None:
            yield Finding("caches", name, NOT_SEEN, f"{value} is not on this machine")
        elif not _writable(here):
            yield Finding(
                "caches",
                name,
                PROBLEM,
                f"{value} cannot be written",
                f"export {name}=… to a folder of yours on scratch",
            )
        elif value.startswith(home + os.sep) and name != "TMPDIR" and _small(home):
            yield Finding(
                "caches",
                name,
                WARNING,
                f"{value} is in the home directory, which is small",
                f"export {name}=… to a folder on scratch",
            )
        else:
            yield Finding(
                "caches",
                name,
                OK,
                f"{value} can be written" + ("" if environ.get(name) else ", the default"),
            )


def _small(home: str) -> bool:
    facts = os.statvfs(nearest_existing(home) or "/")
    return facts.f_blocks * facts.f_frsize < 100 * 1024**3


def _writable(folder: str) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError:
        return False
    return True


def nearest_existing(path: str) -> str | None:
    """The path, or the nearest folder above it that is there; None for a root that is not (a site's
    /scratch seen from a laptop)."""
    path = os.path.abspath(os.path.expanduser(path))
    top = "/" + path.split("/")[1] if path.count("/") else path
    if not os.path.exists(top):
        return None
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def working_copy(path: str, branch: str | None) -> Iterator[Finding]:
    """The git branch a recipe requires, the commit, and whether there are changes that no commit
    holds."""
    if not os.path.isdir(path):
        yield Finding("code", "working copy", NOT_SEEN, f"{path} is not on this machine")
        return
    head = _git(path, "rev-parse", "--abbrev-ref", "HEAD")
    if head is None:
        yield Finding(
            "code", "working copy", WARNING, f"{path} is no git working copy, or git is not here"
        )
        return
    commit = _git(path, "rev-parse", "--short", "HEAD") or "?"
    if branch and head != branch:
        yield Finding(
            "code",
            "branch",
            PROBLEM,
            f"{path} is on `{head}` ({commit}); the recipe needs `{branch}`",
            f"git -C {path} checkout {branch}",
        )
    else:
        yield Finding("code", "branch", OK, f"{path} is on `{head}` ({commit})")
    changes = (_git(path, "status", "--porcelain", "--untracked-files=no") or "").splitlines()
    if changes:
        yield Finding(
            "code",
            "changes",
            WARNING,
            f"{len(changes)} files of {path} differ from the commit",
            "commit them, so that a run can be repeated",
        )


def _git(path: str, *words: str) -> str | None:
    argv: Sequence[str] = ["git", "-C", path, *words]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
