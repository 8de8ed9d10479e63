"""What the tasks of a rehearsal tell, read from their pipe while they run."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hpctrain.sandbox.rehearse.shims import END, FIELD

Fields = dict[str, str]


@dataclass
class Attempt:
    """One start of the step: a job, and how often it had been requeued. `events` are rank 0's, with
    the time they came."""

    job_id: str
    restart: int
    tasks: list[Fields] = field(default_factory=list)
    events: list[tuple[float, Fields]] = field(default_factory=list)
    ready: bool = False
    begun: float = 0.0
    heard: float = 0.0

    def moments(self) -> list[float]:
        """When something was heard of it."""
        return [self.begun, self.heard, *(moment for moment, _ in self.events)]

    def last(self, name: str) -> Fields | None:
        """The newest event of that name."""
        return next(
            (fields for _, fields in reversed(self.events) if fields.get("event") == name), None
        )


class Pipe:
    """Reads the pipe in a thread of its own; `attempts` may be looked at from another one under
    `lock`."""

    def __init__(self, folder: str, on_ready: Callable[[Attempt], None]) -> None:
        self._path = os.path.join(folder, "records")
        self._on_ready = on_ready
        self.lock = threading.Lock()
        self.attempts: dict[tuple[str, int], Attempt] = {}
        # Both ends, so that it stays open between two tasks.
        self._pipe = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and give the pipe back."""
        os.write(self._pipe, b"\0" + END.encode())
        self._thread.join(10)
        os.close(self._pipe)

    def _read(self) -> None:
        rest = b""
        while True:
            rest += os.read(self._pipe, 1 << 16)
            *whole, rest = rest.split(END.encode())
            for record in whole:
                if record.endswith(b"\0"):
                    return
                self._take(record.decode("utf-8", "surrogateescape"))

    def _take(self, text: str) -> None:
        fields = dict(part.partition("=")[::2] for part in text.split(FIELD))
        restart = fields.get("SLURM_RESTART_COUNT", "")
        key = fields.get("SLURM_JOB_ID", ""), int(restart) if restart.isdigit() else 0
        with self.lock:
            attempt = self.attempts.setdefault(key, Attempt(*key, begun=time.monotonic()))
            if fields.get("event") != "task":
                attempt.events.append((time.monotonic(), fields))
                return
            attempt.tasks.append(fields)
            attempt.heard = time.monotonic()
            if not attempt.ready and len(attempt.tasks) == expected_tasks(fields):
                attempt.ready = True
                self._on_ready(attempt)


class Slots:
    """How many tasks may be on their way from their start to their record: some for each core of
    this machine."""

    PER_CORE = 32

    def __init__(self, folder: str) -> None:
        # Both ends: what is in a pipe is gone when nobody has it open.
        self._pipe = os.open(
            os.path.join(folder, "slots"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        )
        self._seen = -1

    def give(self, num_tasks: int) -> None:
        """To be called now and then with the number of records so far: where nothing has come,
        slots were lost."""
        if num_tasks == self._seen:
            with contextlib.suppress(BlockingIOError):
                os.write(self._pipe, b"\n" * self.PER_CORE * (os.cpu_count() or 1))
        self._seen = num_tasks

    def close(self) -> None:
        os.close(self._pipe)


def release(folder: str) -> None:
    """Let tasks go that came to wait for rank 0 only after its end: they hang in opening a pipe
    that nobody writes (fifo(7))."""
    os.close(os.open(os.path.join(folder, "hold"), os.O_RDWR | os.O_CLOEXEC))


def expected_tasks(task: Fields) -> int:
    """How many tasks the step of this one has, as srun told it."""
    text = task.get("SLURM_STEP_NUM_TASKS") or task.get("SLURM_NTASKS") or ""
    return int(text) if text.isdigit() else 0
