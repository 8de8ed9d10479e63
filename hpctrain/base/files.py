"""Files appear whole or not at all, and a new one never takes the place of another."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from hpctrain.base.errors import EnvironmentFault, Refused
from hpctrain.runtime.files import replace_atomic, sync_folder

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write_new(path: str, text: str, hint: str = "") -> None:
    """Make the file `path`, and its folders. A crash leaves either nothing or the whole file under
    that name.

    Raises Refused when anything has that name already, a dangling symlink too; EnvironmentFault
    when it cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    except OSError as error:
        raise disk_fault(error, path) from error
    if os.path.lexists(path):
        raise Refused("is there already, and is left as it is", where=path, hint=hint)
    with temporaries(path) as (temp,):
        temp.file.write(text.encode("utf-8"))
        if not temp.commit_new():
            raise Refused("was made by someone else at this moment", where=path, hint=hint)


def _give_name(temp: str, path: str) -> None:
    try:
        os.link(temp, path)  # unlike rename, never replaces what is there
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # A file system without hard links: reserve the name, then fill it by a rename.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(temp, path)


def umask() -> int:
    """This process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_whole(path: str, content: bytes) -> None:
    """`replace_atomic`, which makes the folder too. Raises OSError when the disk refuses."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    replace_atomic(path, content)


def open_to_readers(folder: str) -> None:
    """Let everyone who may enter `folder` read its files: safetensors writes them for their owner
    alone (0600)."""
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            os.chmod(entry.path, 0o644)


def sync(path: str) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_TEMP = ".tmp-"


class Temp:
    """A file being written under a temporary name next to `path`; `commit` makes it `path`,
    `discard` removes it."""

    def __init__(self, path: str):
        self.path = path
        host = os.uname().nodename.split(".")[0]
        # The name tells who writes it, so that leftovers of the dead can be told from files being
        # written.
        prefix = f"{os.path.basename(path)}{_TEMP}{host}-{os.getpid()}.{_start_ticks(os.getpid())}-"
        handle, self.temp_path = tempfile.mkstemp(prefix=prefix, dir=os.path.dirname(path) or ".")
        os.chmod(self.temp_path, 0o666 & ~umask())
        self.file: IO[bytes] = os.fdopen(handle, "w+b", buffering=1 << 20)

    def sync(self) -> None:
        """Everything written is on the disk."""
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def commit(self) -> None:
        """`path` is this file now, whatever was there."""
        self.sync()
        os.replace(self.temp_path, self.path)
        sync_folder(os.path.dirname(self.path) or ".")

    def commit_new(self) -> bool:
        """`path` is this file now, unless there was one: then False, and nothing changed. The
        temporary file stays."""
        self.sync()
        try:
            _give_name(self.temp_path, self.path)
        except FileExistsError:
            return False
        sync_folder(os.path.dirname(self.path) or ".")
        return True

    def discard(self) -> None:
        """No trace is left (unless the process is killed right here)."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            os.unlink(self.temp_path)


@contextlib.contextmanager
def temporaries(*names: str) -> Iterator[list[Temp]]:
    """Temporary files for `names`, discarded at the end unless committed. Errors of the disk become
    EnvironmentFault."""
    made: list[Temp] = []
    try:
        for name in names:
            made.append(Temp(name))
        yield made
    except OSError as error:
        raise disk_fault(error, names[0]) from error
    finally:
        for temp in made:
            temp.discard()


def disk_fault(error: OSError, path: str) -> EnvironmentFault:
    """What to say when writing failed."""
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = (
            "nothing partial was left behind; free some space or quota and run the same command"
            " again"
        )
    return EnvironmentFault(f"cannot be written: {error.strerror or error}", where=path, hint=hint)


def to_json_bytes(data: Any) -> bytes:
    """`data` as JSON; file names that are not UTF-8 keep their bytes."""
    return json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"


def write_json(path: str, data: Any) -> None:
    """`path` holds `data` as JSON, atomically."""
    with temporaries(path) as (temp,):
        temp.file.write(to_json_bytes(data))
        temp.commit()


def read_json(path: str) -> dict[str, Any] | None:
    """The JSON object in `path`; None when there is none or it cannot be read as one."""
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read().decode("utf-8", "surrogateescape"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def sha256_of(path: str) -> str:
    """The checksum of a file's content, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def make_folder(path: str) -> None:
    """`path` is a real folder of ours. Raises Refused when it is a symlink, EnvironmentFault when
    it cannot be made."""
    if os.path.islink(path):
        raise Refused("is a symlink; hpctrain does not write through one", where=path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise disk_fault(error, path) from None


def remove(path: str) -> None:
    """`path` is not there (a symlink goes, its target stays)."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def lock(path: str) -> Iterator[None]:
    """One process at a time, over all nodes of a shared file system; released when the process
    dies.

    Waits up to a minute. Where the file system has no locks, goes on without: the callers' steps
    are safe by themselves.
    """
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break
                if time.monotonic() > deadline:
                    raise Refused(
                        "another hpctrain is finishing this dataset", where=path
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def sweep(*paths: str) -> None:
    """Remove what dead writers of these files left beside them: a merge that was killed may have
    left as much as the dataset."""
    for path in paths:
        for left in leftovers(os.path.dirname(path) or ".", os.path.basename(path)):
            remove(left)


def leftovers(folder: str, start: str, max_age_s: float = 86400.0) -> list[str]:
    """Temporary files in `folder` beginning with `start` whose writer is dead (on this host) or
    that are old."""
    found = []
    host = os.uname().nodename.split(".")[0]
    for name in os.listdir(folder):
        base, mark, writer = name.partition(_TEMP)
        if not mark or not base.startswith(start):
            continue
        path = os.path.join(folder, name)
        pid, _, ticks = (
            writer[len(host) + 1 :].split("-")[0].partition(".")
            if writer.startswith(host + "-")
            else ("", "", "")
        )
        with contextlib.suppress(OSError):
            age_s = time.time() - os.lstat(path).st_mtime
            if age_s > max_age_s or (pid.isdigit() and _start_ticks(int(pid)) != ticks):
                found.append(path)
    return found


def _start_ticks(pid: int) -> str:
    """When a process of this host began, in clock ticks after boot (proc(5), field 22 of stat);
    empty when there is none.

    A number that died may be given to another process; the moment it began tells the two apart.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""
