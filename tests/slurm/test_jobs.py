"""Rendered jobs on the real Slurm: what a person would see who types `hpctrain render && sbatch
…`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm
HPCTRAIN = [sys.executable, "-m", "hpctrain"]


@pytest.fixture
def run(idle, tmp_path):
    """Write a run.yaml for the LUMI-shaped sandbox, render it, submit with plain sbatch and wait:
    (job, state, log)."""
    idle_ = idle

    def start(argv, more="", env=None, wait=True, signal="false", site="lumi"):
        text = f"""\
name: job
site: {site}
recipe: command
account: project_465000000
partition: standard-g
nodes: 2
time: "5:00"
{more}
recipe_options:
  argv: {json.dumps(argv)}
  workdir: {json.dumps(str(tmp_path))}
  signal: {signal}
"""
        (tmp_path / "run.yaml").write_text(text)
        script = idle_.ok(*HPCTRAIN, "render", "--force", "--no-check", cwd=tmp_path).strip()
        job = idle_.ok("sbatch", "--parsable", script, cwd=tmp_path, **(env or {})).strip()
        log = Path(script).parent / "logs" / f"job-{job}.out"
        if not wait:
            return job, log
        return job, finished(idle_, job), log.read_text()

    return start


def finished(sandbox, job, timeout_s=150):
    """The job's state once it has ended, with its exit code: `COMPLETED 0:0`."""
    for _ in range(timeout_s * 5):
        shown = sandbox.ok("scontrol", "show", "job", job)
        fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        if fields["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            return f"{fields['JobState']} {fields['ExitCode']}"
        time.sleep(0.2)
    raise AssertionError(f"job {job} did not end: {shown}")


def test_every_rank_starts_once_with_the_ranks_of_its_node(run, tmp_path):
    program = (
        "import json, os; e = os.environ; open(f\"rank.{e['RANK']}\","
        " 'x').write(json.dumps([int(e['RANK']), int(e['LOCAL_RANK']), int(e['WORLD_SIZE']),"
        " e['SLURMD_NODENAME'], e['MASTER_ADDR'], int(e['MASTER_PORT']), e['HPCTRAIN_MODE'],"
        " e['HPCTRAIN_LINK'], os.path.isdir(e['MIOPEN_USER_DB_PATH'])]))"
    )
    job, state, log = run(["python3", "-c", program])
    seen = sorted(json.loads(path.read_text()) for path in tmp_path.glob("rank.*"))

    assert state == "COMPLETED 0:0", log
    assert [line[0] for line in seen] == list(range(16))
    assert [line[1] for line in seen] == [*range(8), *range(8)]
    assert {line[2] for line in seen} == {16}
    assert len({line[3] for line in seen[:8]}) == len({line[3] for line in seen[8:]}) == 1
    port = 20000 + int(job) % 12768
    assert {tuple(line[4:]) for line in seen} == {(seen[0][3], port, "scratch", "1", True)}


def test_the_job_ends_with_the_exit_code_of_the_first_task_to_fail_and_names_it(run, tmp_path):
    _, state, log = run(["bash", "-c", '[ "$RANK" = 3 ] && exit 7; sleep 100'])

    assert state == "FAILED 7:0", log
    assert "rank 3 on nid000001, with exit code 7" in log
    (end,) = [
        json.loads(line)
        for line in (tmp_path / "runs/job/links.jsonl").read_text().splitlines()
        if '"end"' in line
    ]
    assert end["exit_code"] == 7


def test_a_program_that_is_not_there_is_no_success(run):
    """`wait` also says 127 of a step that it knows nothing of."""
    _, state, log = run(["no-such-program"])

    assert state == "FAILED 127:0", log


def test_the_step_gets_its_signal_and_its_own_exit_code_survives_the_trap(run, idle, tmp_path):
    program = (
        "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *a: os._exit(5));"
        "open('up-' + os.environ['RANK'], 'w'); time.sleep(100)"
    )
    job, log = run(["python3", "-c", program], signal="true", wait=False)
    until(lambda: len(list(tmp_path.glob("up-*"))) == 16)
    idle.ok("scancel", "--batch", "--signal=USR1", job)

    assert finished(idle, job) == "FAILED 5:0", log.read_text()
    assert "got SIGUSR1" in log.read_text()


WORKER = """\
import os, signal, sys, time
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
open("up-" + os.environ["RANK"], "w")
for _ in range(600):
    time.sleep(0.1)
    if got:
        time.sleep(2)  # the save
        open("saved-" + os.environ["RANK"], "w")
        sys.exit(0)
"""


@pytest.mark.parametrize("start", ["exec ", "cd . && "])
def test_the_signal_reaches_the_workers_of_torchrun_and_ends_neither_it_nor_a_shell(
    run, idle, tmp_path, start
):
    (tmp_path / "w.py").write_text(WORKER)
    launch = (
        f"{start}{shlex.quote(sys.executable)} -m torch.distributed.run --nnodes $SLURM_NNODES"
        " --nproc-per-node 2 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint"
        " $MASTER_ADDR:$MASTER_PORT w.py"
    )
    job, log = run(["bash", "-c", launch], "tasks_per_node: 1", signal="true", wait=False)
    until(lambda: len(list(tmp_path.glob("up-*"))) == 4, 120)
    idle.ok("scancel", "--batch", "--signal=USR1", job)

    assert finished(idle, job) == "COMPLETED 0:0", log.read_text()
    assert len(list(tmp_path.glob("saved-*"))) == 4 and "got SIGUSR1" in log.read_text()


def test_a_requeue_appends_to_the_log_and_runs_the_same_link_again_at_another_port(
    run, idle, tmp_path
):
    job, log = run(
        ["bash", "-c", '[ "$RANK" != 0 ] || echo "$MASTER_PORT" >> ports; sleep 100'], wait=False
    )
    until(lambda: (tmp_path / "ports").exists())
    idle.ok("scontrol", "requeue", job)
    links = tmp_path / "runs/job/links.jsonl"
    until(lambda: links.read_text().count('"begin"') == 2, 90)
    until(lambda: len((tmp_path / "ports").read_text().split()) == 2, 90)
    idle.ok("scancel", job)
    begins = [
        json.loads(line)
        for line in (tmp_path / "runs/job/links.jsonl").read_text().splitlines()
        if '"begin"' in line
    ]

    assert "restart 0" in log.read_text()
    assert len(set((tmp_path / "ports").read_text().split())) == 2
    assert [(line["link"], line["restart"]) for line in begins][:2] == [(1, 0), (1, 1)]


def test_a_lost_node_is_no_success_though_srun_says_so(run, idle, tmp_path):
    saves_and_leaves = 'trap "exit 0" TERM; echo up >> "starts-$RANK"; sleep 100 & wait'
    job, log = run(["bash", "-c", saves_and_leaves], wait=False)
    until(lambda: len(list(tmp_path.glob("starts-*"))) == 16)
    idle.ok("scontrol", "update", "nodename=nid000002", "state=down", "reason=test")
    links = tmp_path / "runs/job/links.jsonl"
    until(lambda: '"end"' in links.read_text(), 90)
    idle.ok("scancel", job)
    (end,) = [json.loads(line) for line in links.read_text().splitlines() if '"end"' in line]
    assert end["exit_code"] not in (0, None), log.read_text()


def test_secrets_reach_the_tasks_and_nothing_else(run, idle, tmp_path):
    secret = tmp_path / "secrets.env"
    secret.write_text("WANDB_API_KEY=open-sesame\n")
    secret.chmod(0o600)
    job, log = run(
        ["bash", "-c", 'printf %s "$WANDB_API_KEY" | md5sum > "sum.$RANK"; sleep 3'],
        f"secrets: {secret}",
        wait=False,
    )
    until(lambda: len(list(tmp_path.glob("sum.*"))) == 16)
    shown = idle.ok("scontrol", "show", "job", "-dd", job) + idle.ok(
        "scontrol", "write", "batch_script", job, "-"
    )
    arguments = [
        path.read_bytes()
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if os.access(path, os.R_OK) and path.exists()
    ]
    state = finished(idle, job)
    written = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path != secret and b"open-sesame" in path.read_bytes()
    ]

    assert state == "COMPLETED 0:0", log.read_text()
    assert {path.read_text().split()[0] for path in tmp_path.glob("sum.*")} == {
        hashlib.md5(b"open-sesame").hexdigest()
    }
    assert "open-sesame" not in shown
    assert not any(b"open-sesame" in words for words in arguments)
    assert written == []


