"""Reads the little that is needed of files, and waits only so long for a file system."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

from hpctrain.base.errors import Problem

LIMIT_S = 10.0  # without an answer; a parallel file system under load takes a second or two
MAX_BYTES = 8 << 20  # of all files together
MAX_JSON_BYTES = 1 << 20


class Reader:
    """Reads at most `budget` bytes in all, and knows which path it is at."""

    def __init__(self, budget: int = MAX_BYTES) -> None:
        self.left, self.at, self.steps = budget, "", 0

    def turn_to(self, path: str) -> None:
        """Say what is asked of the file system next."""
        self.at, self.steps = path, self.steps + 1

    def exists(self, path: str) -> bool:
        """Whether there is anything of this name."""
        self.turn_to(path)
        return os.path.exists(path)

    def size(self, path: str) -> int | None:
        """Bytes of a file, None where there is none."""
        self.turn_to(path)
        try:
            return os.stat(path).st_size if os.path.isfile(path) else None
        except OSError:
            return None

    def read(self, path: str, start: int, count: int) -> bytes:
        """At most `count` bytes, less where the budget or the file ends. Raises OSError."""
        self.turn_to(path)
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(min(count, self.left))
        self.left -= len(data)
        return data

    def json(self, path: str) -> dict[str, Any] | None:
        """A JSON object of a file; None where there is none that can be read."""
        size = self.size(path)
        if size is None or size > min(MAX_JSON_BYTES, self.left):
            return None
        try:
            found = json.loads(self.read(path, 0, size))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def names(self, folder: str) -> list[str]:
        """What a folder holds, nothing where it cannot be read."""
        self.turn_to(folder)
        try:
            return sorted(os.listdir(folder))
        except OSError:
            return []


def waited(
    reader: Reader, find: Callable[[], Iterable[Problem]], limit_s: float = LIMIT_S
) -> list[Problem]:
    """What `find` finds while the file system answers; once it does not for `limit_s`, that too.

    Raises what `find` raises.
    """
    found: list[Problem] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for problem in find():
                found.append(problem)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    steps = -1
    while thread.is_alive() and steps != reader.steps:
        steps = reader.steps
        thread.join(limit_s)
    if failed:
        raise failed[0]
    if not thread.is_alive():
        return found
    what = f"`{reader.at}` does not answer within {limit_s:g} s, and nothing more was looked at"
    why = "the file system is slow or hangs; a job there would wait as well"
    return [*found, Problem(what, why=why, level="warning")]


def environment(name: str) -> str:
    """A variable of this shell, empty where it is not set."""
    return os.environ.get(name, "")
