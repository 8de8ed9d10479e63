"""Queues what is rehearsed, from the sandbox's login node, by the code that queues it at the
site."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpctrain.base.errors import EnvironmentFault
from hpctrain.jobs.pipeline.stages import Pipeline
from hpctrain.plan.make import Plan
from hpctrain.sandbox.rehearse.stage import Login


@dataclass(frozen=True)
class Queued:
    """What Slurm got of one run: jobs and side jobs by link; its words where it refused."""

    jobs: Mapping[int, str] = field(default_factory=dict)
    side: Mapping[int, str] = field(default_factory=dict)
    refused: str = ""


def queue(login: Login, plan: Plan, num_jobs: int) -> Queued:
    """Submit the links from the login node, as `hpctrain chain` does."""
    after_each = [plan.spec.after_each] if plan.spec.after_each else []
    (answer,) = _on_login(login, "run", plan.run_dir, str(num_jobs), *after_each)
    return answer


def queue_pipeline(login: Login, pipeline: Pipeline) -> list[Queued]:
    """Submit all links of all stages from the login node, by the very code of `hpctrain
    pipeline`."""
    order = login.place.files / "order"
    order.write_bytes(pickle.dumps(pipeline))
    try:
        return _on_login(login, "pipeline", str(order))
    finally:
        order.unlink()


def _on_login(login: Login, *words: str) -> list[Queued]:
    done = login.seeing(sys.executable, "-m", "hpctrain.sandbox.rehearse.login", *words)
    try:
        answers = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise EnvironmentFault(
            "the jobs could not be submitted", why=(done.stderr or done.stdout).strip()[-2000:]
        ) from error
    return [
        Queued(_by_link(answer["jobs"]), _by_link(answer["side"]), str(answer["refused"]))
        for answer in answers
    ]


def _by_link(jobs: Mapping[str, Any]) -> dict[int, str]:
    return {int(link): str(job_id) for link, job_id in jobs.items()}