def test_a_secrets_file_that_others_can_read_stops_the_job(run, tmp_path):
    secret = tmp_path / "secrets.env"
    secret.write_text("WANDB_API_KEY=open-sesame\n")
    secret.chmod(0o644)
    _, state, log = run(["touch", "ran"], f"secrets: {secret}")

    assert state == "FAILED 1:0"
    assert "chmod 600" in log
    assert not (tmp_path / "ran").exists()


def test_no_variable_that_srun_knows_reaches_the_step_from_the_submitting_shell(
    run, idle, tmp_path
):
    """Every name in this Slurm's own srun, with a value that none of its options takes in good
    faith."""
    words = idle.ok("cat", shutil.which("srun", path=idle.environ["PATH"])).split()
    binary = next(
        Path(word) for word in words if word.endswith("/bin/srun") and "ld-linux" not in word
    )
    names = set(re.findall(rb"\0((?:SLURMD?|SRUN|PMI)_[A-Z_]+[A-Z])(?=\0)", binary.read_bytes()))
    of_sbatch = {"SLURM_HINT", "SLURM_CLUSTERS", "SLURM_HOSTFILE"}  # which does not take 7 for them
    names = {name.decode() for name in names} - of_sbatch
    assert len(names) > 80
    program = (
        "import json, os; e = os.environ; open('seen.' + e['RANK'], 'w').write(json.dumps(dict(e)))"
    )
    _, state, log = run(["python3", "-c", program], env={name: "7" for name in names})
    assert state == "COMPLETED 0:0", log
    seen = [json.loads(path.read_text()) for path in tmp_path.glob("seen.*")]

    assert len(seen) == 16 and {int(step["RANK"]) for step in seen} == set(range(16))
    assert {step["WORLD_SIZE"] for step in seen} == {"16"}
    assert {step["SLURM_THREADS_PER_CORE"] for step in seen} == {"1"}
    # Seven CPUs a task are the job's own; the rest says what a job has, and srun takes no option
    # from it.
    allowed = {"SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_UMASK"}
    allowed |= {f"SLURM_JOB_{what}" for what in ("ACCOUNT", "QOS", "RESERVATION")}
    assert {name for step in seen for name in names if step.get(name) == "7"} <= allowed


