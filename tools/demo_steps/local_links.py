"""The links of a rendered run one after another on this machine, where no Slurm can be had:
submitit's local executor.

    python tools/demo_steps/local_links.py RUN_DIR --links 3 --tasks 2 [--kill LINK=PATH ...]

Each link is RUN_DIR/job.sbatch itself, with `srun` and `scontrol` of tools/demo_steps/bin on PATH.
`--kill 2=PATH` kills all processes of link 2 as soon as PATH exists, as a lost node would. Exits
with the last link's code.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import submitit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--links", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--kill", action="append", default=[], metavar="LINK=PATH")
    args = parser.parse_args()
    run_dir = args.run_dir.resolve()
    doomed = {
        int(link): os.path.abspath(path)
        for link, path in (word.split("=", 1) for word in args.kill)
    }
    executor = submitit.LocalExecutor(folder=run_dir / "submitit")
    executor.update_parameters(timeout_min=30)
    code = 0
    for link in range(1, args.links + 1):
        job = executor.submit(run_link, str(run_dir), link, args.tasks, doomed.get(link, ""))
        code = job.result()
        print(f"link {link} ran as local job {job.job_id} and ended with {code}", flush=True)
    return code


def run_link(run_dir: str, link: int, num_tasks: int, kill_at: str) -> int:
    """The job script in a session of its own; its exit code, as a shell gives it."""
    job_id = str(os.getpid())
    name = os.path.basename(run_dir)
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "SUBMITIT_"))
    }
    env.update(
        PATH=f"{Path(__file__).parent / 'bin'}:{env['PATH']}",
        SLURM_JOB_ID=job_id,
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="localhost",
        SLURM_NTASKS=str(num_tasks),
        SLURM_CPUS_PER_TASK="1",
        SLURMD_NODENAME="localhost",
    )
    with open(os.path.join(run_dir, "logs", f"{name}-{job_id}.out"), "ab") as log:
        script = subprocess.Popen(
            ["bash", os.path.join(run_dir, "job.sbatch"), str(link)],
            env=env,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        while script.poll() is None:
            if kill_at and os.path.exists(kill_at):
                os.killpg(script.pid, signal.SIGKILL)
                kill_at = ""
            time.sleep(0.1)
    return script.returncode if script.returncode >= 0 else 128 - script.returncode


if __name__ == "__main__":
    sys.exit(main())
