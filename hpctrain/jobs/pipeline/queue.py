"""Queues a pipeline: every link of every stage at once, each stage's first link behind the last one
of the stage before.

What is on record is not submitted again, so running it once more submits what is missing. Each
stage has its own ledger; `pipeline.jsonl` beside them tells what a pipeline submitted, and when.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError
from hpctrain.config.fields import nearest
from hpctrain.jobs import chain
from hpctrain.jobs.ledger import MAIN, only_one, read_ledger
from hpctrain.jobs.pipeline.stages import Pipeline, Planned
from hpctrain.plan.check import at_site
from hpctrain.plan.run_dir import run_files
from hpctrain.runs.records import PIPELINE
from hpctrain.runtime.files import append_record, make_folder, write_atomic
from hpctrain.runtime.link import now
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.jobs import of_user

LEDGER = "pipeline.jsonl"


@dataclass(frozen=True)
class StagePlan:
    """What becomes of one stage: `state` is done, queued, new or `ended` (its links ended early and
    it gets new ones).

    `chain` is None for a stage that is done or was not asked for.
    """

    planned: Planned
    state: str
    chain: chain.ChainPlan | None

    @property
    def new(self) -> tuple[int, ...]:
        return self.chain.new if self.chain else ()


def check_names(pipeline: Pipeline, wanted: Sequence[str]) -> None:
    """Raises UsageError for a name that is no stage's."""
    names = [planned.stage.name for planned in pipeline.stages]
    for name in wanted:
        if name not in names:
            raise UsageError(f"there is no stage `{name}`", hint=nearest(name, names))


def prepare(pipeline: Pipeline, force: bool = False, dry_run: bool = False) -> list[str]:
    """Render every stage, bootstrap those with a start of their own, and write pipeline.json;
    returns what to tell.

    Raises UsageError and Refused as `chain.prepare` does, before anything is queued.
    """
    said = []
    for planned in pipeline.stages:
        spec = planned.plan.spec
        start = None if spec.handed else spec.checkpoint_start
        if dry_run and start and not os.path.isdir(start) and not at_site(planned.plan.site):
            where = planned.plan.site.name
            said.append(
                f"stage {planned.stage.name}: `{start}` is not there, which is no surprise away"
                f" from {where}"
            )
            continue
        with chain.readable(planned.run_dir):
            said += [
                f"stage {planned.stage.name}: {line}"
                for line in chain.prepare(planned.loaded, force, dry_run)[1]
            ]
    if not dry_run:
        with chain.readable(pipeline.folder):
            write_index(pipeline)
    return said


def write_index(pipeline: Pipeline) -> None:
    """pipeline.json: the stages in their order, their run directories (relative to it) and what
    they hand on."""
    stages = [
        {
            "stage": planned.stage.name,
            "run": planned.plan.spec.name,
            "run_dir": os.path.relpath(planned.run_dir, pipeline.folder),
            "from": planned.stage.source,
            "hand_over": planned.stage.hand_over if planned.stage.source else None,
            "as": planned.stage.way if planned.stage.source else None,
            "jobs": planned.plan.spec.num_links,
        }
        for planned in pipeline.stages
    ]
    index = {"schema_version": 1, "pipeline": pipeline.spec.name, "stages": stages}
    make_folder(pipeline.folder)
    write_atomic(
        os.path.join(pipeline.folder, PIPELINE),
        json.dumps(index, indent=2, ensure_ascii=False) + "\n",
    )


def plan_queue(pipeline: Pipeline, wanted: Collection[str] = ()) -> list[StagePlan]:
    """What to submit for each stage; `wanted` names the only ones to submit for, all when empty.
    Writes nothing."""
    out = []
    for planned in pipeline.stages:
        run_dir = planned.run_dir
        content = json.loads(run_files(planned.loaded)["plan.json"])
        with chain.readable(run_dir):
            found = chain.plan_chain(run_dir, content)
            if found.done:
                out.append(StagePlan(planned, "done", None))
                continue
            before = "ended" if read_ledger(run_dir).submitted() else "new"
            state = "queued" if found.live else before
        out.append(
            StagePlan(planned, state, found if not wanted or planned.stage.name in wanted else None)
        )
    return out


