"""Files that survive a crash: atomic replacement, append-only records, and directories that are read once."""

import errno
import json
import os
import socket
import stat
from typing import Any, Dict, List, NamedTuple, Optional


def write_atomic(path: str, text: str) -> None:
    """Replace `path` by `text`: after a crash at any instant the old or the new content is there, never a part.

    Writes beside it, syncs and renames. A symbolic link at `path` is replaced, never written through. The group may
    write what it may write in the folder, as on the shared project folders of a centre.
    """
    folder = os.path.dirname(path) or "."
    temp = os.path.join(folder, ".{}.hpctrain-{}-{}".format(os.path.basename(path), socket.gethostname(), os.getpid()))
    _remove_if_there(temp)
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        try:
            write_all(fd, text.encode("utf-8"))
            share_with_group(fd, folder)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temp, path)
    except BaseException:
        _remove_if_there(temp)
        raise
    sync_folder(folder)


def write_all(fd: int, content: bytes) -> None:
    """Write every byte, or raise OSError."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: str) -> None:
    """Make a rename, link or removal in `folder` last; file systems that cannot sync a folder are let be."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(fd)


def share_with_group(fd: int, folder: str) -> None:
    """Give the group of a new file the rights that the folder's group has, whatever the umask."""
    if os.stat(folder).st_mode & stat.S_IWGRP:
        mode = stat.S_IMODE(os.fstat(fd).st_mode) | stat.S_IRGRP | stat.S_IWGRP
        try:
            os.fchmod(fd, mode)
        except OSError:
            pass  # a file system without permissions; the content matters more


def make_folder(path: str) -> List[str]:
    """Make `path` and its missing parents, each with the group bits and group of the folder above; returns those made."""
    missing = []
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    made = []
    for folder in reversed(missing):
        above = os.stat(os.path.dirname(folder) or ".")
        try:
            os.mkdir(folder)
        except FileExistsError:
            continue  # another process was faster
        made.append(folder)
        if above.st_gid != os.stat(folder).st_gid:
            try:
                os.chown(folder, -1, above.st_gid)
            except OSError:
                pass  # not a member of that group
        kept = stat.S_ISGID | stat.S_IRWXG
        mode = stat.S_IMODE(os.stat(folder).st_mode) & ~stat.S_IRWXG | (above.st_mode & kept)
        try:
            os.chmod(folder, mode)
        except OSError:
            pass
    return made


def append_record(path: str, record: Dict[str, Any]) -> None:
    """Add one JSON object as one line, with a single O_APPEND write that is synced before this returns.

    A line that an earlier crash left torn is closed first, so that it spoils only itself.
    """
    folder = os.path.dirname(path) or "."
    is_new = not os.path.exists(path)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(fd).st_size
        if is_new:
            share_with_group(fd, folder)
        line = json.dumps(record, ensure_ascii=False, sort_keys=False).encode("utf-8", "backslashreplace") + b"\n"
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        write_all(fd, line)
        os.fsync(fd)
    finally:
        os.close(fd)
    if is_new:
        sync_folder(folder)


def read_records(path: str) -> List[Dict[str, Any]]:
    """The records of an append-only file, oldest first; torn or foreign lines are left out, no file is no records."""
    try:
        with open(path, "rb") as stream:
            content = stream.read()
    except FileNotFoundError:
        return []
    records = []
    for line in content.split(b"\n"):
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class FileInfo(NamedTuple):
    """What one stat says of a file."""

    size: int
    mtime_ns: int


class Listing:
    """Directories as they were when first looked at: none is listed twice and no file is stat'ed twice.

    A metadata server under load answers in milliseconds, and a checkpoint has thousands of files.
    """

    def __init__(self) -> None:
        self._entries: Dict[str, Dict[str, os.DirEntry[str]]] = {}
        self._files: Dict[str, Dict[str, FileInfo]] = {}

    def entries(self, folder: str) -> Dict[str, "os.DirEntry[str]"]:
        """The entries of `folder` by name; raises OSError (FileNotFoundError where there is no folder)."""
        if folder not in self._entries:
            with os.scandir(folder) as scan:
                self._entries[folder] = {entry.name: entry for entry in scan}
        return self._entries[folder]

    def files(self, folder: str) -> Dict[str, FileInfo]:
        """Size and time of the files of `folder` (links to files included), by name; a dangling link has size -1."""
        if folder not in self._files:
            found = {}
            for name, entry in self.entries(folder).items():
                try:
                    if entry.is_dir():
                        continue
                    info = entry.stat()
                except FileNotFoundError:
                    found[name] = FileInfo(-1, 0)
                    continue
                found[name] = FileInfo(info.st_size, info.st_mtime_ns)
            self._files[folder] = found
        return self._files[folder]

    def tree(self, folder: str, depth: int = 2) -> Dict[str, FileInfo]:
        """The files of `folder` and of its folders down to `depth` more levels, by relative path."""
        found = dict(self.files(folder))
        if depth > 0:
            for name, entry in self.entries(folder).items():
                if entry.is_dir():
                    below = self.tree(os.path.join(folder, name), depth - 1)
                    found.update({os.path.join(name, path): info for path, info in below.items()})
        return found


def read_text(path: str, limit: int = 65536) -> Optional[str]:
    """The text of a small file, None where there is none; undecodable bytes are kept as escapes."""
    try:
        with open(path, "rb") as stream:
            return stream.read(limit).decode("utf-8", "backslashreplace")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def free_name(folder: str, wanted: str) -> str:
    """`wanted`, or `wanted.2`, `wanted.3` …: the first name that nothing in `folder` has."""
    name, count = wanted, 1
    while os.path.lexists(os.path.join(folder, name)):
        count += 1
        name = "{}.{}".format(wanted, count)
    return name


def _remove_if_there(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
