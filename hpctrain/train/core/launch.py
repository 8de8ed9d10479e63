"""What the rendered script tells a rank through its environment, and how long the ranks run
together."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

from hpctrain.base.errors import Problem, UsageError

MODES = ("scratch", "finetune", "resume")


@dataclass(frozen=True)
class Launch:
    """One rank's place and orders. `checkpoint` is the directory to start from, empty in mode
    scratch."""

    rank: int
    local_rank: int
    num_ranks: int
    mode: str
    config: str
    checkpoint_dir: str
    checkpoint: str
    run_dir: str
    link: int

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Launch:
        """Read RANK, LOCAL_RANK, WORLD_SIZE and HPCTRAIN_*; one rank on this machine when RANK is
        absent.

        Raises UsageError with everything that is missing or contradicts.
        """
        problems = []

        def number(name: str, default: int) -> int:
            text = env.get(name, str(default))
            if not text.isdigit():
                problems.append(Problem(f"`{name}={text}` is not a number", where="environment"))
                return default
            return int(text)

        mode = env.get("HPCTRAIN_MODE", "")
        if mode not in MODES:
            problems.append(
                Problem(
                    f"`HPCTRAIN_MODE={mode}` is none of {', '.join(MODES)}", where="environment"
                )
            )
        for name in ("HPCTRAIN_CONFIG", "HPCTRAIN_CHECKPOINT_DIR"):
            if not env.get(name):
                problems.append(
                    Problem(
                        f"`{name}` is not set",
                        where="environment",
                        hint="the rendered job.sbatch sets it",
                    )
                )
        checkpoint = env.get("HPCTRAIN_CHECKPOINT", "") if mode != "scratch" else ""
        if mode in ("finetune", "resume") and not os.path.isdir(checkpoint):
            what = f"`HPCTRAIN_CHECKPOINT={checkpoint}` is not a directory"
            problems.append(
                Problem(what, where="environment", why=f"mode {mode} starts from a checkpoint")
            )
        rank, num_ranks = number("RANK", 0), number("WORLD_SIZE", 1)
        if rank >= num_ranks:
            problems.append(
                Problem(f"`RANK={rank}` is not below `WORLD_SIZE={num_ranks}`", where="environment")
            )
        if num_ranks > 1 and not (env.get("MASTER_ADDR") and env.get("MASTER_PORT")):
            problems.append(
                Problem("`MASTER_ADDR` or `MASTER_PORT` is not set", where="environment")
            )
        local_rank, link = number("LOCAL_RANK", 0), number("HPCTRAIN_LINK", 0)
        if problems:
            raise UsageError(problems)
        directory = os.path.abspath(env["HPCTRAIN_CHECKPOINT_DIR"])
        run_dir = os.path.abspath(env.get("HPCTRAIN_RUN_DIR") or directory)
        return cls(
            rank,
            local_rank,
            num_ranks,
            mode,
            env["HPCTRAIN_CONFIG"],
            directory,
            os.path.abspath(checkpoint) if checkpoint else "",
            run_dir,
            link,
        )


class StopRequest:
    """Remembers that the stop signal came; the loop asks at each step boundary."""

    def __init__(self) -> None:
        self.received = False

    def listen(self, number: int) -> None:
        """Turn the signal into a note instead of a death. Only the main thread of a process may
        call this."""
        signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