def test_a_shell_that_exports_nothing_still_gives_the_tasks_the_jobs_environment(run, tmp_path):
    program = 'echo "$HPCTRAIN_WORKDIR" > "dir.$RANK"'
    _, state, log = run(["bash", "-c", program], env={"SBATCH_EXPORT": "NONE"})

    assert state == "COMPLETED 0:0", log
    assert {path.read_text().strip() for path in tmp_path.glob("dir.*")} == {str(tmp_path)}


@pytest.mark.parametrize("memory", ["--mem-per-cpu=50", "--mem-per-gpu=50 --gpus-per-node=1"])
def test_a_job_submitted_from_inside_an_allocation_is_a_job_of_its_own(run, idle, tmp_path, memory):
    run(["true"], wait=False)  # renders
    idle.ok("scancel", "-u", str(os.geteuid()))
    script = tmp_path / "runs/job/job.sbatch"
    inner = f"SLURM_MPI_TYPE=pmi2 sbatch --parsable {shlex.quote(str(script))}"
    outer = [
        "salloc",
        "--quiet",
        "-p",
        "dev-g",
        "-A",
        "project_465000000",
        "-N1",
        "-n4",
        "-c1",
        *memory.split(),
    ]
    job = idle.ok(*outer, "bash", "-c", inner, cwd=tmp_path).strip()
    log = tmp_path / f"runs/job/logs/job-{job}.out"

    assert finished(idle, job) == "COMPLETED 0:0", log.read_text()
    assert (
        "not taken from the submitting shell:" in log.read_text()
        and "SLURM_MPI_TYPE" in log.read_text()
    )
    assert "16 tasks" in log.read_text()


def test_the_container_sees_its_binds_and_a_missing_one_fails(run, tmp_path):
    image = tmp_path / "image.sif"
    # This machine has none of LUMI's file systems, so a profile of the user's leaves them out.
    (tmp_path / "here.yaml").write_text(
        "name: here\nextends: lumi\ntitle: LUMI without its disks\ncontainer: {binds: []}\n"
    )
    image.write_text("any file stands for an image in the sandbox")
    bound = Path("/var/tmp") / f"hpctrain-{os.getpid()}"
    bound.mkdir()
    try:
        (bound / "data").write_text("x")
        hidden = Path("/srv") / f"hpctrain-{os.getpid()}"
        hidden.mkdir()
        (hidden / "data").write_text("x")
        more = f"container: {image}\ncontainer_binds: [{bound}]"
        good = run(
            ["bash", "-c", f'cat {bound}/data && echo "$SINGULARITY_NAME"'], more, site="here.yaml"
        )
        bad = run(["cat", f"{hidden}/data"], more, site="here.yaml")
    finally:
        for folder in (bound, hidden):
            (folder / "data").unlink()
            folder.rmdir()

    assert good[1] == "COMPLETED 0:0", good[2]
    assert bad[1].startswith("FAILED"), bad[2]
    assert "No such file" in bad[2]


def until(condition, timeout_s=60):
    for _ in range(timeout_s * 10):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")
