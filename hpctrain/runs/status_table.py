"""Prints run statuses: one line a run, or one line a link of a single run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hpctrain.base import errors, terminal
from hpctrain.base.units import compress_nodes, format_duration
from hpctrain.runs.records import read_pipeline_index
from hpctrain.runs.status import (
    DONE,
    ENDED,
    FAILED,
    GAVE_UP,
    NOT_SUBMITTED,
    PENDING,
    RUNNING,
    STOPPED,
    LinkStatus,
    RunStatus,
)
from hpctrain.runtime.history import RUN_MODES
from hpctrain.runtime.settings import handed_over
from hpctrain.triage.records import utc

_COLOUR = {RUNNING: "cyan", PENDING: "yellow", DONE: "green", FAILED: "red", GAVE_UP: "red"}


def exit_code(statuses: Sequence[RunStatus]) -> int:
    """8 while any run lives, 1 when one failed, else 0."""
    if any(status.live for status in statuses):
        return errors.PENDING
    return (
        errors.DONE
        if all(status.state in (DONE, ENDED, STOPPED) for status in statuses)
        else errors.NO
    )


def of_pipeline(folder: str, statuses: Sequence[RunStatus]) -> dict[str, Any]:
    """A pipeline's stages in their order, each with its state and what it got, for `--json` and the
    table."""
    index = read_pipeline_index(folder)
    by_dir = {status.run.run_dir: status for status in statuses}
    stages = []
    for stage in index["stages"]:
        run_dir = os.path.abspath(os.path.join(folder, str(stage["run_dir"])))
        status = by_dir.get(run_dir)
        stages.append(
            {
                "stage": stage["stage"],
                "run": stage.get("run"),
                "run_dir": run_dir,
                "from": stage.get("from"),
                "hand_over": stage.get("hand_over"),
                "as": stage.get("as"),
                "state": status.state if status else NOT_SUBMITTED,
                "got": _got(run_dir),
            }
        )
    return {"name": index["pipeline"], "folder": folder, "stages": stages}


def _got(run_dir: str) -> str | None:
    """What an earlier stage has handed to this run."""
    try:
        return handed_over(run_dir)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def show_pipeline(pipeline: Mapping[str, Any], statuses: Sequence[RunStatus]) -> None:
    """A table of the pipeline's stages; what could not be seen goes to stderr."""
    by_dir = {status.run.run_dir: status for status in statuses}
    table = []
    for stage in pipeline["stages"]:
        status = by_dir.get(stage["run_dir"])
        got = os.path.basename(stage["got"]) if stage["got"] else stage["hand_over"] or ""
        table.append(
            (
                stage["stage"],
                stage["state"],
                f"{got} of {stage['from']}" if stage["from"] else "",
                _jobs(status) if status else "",
                _progress(status) if status else "",
                _eta(status) if status else "",
                stage["run_dir"],
            )
        )
    terminal.data(f"pipeline {pipeline['name']}")
    terminal.table(
        table, ("stage", "state", "gets", "links", "iteration", "still needs", "directory")
    )
    for status in statuses:
        if status.state in (FAILED, GAVE_UP):
            why = status.links[-1].reason if status.links else ""
            terminal.info(f"{status.run.name}: {status.state}{': ' + why if why else ''}")
    terminal.unseen(what for status in statuses for what in status.unseen)


def show(statuses: Sequence[RunStatus], now_s: float) -> None:
    """A table of runs, or the links of the only one; what could not be seen goes to stderr."""
    if len(statuses) == 1:
        _one(statuses[0], now_s)
    else:
        terminal.table(
            [
                (s.run.name, s.state, _jobs(s), _progress(s), _eta(s), s.run.run_dir)
                for s in statuses
            ],
            ("run", "state", "links", "iteration", "still needs", "directory"),
        )
        for status in statuses:
            for link in status.links:
                if link.release:
                    terminal.info(
                        f"{status.run.name}: job {link.job_id} waits for you: {link.release}"
                    )
    terminal.unseen(what for status in statuses for what in status.unseen)


def _one(status: RunStatus, now_s: float) -> None:
    state = (
        terminal.paint(status.state, _COLOUR[status.state])
        if status.state in _COLOUR
        else status.state
    )
    terminal.data(
        f"{status.run.name}: {state}, iteration {_progress(status)}, still needs {_eta(status)}"
    )
    progress = status.progress
    dead = [link for link in status.links if link.reason and link.mode in RUN_MODES]
    if dead and status.state in (FAILED, GAVE_UP):
        terminal.data(f"cause: link {dead[-1].link}, job {dead[-1].job_id}: {dead[-1].reason}")
    if progress.checkpoint:
        terminal.data(f"newest complete checkpoint: {progress.checkpoint}")
    if status.links:
        terminal.data("")
        terminal.table(
            [_row(link, now_s) for link in status.links],
            (
                "link",
                "job",
                "state",
                "mode",
                "iterations",
                "checkpoint",
                "elapsed",
                "nodes",
                "why / when",
            ),
        )
    terminal.notes(status.notes)
    if status.state in (FAILED, GAVE_UP):
        terminal.next_step(f"hpctrain triage {shlex.quote(status.run.run_dir)}")
    elif status.state == RUNNING:
        terminal.next_step(f"hpctrain logs -f {shlex.quote(status.run.run_dir)}")


def _row(link: LinkStatus, now_s: float) -> tuple[object, ...]:
    restarts = f" ({link.restarts} restarts)" if link.restarts else ""
    start = "" if link.iteration_from is None else str(link.iteration_from)
    end = "" if link.iteration_to is None else str(link.iteration_to)
    iterations = f"{start}–{end}" if start or end else ""
    nodes = compress_nodes(list(link.nodes)) if link.nodes else f"{link.num_nodes or ''}"
    if link.pending:
        wait = f"starts about {utc(link.expected_start_s)}" if link.expected_start_s else ""
        why = ", ".join(filter(None, [link.reason, link.stuck, wait]))
    else:
        why = link.reason
    return (
        "" if link.link is None else link.link,
        link.job_id,
        link.state + restarts,
        link.mode or "",
        iterations,
        link.checkpoint or "",
        "" if link.elapsed_s is None else format_duration(link.elapsed_s),
        nodes if len(nodes) < 40 else nodes[:37] + "…",
        why,
    )


def _jobs(status: RunStatus) -> str:
    running = sum(link.active for link in status.links)
    pending = sum(link.pending for link in status.links)
    return (
        f"{len(status.links)} ({running} running, {pending} pending)"
        if status.live
        else str(len(status.links))
    )


def _progress(status: RunStatus) -> str:
    progress = status.progress
    if progress.iteration is None:
        return "unknown"
    if not progress.target:
        return str(progress.iteration)
    base = progress.offset
    counted = f" [{progress.iteration + base} of {progress.target + base}]" if base else ""
    return (
        f"{progress.iteration} of {progress.target}"
        f" ({100 * progress.iteration / progress.target:.0f}%){counted}"
    )


def _eta(status: RunStatus) -> str:
    progress = status.progress
    if status.state == DONE:
        return "nothing"
    if progress.eta_s is None:
        return "an unknown time"
    links = f", {progress.links_needed} links" if progress.links_needed is not None else ""
    return f"{format_duration(progress.eta_s)} of running{links}"