def hours(queue: Sequence[StagePlan]) -> tuple[float, str]:
    """The cost of all new links together, as `ChainPlan.hours`."""
    chains = [stage.chain for stage in queue if stage.chain and stage.new]
    gpu = sum(found.gpu_hours for found in chains)
    return (gpu, "GPU-hours") if gpu else (sum(found.node_hours for found in chains), "node-hours")


def submit_queue(
    pipeline: Pipeline, queue: Sequence[StagePlan], waived: Sequence[Problem] = ()
) -> dict[str, dict[int, str]]:
    """Submit what is new, stage after stage; returns the job ids of every stage by link. Each
    ledger keeps the errors of `check` that were `waived`.

    Raises EnvironmentFault when Slurm refuses; what was submitted until then is on record.
    """
    record = os.path.join(pipeline.folder, LEDGER)
    ids: dict[str, dict[int, str]] = {}
    last: dict[str, str | None] = {}
    extended: set[str] = set()
    with only_one(pipeline.folder):
        for stage in queue:
            planned, name = stage.planned, stage.planned.stage.name
            after = last.get(planned.stage.source or "")
            before = _live(planned.run_dir)
            if stage.chain and (stage.new or before):
                _note(
                    record,
                    {
                        "event": "submitting",
                        "stage": name,
                        "links": list(stage.new),
                        "after": after,
                    },
                )
                submitted = chain.submit_chain(stage.chain, after=after, waived=waived)
                ids[name] = {
                    link: job_id for (link, kind), job_id in submitted.items() if kind == MAIN
                }
                extended |= {name} if stage.new else set()
                jobs = {str(link): ids[name][link] for link in stage.new if link in ids[name]}
                _note(record, {"event": "submitted", "stage": name, "jobs": jobs, "after": after})
                if after and before and planned.stage.source in extended:
                    _wait_for(before, after, record, name)
            live = _live(planned.run_dir)
            last[name] = live[max(live)] if live else None
    return ids


def _live(run_dir: str) -> dict[int, str]:
    return chain.live_links(read_ledger(run_dir)) if os.path.isdir(run_dir) else {}


def _wait_for(links: Mapping[int, str], after: str, record: str, stage: str) -> None:
    """Let the first waiting link of a stage wait for `after`: the stage before it got links
    since."""
    first = links[min(links)]
    jobs = {job.job_id: job for job in of_user([first])}
    if (
        first in jobs
        and jobs[first].state == "PENDING"
        and slurm.set_dependency(first, f"afterany:{after}")
    ):
        _note(record, {"event": "waits", "stage": stage, "job_id": first, "after": after})


def _note(path: str, fields: Mapping[str, Any]) -> None:
    try:
        append_record(path, {**fields, "time": now()})
    except OSError as error:
        raise EnvironmentFault(f"cannot write `{path}`: {error.strerror}") from error


def rows(queue: Sequence[StagePlan], ids: Mapping[str, Mapping[int, str]]) -> list[dict[str, Any]]:
    """A row per stage for `--json` and the table: its state, its links with their jobs, and what is
    new."""
    out = []
    for found in queue:
        stage, links = found.planned.stage, found.chain.links if found.chain else ()
        jobs = ids.get(stage.name, {})
        nothing_left = "done" if found.state == "done" else ""
        out.append(
            {
                "stage": stage.name,
                "run": found.planned.plan.spec.name,
                "run_dir": found.planned.run_dir,
                "state": found.state,
                "from": stage.source,
                "hand_over": stage.hand_over if stage.source else None,
                "as": stage.way if stage.source else None,
                "new": list(found.new),
                "new_jobs": [jobs[link] for link in found.new if link in jobs],
                "expected": links[0].mode if links else nothing_left,
                "links": [
                    {
                        "link": link.link,
                        "job_id": jobs.get(link.link, link.job_id),
                        "expected": link.mode,
                        "first": link.first,
                        "last": link.last,
                    }
                    for link in links
                ],
            }
        )
    return out
