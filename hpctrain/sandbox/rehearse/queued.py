"""Queues what is rehearsed, from the sandbox's login node, by the code that queues it at the
site."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpctrain.base.errors import HpctrainError
from hpctrain.jobs import ledger
from hpctrain.jobs import side as sidejobs
from hpctrain.jobs.ledger import MAIN, SIDE, Submission
from hpctrain.jobs.pipeline import queue as pipeline_queue
from hpctrain.jobs.pipeline.stages import Pipeline
from hpctrain.plan.make import Plan
from hpctrain.sandbox.rehearse import remote
from hpctrain.sandbox.rehearse.stage import Login


@dataclass(frozen=True)
class Queued:
    """What Slurm got of one run: jobs and side jobs by link; its words where it refused."""

    jobs: Mapping[int, str] = field(default_factory=dict)
    side: Mapping[int, str] = field(default_factory=dict)
    refused: str = ""


def queue(login: Login, plan: Plan, num_jobs: int) -> Queued:
    """Submit the links from the login node, as `hpctrain chain` does."""
    answer = remote.call(
        login, submit_links, plan.run_dir, plan.spec.name, num_jobs, plan.spec.after_each
    )
    return _queued(answer)


def queue_pipeline(login: Login, pipeline: Pipeline) -> list[Queued]:
    """Submit all links of all stages from the login node, by the very code of `hpctrain
    pipeline`."""
    return list(map(_queued, remote.call(login, submit_stages, pipeline)))


def submit_links(run_dir: str, run: str, num_jobs: int, after_each: str | None) -> dict[str, Any]:
    """On the login node: queue the links of a run, each after the one before it."""
    script = os.path.join(run_dir, "job.sbatch")
    refused = ""
    try:
        wanted = []
        for link in range(1, num_jobs + 1):
            wanted.append(Submission(link, MAIN, script, (str(link),)))
            if after_each:
                side = sidejobs.submission(run_dir, run, link, after_each)
                wanted.append(Submission(link, SIDE, side.script, (), side.options))
        with ledger.only_one(run_dir):
            ledger.submit_all(run_dir, wanted)
    except HpctrainError as error:
        refused = "\n".join(problem.what for problem in error.problems)
    return _answer(run_dir, refused)


def submit_stages(wanted: Pipeline) -> list[dict[str, Any]]:
    """On the login node: queue every stage. What Slurm refused is told of the stage that it
    belongs to."""
    refused = ""
    pipeline_queue.write_index(wanted)
    planned = pipeline_queue.plan_queue(wanted)
    try:
        pipeline_queue.submit_queue(wanted, planned)
    except HpctrainError as error:
        refused = "\n".join(problem.what for problem in error.problems)
    answers = []
    for stage in planned:
        answer = _answer(stage.planned.run_dir, "")
        if refused and len(answer["jobs"]) < len(stage.new):
            answer["refused"], refused = refused, ""
        answers.append(answer)
    return answers


def _answer(run_dir: str, refused: str) -> dict[str, Any]:
    ids = ledger.read_ledger(run_dir).submitted()
    jobs, side = (
        {str(link): job_id for (link, kind), job_id in ids.items() if kind == wanted}
        for wanted in (MAIN, SIDE)
    )
    return {"jobs": jobs, "side": side, "refused": refused}


def _queued(answer: Mapping[str, Any]) -> Queued:
    jobs, side = ({int(link): i for link, i in answer[kind].items()} for kind in ("jobs", "side"))
    return Queued(jobs, side, answer["refused"])
