"""A trainer as a program: `python -m … [--config FILE]`, its orders from a rendered job or, with
--config, from itself.

With --config nobody rendered the run: the run directory is the current one, and the run goes on
from its newest complete checkpoint where it has one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base import errors, terminal
from hpctrain.runtime.files import Listing
from hpctrain.runtime.layout import Expected
from hpctrain.runtime.layouts import LAYOUTS
from hpctrain.train.core.launch import Launch, StopRequest


@dataclass(frozen=True)
class Program:
    """What differs between trainers. `example`: the name of a config file; `signals`: those that
    mean: save and leave; `checkpoints`: the checkpoint folder of a run in a folder that nobody
    rendered."""

    module: str
    doc: str | None
    example: str
    layout: str
    load: Callable[[str], Any]
    signals: Callable[[Any], Iterable[int]]
    train: Callable[[Any, Launch, StopRequest], int]
    checkpoints: Callable[[Any, str], str]


def main(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Train as the environment or --config says; returns an exit code of `hpctrain.base.errors`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program.module}",
        description=program.doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="the YAML config, outside of a rendered job")
    given = parser.parse_args(arguments).config
    try:
        path = given or os.environ.get("HPCTRAIN_CONFIG") or ""
        if not path:
            raise errors.UsageError(
                "no config is given, and no HPCTRAIN_CONFIG is in the environment",
                hint=f"python -m {program.module} --config {program.example}",
            )
        config = program.load(path)
        environment: Mapping[str, str] = os.environ
        if given:
            environment = standalone(
                program.layout,
                program.checkpoints(config, os.getcwd()),
                given,
                os.environ,
                os.getcwd(),
            )
        launch = Launch.from_environment(environment)
        stop = StopRequest()
        for number in program.signals(config):
            stop.listen(number)  # before the slow imports: the signal may come during them
        return program.train(config, launch, stop)
    except errors.HpctrainError as error:
        if _speaks(error):
            terminal.problems(error.problems)
        return error.exit_code
    except OSError as error:
        terminal.problems(
            [errors.Problem(error.strerror or str(error), where=str(error.filename or ""))]
        )
        return errors.ENVIRONMENT


def _speaks(error: errors.HpctrainError) -> bool:
    """Whether this rank should print an error: rank 0 what all ranks meet, one rank a node what may
    be the node's own, each rank what only itself knows."""
    if getattr(error, "of_one_rank", False):
        return True
    number = "LOCAL_RANK" if isinstance(error, errors.EnvironmentFault) else "RANK"
    return os.environ.get(number, "0") == "0"


def standalone(
    layout: str, directory: str, config: str, environ: Mapping[str, str], folder: str
) -> dict[str, str]:
    """The environment of a rendered job for a run that nobody rendered: it resumes where there is
    something to resume."""
    found = newest_complete(layout, directory)
    return {
        **environ,
        "HPCTRAIN_MODE": "resume" if found else "scratch",
        "HPCTRAIN_CONFIG": os.path.abspath(config),
        "HPCTRAIN_CHECKPOINT_DIR": directory,
        "HPCTRAIN_CHECKPOINT": found or "",
        "HPCTRAIN_RUN_DIR": folder,
    }


def newest_complete(layout: str, directory: str) -> str | None:
    """The checkpoint with the greatest number that is whole, by the rule that the chain's guard
    uses too."""
    rule = LAYOUTS[layout]
    names = os.listdir(directory) if os.path.isdir(directory) else []
    for name in sorted(
        (name for name in names if rule.number(name) is not None), key=rule.order, reverse=True
    ):
        path = os.path.join(directory, name)
        try:
            if not rule.verdict(path, Listing(), Expected()).faults:
                return path
        except OSError:
            continue
    return None
