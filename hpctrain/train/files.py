"""Files of the trainers that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile

from hpctrain.runtime.files import share_with_group, sync_folder, write_all


def write_whole(path: str, content: bytes) -> None:
    """Replace `path` by `content`, making its folder: after a crash at any instant the old or the new is there.

    A symbolic link at `path` is replaced, never written through. Raises OSError when the disk refuses.
    """
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)[:80]}.", dir=folder)
    try:
        try:
            write_all(handle, content)
            os.fchmod(handle, 0o644)
            share_with_group(handle, folder)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(folder)


def open_to_readers(folder: str) -> None:
    """Let everyone who may enter `folder` read its files: safetensors writes them for their owner alone (0600)."""
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
