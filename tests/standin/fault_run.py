"""One chain of the fault campaign: written, queued, hurt while it runs, and handed to the judge."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints
import saves
from fault_cluster import Cluster
from fault_judge import judge
from fault_kinds import INSIDE, OUTSIDE

from hpctrain.base.errors import EnvironmentFault

TRAINER = Path(__file__).parent / "trainer.py"


@dataclass
class Result:
    """One chain: its faults, what it did, and everything that was wrong with that."""

    seed: int
    faults: list[str]
    played: list[str] = field(default_factory=list)
    outcome: str = ""
    links: int = 0
    starts: int = 0
    lost_iterations: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    layout: str = ""
    untold: list[str] = field(default_factory=list)  # faults that a verb does not tell of


class Run:
    """One chain under its faults."""

    def __init__(
        self,
        cluster: Cluster,
        top: Path,
        seed: int,
        kinds: list[str],
        node: str = "",
        layout: str = "deepspeed",
    ):
        self.cluster, self.top, self.seed, self.kinds, self.node = cluster, top, seed, kinds, node
        self.random = random.Random(seed)
        self.saves = saves.ALL[layout]
        self.fork, self.started = self.random.random() < 0.5, self.random.random() < 0.7
        self.fork = self.fork and layout == "deepspeed"
        self.steps, self.offset, self.num_links = 9, 0, 7 + len(kinds)
        self.dir, self.ckpt, self.truth = top / "runs" / "ft", top / "ck", top / "truth"
        if self.fork and self.started:
            self.offset = 50
        self.outside = [kind for kind in kinds if kind in OUTSIDE]

    def write(self):
        (self.truth / "faults").mkdir(parents=True)
        inside = [kind for kind in self.kinds if kind in INSIDE]
        for number, kind in enumerate(inside):
            # Later faults come at later steps, so that each meets the chain while it still has
            # something to do.
            at_save = self.random.choice([3, 6, 9][number : 3 - (len(inside) - 1 - number)])
            plan = {
                "kind": kind,
                "at_save": at_save,
                "rank": self.random.choice([0, 1]),
                "at_step": at_save - self.random.choice([0, 1]),
            }
            if kind in ("kill_in_save", "kill_all_in_save", "disk_full"):
                most = self.saves.num_writes(plan["rank"], 2)
                plan.update(
                    kind="disk_full" if kind == "disk_full" else "kill_in_save",
                    how=kind,
                    write=self.random.randint(1, most),
                )
                if kind == "kill_all_in_save":
                    most = self.saves.num_writes(1, 2)
                    plan.update(rank="all", write=self.random.randint(1, most))
            elif kind != "kill_rank":
                plan.update(kind="hurt", how=kind)
            (self.truth / "faults" / str(number)).write_text(json.dumps(plan))
        checkpoint = {"dir": str(self.ckpt)}
        if self.started:
            checkpoint["start"] = self.saves.save(str(self.top / "base"), 50, 2, "base")
        argv = [
            sys.executable,
            str(TRAINER),
            "--truth",
            str(self.truth),
            "--steps",
            str(self.steps),
            "--save-every",
            "3",
            "--layout",
            self.saves.name,
            "--tp",
            "2",
            "--step-s",
            str(0.1 + 0.6 * len(self.outside)),
            "--offset",
            str(self.offset),
        ]
        (self.top / "run.yaml").write_text(
            json.dumps(
                {
                    "name": "ft",
                    "site": "lumi",
                    "recipe": "command",
                    "account": "project_465001281",
                    "partition": "small-g",
                    "nodes": 1,
                    # Where it is to be quick each chain has a node to itself; else a fault of a
                    # node hits several chains. (Not by an exclusive partition: slurmctld 22.05.8
                    # dies when it requeues a job whose node has CpuSpecList and is exclusive.)
                    "sbatch": {"nodelist": self.node} if self.node else {},
                    "tasks_per_node": 2,
                    "gpus_per_node": 1,
                    "time": "00:05:00",
                    "checkpoint": checkpoint,
                    "chain": {"jobs": self.num_links},
                    "recipe_options": {
                        "argv": argv,
                        "layout": self.saves.layout or self.saves.name,
                        "target_iteration": self.steps + self.offset,
                        "save_every": 3,
                        "signal": False,
                    },
                }
            )
        )
        (self.top / "precious.txt").write_text("not to be touched")

    def hpctrain(self, *args):
        return self.cluster.run(sys.executable, "-m", "hpctrain", *args, cwd=self.top)

    def events(self):
        try:
            lines = (self.truth / "truth.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def play_all(self) -> Result:
        result = Result(self.seed, list(self.kinds), layout=self.saves.name)
        begun = time.monotonic()
        self.write()
        self.precious = {
            name: checkpoints.snapshot(self.top / name) for name in ("base",) if self.started
        }
        if self.fork:
            with self.cluster.controller:
                rendered = self.hpctrain("render")
            plan = (
                json.loads((self.dir / "plan.json").read_text()) if rendered.returncode == 0 else {}
            )
            plan["guard"]["counter"] = "greatest_folder"
            (self.dir / "plan.json").write_text(json.dumps(plan))
            with self.cluster.controller:
                done = self.submit()
        else:
            with self.cluster.controller:
                done = self.hpctrain("chain")
        if done.returncode != 0:
            result.wrong.append(f"chain exited {done.returncode}: {done.stderr[-500:]}")
            return result
        self.watch(result)
        result.seconds = time.monotonic() - begun
        judge(self, result)
        return result

    def submit(self):
        """The fork's counter is the neox recipe's business; here the plan is edited, so submit
        without rendering again."""
        code = (
            "import json, sys; from hpctrain.jobs import chain; d = sys.argv[1];"
            " p = json.load(open(d + '/plan.json')); chain.submit_chain(chain.plan_chain(d, p))"
        )
        return self.cluster.run(sys.executable, "-c", code, str(self.dir), cwd=self.top)

    def jobs(self):
        """This run's live jobs: (id, state, reason, node); None while Slurm does not answer."""
        done = self.cluster.run("squeue", "-h", "-o", "%A|%T|%r|%N|%Z")
        if done.returncode != 0:
            return None
        return [
            line.split("|")[:4]
            for line in done.stdout.splitlines()
            if line.endswith(f"|{self.dir}")
        ]

    def watch(self, result, limit_s=900):
        """Play the outside faults, each once its link has trained a little, until nothing of the
        run is queued."""
        waiting = list(self.outside)
        end = time.monotonic() + limit_s
        next_after = self.random.choice([1, 2, 3])
        seen = 0
        while time.monotonic() < end:
            time.sleep(0.5)
            jobs = self.jobs()
            if jobs is None:
                continue
            if not jobs:
                return
            steps = sum(event["event"] == "step" for event in self.events())
            running = [job for job in jobs if job[1] == "RUNNING"]
            if waiting and running and steps >= seen + next_after:
                kind = waiting.pop(0)
                if self.outer(kind, running[0][0], running[0][3]):
                    result.played.append(kind)
                seen = steps
            for job_id, state, reason, _ in jobs:
                # Slurm holds a requeued job back for two minutes, and one whose node failed in the
                # prolog; nobody waits here.
                if state == "PENDING" and reason in (
                    "BeginTime",
                    "JobHeldUser",
                    "JobHoldMaxRequeue",
                    "launch failed requeued held",
                ):
                    self.cluster.run("scontrol", "release", job_id)
                    self.cluster.run("scontrol", "update", f"jobid={job_id}", "StartTime=now")
        result.wrong.append(f"still queued after {limit_s} s: {self.jobs()}")

    def outer(self, kind, job_id, node) -> bool:
        cluster = self.cluster
        if kind == "kill_shell":
            return self.kill_shell(job_id)
        if kind == "node_down":
            cluster.fault(node, "down")
            time.sleep(1)
            with contextlib.suppress(EnvironmentFault):  # the administrator was faster
                cluster.fault(node, "resume")
        elif kind in ("node_crash", "kill_slurmd"):
            cluster.fault(node, "crash" if kind == "node_crash" else "kill-slurmd")
            time.sleep(2)
            if self.node and kind == "node_crash":
                # Slurm finds out by itself within a minute or two; here the administrator says it.
                cluster.fault(node, "down")
            cluster.fault(node, "restart-slurmd")
        elif kind == "requeue":
            return cluster.run("scontrol", "requeue", job_id).returncode == 0
        elif kind == "preempt":
            cluster.run("scancel", "--full", "--signal=TERM", job_id)
            time.sleep(self.random.choice([0.0, 0.5]))
            cluster.run("scontrol", "requeue", job_id)
        elif kind == "scancel":
            return cluster.run("scancel", job_id).returncode == 0
        elif kind == "time_limit":
            return self.time_limit(job_id)
        elif kind == "slurmctld_down":
            cluster.controller_down(self.random.choice([1, 4]))
        elif kind == "twice":
            return cluster.run("sbatch", str(self.dir / "job.sbatch"), cwd=self.top).returncode == 0
        return True

    def time_limit(self, job_id) -> bool:
        """Let the job's time be over; Slurm looks twice a minute, so the step is held until it has
        seen."""
        pause = self.truth / "pause"
        pause.touch()
        try:
            soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 1))
            self.cluster.run("scontrol", "update", f"jobid={job_id}", f"EndTime={soon}")
            for _ in range(300):
                said = self.cluster.run("scontrol", "show", "job", "-o", job_id).stdout
                if "JobState=TIMEOUT" in said:
                    return True
                if said and "JobState=RUNNING" not in said and "JobState=COMPLETING" not in said:
                    return False
                time.sleep(0.3)
            return False
        finally:
            pause.unlink()

    def kill_shell(self, job_id) -> bool:
        # other Slurms here have jobs of the same number
        spool = os.path.join(os.path.realpath(self.cluster.record.place.run), "")
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
                    if (
                        len(words) > 1
                        and words[0].endswith(b"bash")
                        and words[1].startswith(spool.encode())
                        and words[1].endswith(f"/job{int(job_id):05d}/slurm_script".encode())
                    ):
                        os.kill(int(entry), signal.SIGKILL)
                        return True
        return False
