"""Feeds log files to an engine: whole, or as they grow. The only part of triage that touches files
and the clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator

from hpctrain.base.errors import EnvironmentFault
from hpctrain.triage.engine import Engine
from hpctrain.triage.scan import CHUNK


def read_logs(
    engine: Engine,
    paths: Iterable[str],
    on_bytes: Callable[[int], None] | None = None,
    unreadable: list[str] | None = None,
) -> None:
    """Read each file to its end, in fixed memory.

    One that cannot be read is told in `unreadable`, and the others are read; without that list it
    raises EnvironmentFault.
    """
    for path in paths:
        reader = engine.log(path)
        try:
            with open(path, "rb", buffering=0) as file:
                reader.modified_s = os.fstat(file.fileno()).st_mtime
                while True:
                    piece = file.read(CHUNK)
                    if not piece:
                        break
                    reader.feed(piece)
                    if on_bytes:
                        on_bytes(len(piece))
        except OSError as error:
            if unreadable is not None:
                unreadable.append(f"{path}: {error.strerror}")
                continue
            raise EnvironmentFault(f"cannot read `{path}`: {error.strerror}") from error
        reader.close()


class Follower:
    """Reads what was added to a set of logs that may grow, appear, be truncated or replaced.

    `list_paths` is asked at each look, so new logs of a chain are taken in.
    """

    def __init__(self, engine: Engine, list_paths: Callable[[], list[str]]):
        self._engine, self._list = engine, list_paths
        self._seen: dict[str, tuple[int, int]] = {}  # path -> (inode, bytes read)
        self._first_look = True

    def look(self) -> int:
        """Read everything new; returns how many bytes that was."""
        total = 0
        for path in self._list():
            total += self._read_new(path)
        self._first_look = False
        return total

    def _read_new(self, path: str) -> int:
        total = 0
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                inode, offset = self._seen.get(path, (status.st_ino, 0))
                reader = self._engine.log(path)
                if inode != status.st_ino or status.st_size < offset:
                    offset = 0  # replaced or truncated: what is there now is all new
                file.seek(offset)
                # What was there at the first look was written at times we do not know.
                now_s = (
                    None
                    if self._first_look or offset == 0 and total == 0 and path not in self._seen
                    else time.time()
                )
                while True:
                    piece = file.read(CHUNK)
                    if not piece:
                        break
                    reader.feed(piece, now_s)
                    total += len(piece)
                reader.modified_s = status.st_mtime
                self._seen[path] = (status.st_ino, offset + total)
        except OSError:
            return total  # a log that is gone or not there yet has nothing new
        return total


def follow(
    follower: Follower, every_s: float = 5.0, stop: Callable[[], bool] = lambda: False
) -> Iterator[int]:
    """Look again and again; yields the new bytes of each look (0 when nothing came)."""
    while not stop():
        yield follower.look()
        time.sleep(every_s)
