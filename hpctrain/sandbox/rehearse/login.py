"""Queues what is rehearsed from inside the sandbox's login view.

    python -m hpctrain.sandbox.rehearse.login run RUN_DIR JOBS [SCRIPT]     SCRIPT is the one of `chain.after_each`
    python -m hpctrain.sandbox.rehearse.login pipeline ORDER                ORDER is a pickled Pipeline

Prints a list with one JSON object a run: the job ids by link, those of the side jobs, and what
Slurm said where it refused.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from typing import Any

from hpctrain.base.errors import HpctrainError
from hpctrain.jobs import ledger
from hpctrain.jobs import side as sidejobs
from hpctrain.jobs.checkpoints import read_plan
from hpctrain.jobs.ledger import MAIN, SIDE, Submission
from hpctrain.jobs.pipeline import queue


def run(run_dir: str, num_jobs: int, after_each: str = "") -> list[dict[str, Any]]:
    """Queue the links of a run, each after the one before it."""
    script = os.path.join(run_dir, "job.sbatch")
    refused = ""
    try:
        wanted = []
        for link in range(1, num_jobs + 1):
            wanted.append(Submission(link, MAIN, script, (str(link),)))
            if after_each:
                side = sidejobs.submission(
                    run_dir, str(read_plan(run_dir)["run"]), link, after_each
                )
                wanted.append(Submission(link, SIDE, side.script, (), side.options))
        with ledger.only_one(run_dir):
            ledger.submit_all(run_dir, wanted)
    except HpctrainError as error:
        refused = "\n".join(problem.what for problem in error.problems)
    return [_answer(run_dir, refused)]


def pipeline(order: str) -> list[dict[str, Any]]:
    """Queue every stage as `hpctrain pipeline` does. What Slurm refused is told of the stage that
    it belongs to."""
    with open(order, "rb") as stream:
        wanted = pickle.loads(stream.read())  # our own file, in a folder of mode 0700
    refused = ""
    queue.write_index(wanted)
    planned = queue.plan_queue(wanted)
    try:
        queue.submit_queue(wanted, planned)
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


def main(words: list[str]) -> int:
    answers = (
        pipeline(words[1]) if words[0] == "pipeline" else run(words[1], int(words[2]), *words[3:4])
    )
    print(json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
