"""Queues a rehearsed chain from inside the sandbox's login view: python -m hpctrain.rehearse.login RUN_DIR JOBS [SCRIPT].

SCRIPT is the one of `chain.after_each`. Prints one JSON object: the job ids by link, those of the side jobs, and what Slurm said
where it refused.
"""

from __future__ import annotations

import json
import os
import sys

from hpctrain import sidejobs, submit
from hpctrain.checkpoint import read_plan
from hpctrain.errors import HpctrainError
from hpctrain.submit import MAIN, SIDE, Submission


def main(run_dir: str, num_jobs: int, after_each: str = "") -> int:
    script = os.path.join(run_dir, "job.sbatch")
    refused = ""
    try:
        wanted = []
        for link in range(1, num_jobs + 1):
            wanted.append(Submission(link, MAIN, script, (str(link),)))
            if after_each:
                side = sidejobs.submission(run_dir, str(read_plan(run_dir)["run"]), link, after_each)
                wanted.append(Submission(link, SIDE, side.script, (), side.options))
        with submit.only_one(run_dir):
            submit.submit_all(run_dir, wanted)
    except HpctrainError as error:
        refused = "\n".join(problem.what for problem in error.problems)
    ids = submit.read_ledger(run_dir).submitted()
    answer = {
        name: {str(link): job_id for (link, kind), job_id in ids.items() if kind == wanted_kind}
        for name, wanted_kind in (("jobs", MAIN), ("side", SIDE))
    }
    print(json.dumps({**answer, "refused": refused}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4]))
