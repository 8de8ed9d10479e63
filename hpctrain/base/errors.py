"""What can go wrong, how it is said, and the exit code each kind ends with.

    HpctrainError                 1   the answer is no (a check found problems, a job failed)
    ├── UsageError                2   usage, invalid spec or profile
    ├── EnvironmentFault          3   no Slurm, unreadable file, missing package, full disk
    └── Refused                   4   would overwrite or spend; needs --force or --yes

A user's mistake is always one of these. Any other exception is a bug in hpctrain and ends with 70.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DONE = 0
NO = 1
USAGE = 2
ENVIRONMENT = 3
REFUSED = 4
PENDING = 8
BUG = 70
INTERRUPTED = 130
GAVE_UP = 93  # inside jobs: the chain made no progress; not to be requeued


def printable(text: str, keep: str = "") -> str:
    """`text` with every character that does not print (control characters, lone surrogates) shown
    as an escape."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text
    )


@dataclass(frozen=True)
class Problem:
    """One thing the user should know: what, where, why, and what to do about it.

    `where` is `file:line:column` (or any shorter locator), `why` names the limit and where it is
    set.
    """

    what: str
    where: str = ""
    why: str = ""
    hint: str = ""
    level: str = "error"

    def __post_init__(self) -> None:
        # Values of the user's are quoted in messages; none may end the line or speak to the
        # terminal.
        for name in ("what", "where", "why", "hint"):
            object.__setattr__(
                self, name, printable(getattr(self, name), keep="\n" if name == "why" else "")
            )

    def __str__(self) -> str:
        lines = [
            (
                f"{self.level}: {self.where}: {self.what}"
                if self.where
                else f"{self.level}: {self.what}"
            )
        ]
        if self.why:
            lines.extend("  " + line for line in self.why.splitlines())
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, str]:
        return {
            "level": self.level,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "hint": self.hint,
        }


class HpctrainError(Exception):
    """Base of every error a user can cause or meet; carries all its problems at once."""

    exit_code = NO

    def __init__(
        self,
        problems: Problem | str | Iterable[Problem],
        *,
        where: str = "",
        why: str = "",
        hint: str = "",
    ):
        if isinstance(problems, str):
            problems = Problem(problems, where=where, why=why, hint=hint)
        self.problems: tuple[Problem, ...] = (
            (problems,) if isinstance(problems, Problem) else tuple(problems)
        )
        super().__init__("\n".join(map(str, self.problems)))


class UsageError(HpctrainError):
    """The command line, a run.yaml, a site profile or an input file is not valid."""

    exit_code = USAGE


class EnvironmentFault(HpctrainError):
    """Something outside the input is missing or broken: Slurm, a package, a file, the disk."""

    exit_code = ENVIRONMENT


class Refused(HpctrainError):
    """The command would overwrite work or spend a budget and was not told to."""

    exit_code = REFUSED


def missing_package(package: str, extra: str) -> EnvironmentFault:
    """The error for an optional dependency that is not installed, naming the extra that brings
    it."""
    return EnvironmentFault(
        f"this needs the Python package `{package}`, which is not installed",
        hint=f"pip install 'hpctrain[{extra}]'",
    )


def need(package: str, extra: str) -> Any:
    """An optional package (or a module of one), imported. Raises EnvironmentFault as
    `missing_package` has it where it, or what it needs itself, is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing_package(str(error.name or package), extra) from error
