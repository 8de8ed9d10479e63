"""A copy of the prepared data on each node's own disk, made by the node's first task and checked by
hash. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import stat
from collections.abc import Callable

from hpctrain.base.errors import EnvironmentFault
from hpctrain.base.files import sha256_of
from hpctrain.base.units import format_size

_CHUNK = 1 << 22
_SPARE = 1.02


def node_name() -> str:
    """This node as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def stage(source: str, sha256: str, folder: str, say: Callable[[str], None]) -> str:
    """A copy of `source` in `folder`, whose content has this hash; its path.

    The source is hashed while it is read, and the copy is read back from the disk. A copy that an
    earlier attempt of the job left there is used when its hash is right. Raises EnvironmentFault,
    which names the node, when there is no space, when the source is not what it was, and when the
    disk gives back something else.
    """
    node = node_name()
    target = os.path.join(folder, os.path.basename(source))
    try:
        _own_folder(folder)
        size = os.path.getsize(source)
        if (
            os.path.isfile(target)
            and not os.path.islink(target)
            and os.path.getsize(target) == size
            and sha256_of(target) == sha256
        ):
            return target
        free = shutil.disk_usage(folder).free
        if free < size * _SPARE:
            raise EnvironmentFault(
                f"node {node} has {format_size(free)} free in {os.path.dirname(folder)}, and the"
                f" data takes {format_size(size)}",
                where=folder,
                hint="`recipe_options: {stage: none}` reads it from the shared file system",
            )
        temporary = f"{target}.part"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        read = _copy(source, temporary)
        if read != sha256:
            os.unlink(temporary)
            raise EnvironmentFault(
                f"node {node} read data that is not what was prepared",
                where=source,
                why=f"sha256 {read[:16]}…, expected {sha256[:16]}…",
                hint="delete its folder; the next start prepares it again",
            )
        written = sha256_of(temporary)
        if written != sha256:
            os.unlink(temporary)
            raise EnvironmentFault(
                f"the disk of node {node} gives back other data than was written",
                where=folder,
                why=f"sha256 {written[:16]}…, expected {sha256[:16]}…",
                hint=f"sbatch: {{exclude: {node}}}, and tell the site",
            )
        os.rename(temporary, target)
    except OSError as error:
        raise EnvironmentFault(
            f"node {node} cannot stage the data: {error.strerror or error}", where=folder
        ) from error
    say(f"data staged to {folder} ({format_size(size)}, sha256 {sha256[:16]}…)")
    return target


def clear(path: str) -> None:
    """Remove a copy that `stage` made, and its folder when that is empty then. Never raises."""
    with contextlib.suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))


def _own_folder(folder: str) -> None:
    """Make it, for this user alone; a name that others can write in could be theirs or a link."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EnvironmentFault(f"`{folder}` on node {node_name()} is no folder of this user")


def _copy(source: str, target: str) -> str:
    """Copy and sync; the hash of what was read."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
        if hasattr(os, "posix_fadvise"):
            # So that the check reads the disk, not the pages that were just written.
            os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()
