"""Processes forked from one that has imported the frameworks already: a rank costs milliseconds,
not an import."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

FORK = multiprocessing.get_context("fork")
START_TIME_S = 300
PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """A rank raised, ended or did not answer in time; the text says what."""


class Team:
    """`num_ranks` processes in one gloo group (none for a single rank), each of which answers
    requests in its turn.

    `make(rank)` is called once in each process and gives the function that answers. Answers are
    ("ok", value) or ("raises", text). After a failure in a group of several the processes are no
    longer in step: it must be ended.
    """

    def __init__(self, num_ranks: int, make: Callable[[int], Callable[..., Any]], log: str) -> None:
        self.num_ranks = num_ranks
        self.ended = False
        self._meeting = tempfile.mkdtemp(prefix="ranks-")
        self._ends: list[Connection] = []
        self._processes = []
        port = _free_port()
        for rank in range(num_ranks):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(
                target=_serve, args=(rank, num_ranks, port, self._meeting, make, theirs, ours, log)
            )
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def ask(self, *request: Any, timeout_s: float = START_TIME_S) -> list[tuple[str, Any]]:
        """The answers of all ranks, in their order; a rank that hangs because another failed gets
        ("raises", "hangs")."""
        for end in self._ends:
            try:
                end.send(request)
            except OSError:
                pass  # seen below as an end
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.num_ranks:
            left = deadline - time.monotonic()
            waiting = [end for rank, end in enumerate(self._ends) if rank not in answers]
            ready = wait(waiting, timeout=max(left, 0))
            if not ready:
                break
            for end in ready:
                rank = self._ends.index(end)
                try:
                    answers[rank] = end.recv()
                except (EOFError, OSError):
                    answers[rank] = ("raises", "the process ended")
                if answers[rank][0] != "ok":
                    # the others may wait for it for ever
                    deadline = min(deadline, time.monotonic() + 0.05)
        all_answers = [answers.get(rank, ("raises", "hangs")) for rank in range(self.num_ranks)]
        if self.num_ranks > 1 and any(kind != "ok" for kind, _ in all_answers):
            self.end()
        if any(
            text in ("the process ended", "hangs")
            for _, text in all_answers
            if isinstance(text, str)
        ):
            self.end()
        return all_answers

    def end(self) -> None:
        if self.ended:
            return
        self.ended = True
        for end in self._ends:
            end.close()
        for process in self._processes:
            with contextlib.suppress(OSError):  # each leads a group, for what it started itself
                os.killpg(process.pid or 0, signal.SIGKILL)
        for process in self._processes:
            process.join()
        shutil.rmtree(self._meeting, ignore_errors=True)


def run(num_ranks: int, function: Callable[[int], Any], log: str) -> list[Any]:
    """`function(rank)` in each of `num_ranks` processes; raises Failed with what the first one
    said."""
    team = Team(num_ranks, lambda rank: lambda: function(rank), log)
    try:
        answers = team.ask()
    finally:
        team.end()
    texts = [text for kind, text in answers if kind != "ok"]
    if texts:
        raise Failed(next((text for text in texts if text != "hangs"), texts[0]))
    return [value for _, value in answers]


def _serve(
    rank: int,
    num_ranks: int,
    port: int,
    meeting: str,
    make: Callable[[int], Callable[..., Any]],
    end: Connection,
    other_end: Connection,
    log: str,
) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    other_end.close()
    _become_quiet(log)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if num_ranks > 1:
        os.environ.update(environment(rank, num_ranks, port))
    answer: Callable[..., Any] | None = None
    while True:
        try:
            request = end.recv()
        except EOFError:
            os._exit(0)
        try:
            if answer is None:
                if num_ranks > 1:
                    _join(rank, num_ranks, meeting)
                answer = make(rank)
            reply = ("ok", answer(*request))
        except BaseException as error:  # a framework may even call sys.exit
            traceback.print_exc()
            words = str(error).strip().splitlines() or [""]
            reply = ("raises", f"{type(error).__name__}: {words[0][:300]}")
        sys.stdout.flush()
        end.send(reply)


def environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _join(rank: int, num_ranks: int, meeting: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=num_ranks
    )


def _become_quiet(log: str) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
