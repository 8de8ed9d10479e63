"""status, logs, triage, cost and report of real jobs: someone who did not run them can say what
happened."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

PROGRAM = """
import os, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
for i in range(1, 31):
    if rank == 0:
        print(f" iteration {i:8d}/      30 | elapsed time per iteration (ms): 20.0 | learning rate: 1.0E-05 | lm_loss: {2.5 - 0.02 * i:.6E} |"
              " number of skipped iterations:   0 | number of nan iterations:   0 |", flush=True)
    time.sleep(0.02)
    if i == 20 and what == "oom" and rank == 3:
        time.sleep(1.5)  # Slurm counts whole seconds
        raise RuntimeError("HIP out of memory. Tried to allocate 3.00 GiB")
    if i == 20 and what == "oom":
        time.sleep(60)
    if i == 20 and what == "wait":
        time.sleep(600)
"""


class Run:
    def __init__(self, sandbox, top: Path, what: str, **changes):
        self.sandbox, self.top, self.dir = sandbox, top, top / "runs" / what
        (top / "program.py").write_text(textwrap.dedent(PROGRAM))
        spec = {
            "name": what,
            "site": "lumi",
            "recipe": "command",
            "account": "project_465001281",
            "partition": "small-g",
            "nodes": 2,
            "tasks_per_node": 2,
            "gpus_per_node": 2,
            "time": "00:05:00",
            "recipe_options": {"argv": [sys.executable, str(top / "program.py"), what]},
            **changes,
        }
        (top / "run.yaml").write_text(json.dumps(spec))
        self.ok("render")

    def hpctrain(self, *args):
        return self.sandbox.run(sys.executable, "-m", "hpctrain", *map(str, args), cwd=self.top)

    def ok(self, *args):
        done = self.hpctrain(*args)
        assert done.returncode == 0, done.stderr
        return done

    def status(self):
        return json.loads(self.hpctrain("status", self.dir, "--json").stdout)["runs"][0]

    def submit(self):
        return self.sandbox.ok("sbatch", "--parsable", str(self.dir / "job.sbatch")).strip()

    def wait(self, wanted, seconds=90):
        for _ in range(seconds * 2):
            if self.status()["state"] in wanted:
                return
            time.sleep(0.5)
        raise AssertionError(self.status())


def test_an_out_of_memory_on_one_rank_is_named_with_rank_node_and_link(sandbox, tmp_path):
    run = Run(sandbox, tmp_path, "oom")
    job = run.submit()
    run.wait({"failed"})
    answer = json.loads(run.hpctrain("triage", run.dir, "--json").stdout)
    cause = answer["cause"]
    assert (answer["verdict"], answer["action"], cause["failure"]) == ("RED", "stop", "gpu_oom")
    assert (cause["rank"], cause["job_id"], cause["link"]) == (3, job, 1)
    nodes = run.status()["links"][0]["nodes"]
    assert cause["node"] == nodes[1]  # ranks 2 and 3 are on the second node
    assert "HIP out of memory" in Path(cause["file"]).read_text().splitlines()[cause["line"] - 1]
    logs = run.hpctrain("logs", job)
    assert f"first failure (gpu_oom): {cause['file']}:{cause['line']}, rank 3" in logs.stderr
    for _ in range(120):  # slurmdbd learns of the job's end a little later than the run directory
        billed = json.loads(run.ok("cost", run.dir, "--json").stdout)["used"]["billed"]
        if billed:
            break
        time.sleep(0.5)
    assert 0 < billed < 0.1 * 2


def test_a_running_and_a_waiting_job_are_seen_by_job_id_and_the_page_is_made_meanwhile(
    sandbox, tmp_path
):
    run = Run(sandbox, tmp_path, "wait")
    job = run.submit()
    run.wait({"running"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = json.loads(run.hpctrain("status", job, "--json").stdout)["runs"][0]
        if status["links"][0]["iteration_to"] == 20:
            break
        time.sleep(0.5)
    assert status["links"][0]["state"] == "RUNNING" and status["links"][0]["iteration_to"] == 20
    assert run.hpctrain("status", job).returncode == 8
    held = sandbox.ok("sbatch", "--parsable", "--hold", str(run.dir / "job.sbatch")).strip()
    (run.dir / "ledger.jsonl").write_text(
        json.dumps({"event": "submitted", "link": 2, "job_id": held}) + "\n"
    )
    pending = next(link for link in run.status()["links"] if link["job_id"] == held)
    assert (pending["state"], pending["reason"]) == ("PENDING", "JobHeldUser")
    assert json.loads(run.hpctrain("triage", run.dir, "--json").stdout)["verdict"] == "GREEN"
    sandbox.ok("scancel", job, held)
    run.wait({"failed"})
    assert run.status()["links"][0]["state"] == "CANCELLED"


LADDER_PROGRAM = """
import os, sys, time
world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
for i in range(1, 121):
    if rank == 0:
        print(f"step {i}/120 loss={2.5 - 0.01 * i:.4f} grad_norm=1.0", flush=True)
    if world == 2 and rank == 1 and i == 60 and sys.argv[1] == "fail":
        raise RuntimeError("HIP out of memory. Tried to allocate 9.00 GiB")
    time.sleep(0.005)
