"""A new file appears whole or not at all, and never takes the place of another one."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile

from hpctrain.errors import EnvironmentFault, Refused

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write_new(path: str, text: str, hint: str = "") -> None:
    """Make the file `path`, and its folders. A crash leaves either nothing or the whole file under that name.

    Raises Refused when anything has that name already, a dangling symlink too; EnvironmentFault when it cannot be written.
    """
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.lexists(path):
            raise Refused("is there already, and is left as it is", where=path, hint=hint)
        handle, temp = tempfile.mkstemp(prefix=f".{os.path.basename(path)[:100]}.", dir=folder)
    except OSError as error:
        raise EnvironmentFault(f"cannot be written: {error.strerror}", where=path) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temp, 0o666 & ~_umask())
        _give_name(temp, path)
        _sync_folder(folder)
    except FileExistsError as error:
        raise Refused("was made by someone else at this moment", where=path, hint=hint) from error
    except OSError as error:
        raise EnvironmentFault(f"cannot be written: {error.strerror}", where=path) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)


def _give_name(temp: str, path: str) -> None:
    try:
        os.link(temp, path)  # unlike rename, never replaces what is there
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # A file system without hard links: reserve the name, then fill it by a rename.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(temp, path)


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
