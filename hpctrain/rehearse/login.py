"""Queues a rehearsed chain from inside the sandbox's login view: python -m hpctrain.rehearse.login RUN_DIR JOBS.

Prints one JSON object: the job ids by link, and what Slurm said where it refused.
"""

from __future__ import annotations

import json
import os
import sys

from hpctrain import submit
from hpctrain.errors import HpctrainError
from hpctrain.submit import MAIN, Submission


def main(run_dir: str, num_jobs: int) -> int:
    script = os.path.join(run_dir, "job.sbatch")
    wanted = [Submission(link, MAIN, script, (str(link),)) for link in range(1, num_jobs + 1)]
    refused = ""
    try:
        with submit.only_one(run_dir):
            submit.submit_all(run_dir, wanted)
    except HpctrainError as error:
        refused = "\n".join(problem.what for problem in error.problems)
    ids = {str(link): job_id for (link, _), job_id in submit.read_ledger(run_dir).submitted().items()}
    print(json.dumps({"jobs": ids, "refused": refused}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