"""


@pytest.mark.parametrize("what", ["pass", "fail"])
def test_the_ladder_climbs_on_green_and_stops_at_the_first_rung_that_is_not(
    sandbox, tmp_path, what
):
    (tmp_path / "program.py").write_text(LADDER_PROGRAM)
    spec = {
        "name": "l",
        "site": "lumi",
        "recipe": "command",
        "account": "project_465001281",
        "partition": "small-g",
        "nodes": 1,
        "time": "00:05:00",
        "recipe_options": {"argv": [sys.executable, str(tmp_path / "program.py"), what]},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(spec))
    done = sandbox.run(
        sys.executable,
        "-m",
        "hpctrain",
        "ladder",
        "--rungs",
        "1,2,4",
        "--time",
        "00:02:00",
        "--json",
        cwd=tmp_path,
    )
    rungs = json.loads(done.stdout)["rungs"]
    if what == "pass":
        assert done.returncode == 0, done.stderr
        assert [rung["passed"] for rung in rungs] == [True, True, True]
    else:
        assert done.returncode == 1
        assert [rung["passed"] for rung in rungs] == [True, False, False]
        assert rungs[1]["diagnosis"]["cause"]["failure"] == "gpu_oom" and rungs[2]["job_id"] == ""


def test_preflight_looks_at_every_rank_of_a_real_allocation(sandbox, tmp_path):
    spec = {
        "name": "p",
        "site": "lumi",
        "recipe": "command",
        "account": "project_465001281",
        "partition": "small-g",
        "nodes": 2,
        "tasks_per_node": 2,
        "gpus_per_node": 2,
        "time": "00:05:00",
        "recipe_options": {"argv": ["true"]},
        "env": {"GLOO_SOCKET_IFNAME": "lo"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(spec))
    done = sandbox.run(
        sys.executable,
        "-m",
        "hpctrain",
        "preflight",
        "--submit",
        "--python",
        "/usr/bin/python3",
        "--json",
        cwd=tmp_path,
    )
    answer = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert answer["seen"] == answer["ranks"] == 4, done.stdout
    assert sorted((facts["rank"], facts["stage"]) for facts in answer["map"]) == [
        (rank, "done") for rank in range(4)
    ]
    assert len({facts["node"] for facts in answer["map"]}) == 2


def test_a_job_whose_preflight_finds_a_bad_node_goes_back_into_the_queue_without_it(
    sandbox, tmp_path
):
    # `python` on one node ends before it measures: the rank never starts there.
    (tmp_path / "python").write_text(
        '#!/bin/bash\n[ "$SLURMD_NODENAME" != nid000002 ] || [[ "$*" != *measure* ]] || exit'
        ' 9\nexec /usr/bin/python3 "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    spec = {
        "name": "p",
        "site": "lumi",
        "recipe": "command",
        "account": "project_465001281",
        "partition": "small-g",
        "nodes": 3,
        "tasks_per_node": 1,
        "gpus_per_node": 1,
        "time": "00:05:00",
        "preflight": {"python": str(tmp_path / "python"), "limit_s": 60},
        "recipe_options": {"argv": ["bash", "-c", "echo $SLURMD_NODENAME trains"]},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(spec))
    done = sandbox.run(sys.executable, "-m", "hpctrain", "render", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "p"
    job = sandbox.ok("sbatch", "--parsable", str(run_dir / "job.sbatch")).strip()

    def put_back():
        said = sandbox.run("scontrol", "show", "job", "-o", job).stdout
        return "Restarts=1" in said and "ExcNodeList=nid000002" in said

    sandbox.wait_for(put_back, 60)
    # Slurm holds it back for two minutes; nobody waits here
    sandbox.ok("scontrol", "update", f"jobid={job}", "StartTime=now")
    sandbox.wait_for(
        lambda: sandbox.state(job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), 90
    )
    log = (run_dir / "logs" / f"p-{job}.out").read_text()
    assert sandbox.state(job) == "COMPLETED", log
    assert {line.split()[0] for line in log.splitlines() if line.endswith(" trains")} == {
        "nid000001",
        "nid000003",
        "nid000004",
    }
    records = [json.loads(line) for line in (run_dir / "links.jsonl").read_text().splitlines()]
    assert [(r["event"], r["link"], r["restart"], r.get("action")) for r in records] == [
        ("begin", 1, 0, None),
        ("preflight", 1, 0, "requeue"),
        ("begin", 1, 1, None),
        ("preflight", 1, 1, "go"),
        ("end", 1, 1, None),
    ]
    assert list(records[1]["bad"]) == ["nid000002"]
    status = sandbox.run(sys.executable, "-m", "hpctrain", "status", str(run_dir), cwd=tmp_path)
    assert "nid000002" in status.stdout + status.stderr
