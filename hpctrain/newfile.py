"""A new file appears whole or not at all, and never takes the place of another one."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile

from hpctrain.errors import EnvironmentFault, Refused
from hpctrain.runtime.files import sync_folder

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
        os.chmod(temp, 0o666 & ~umask())
        _give_name(temp, path)
        sync_folder(folder)
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


def umask() -> int:
    """This process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
