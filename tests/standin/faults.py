"""The fault campaign: chains of the stand-in trainer on a real Slurm, hurt in every way, and judged by what really happened.

  tools/faults --seed 1 --num 200 [--jobs 3] [--table docs/faults.md]

The trainer notes every step, every written shard and every fault outside the checkpoint folder (`truth.jsonl`); the
judgement uses that and never the guard's own opinion.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints

from hpctrain.errors import EnvironmentFault
from hpctrain.sandbox import processes
from hpctrain.sandbox import sandbox as sandboxes
from hpctrain.sandbox.daemons import Daemons
from hpctrain.sandbox.from_site import shape_from_site
from hpctrain.site import load_site

TRAINER = Path(__file__).parent / "trainer.py"
INSIDE = ("kill_rank", "kill_in_save", "kill_all_in_save", "disk_full", "latest_empty", "latest_gone", "latest_garbage",
          "shard_cut", "shard_gone", "folder_gone")  # fmt: skip
OUTSIDE = (
    "kill_shell",
    "node_down",
    "node_crash",
    "kill_slurmd",
    "requeue",
    "preempt",
    "scancel",
    "time_limit",
    "slurmctld_down",
    "twice",
)
KINDS = INSIDE + OUTSIDE
SLOW = {"time_limit": 6, "node_crash": 4, "kill_slurmd": 2, "preempt": 2, "requeue": 2}  # in units of the others
WORDS = {
    "kill_rank": "one rank is killed", "kill_in_save": "one rank is killed at a write of a save", "kill_all_in_save": "all ranks are killed in a save",
    "disk_full": "the disk is full in a save", "latest_empty": "`latest` is truncated to nothing", "latest_gone": "`latest` is removed",
    "latest_garbage": "`latest` holds garbage", "shard_cut": "a shard of the newest checkpoint is cut short",
    "shard_gone": "a shard of the newest checkpoint is removed", "folder_gone": "the newest checkpoint is removed by hand",
    "kill_shell": "the batch shell is killed", "node_down": "the node is set down", "node_crash": "the node loses power",
    "kill_slurmd": "the node's slurmd is killed", "requeue": "the job is requeued", "preempt": "the job gets SIGTERM and is requeued",
    "scancel": "the job is cancelled", "time_limit": "the time limit comes", "slurmctld_down": "slurmctld goes down for a while",
    "twice": "the job script is submitted by hand while a link runs",
}  # fmt: skip


# How each fault is told to someone who has nothing but `status`, `triage` and `report`: words of what each of them prints.
TOLD: dict[str, str] = {
    "kill_rank": "killed from outside", "kill_in_save": "killed from outside", "kill_all_in_save": "killed from outside",
    "disk_full": "disk, quota", "latest_empty": "`latest` is empty", "latest_gone": "`latest` is missing", "latest_garbage": "names no checkpoint",
    "shard_cut": "is not complete", "shard_gone": "is not complete", "folder_gone": "is not there|named no complete",
    "kill_shell": "job script itself was killed", "node_down": "node failure", "node_crash": "node failure",
    "kill_slurmd": "slurmd of .* was started again", "requeue": "preempted or requeued", "preempt": "preempted or requeued",
    "scancel": "cancelled by a person|CANCELLED", "time_limit": "time limit", "slurmctld_down": "controller .* was started again",
    "twice": "submitted by hand",
}  # fmt: skip
# The job runs on and nothing of it knows; only Slurm itself can be asked, which `status` leaves at squeue and sacct.
NOT_BY_STATUS = ("kill_slurmd", "slurmctld_down")
PAGE = ("import sys; from hpctrain.report.gather import gather; from hpctrain.report.page import page;"
        "print(page(gather(sys.argv[1]), '', None))")  # fmt: skip


class Cluster:
    """A sandbox of simulated nodes, and how to hurt it."""

    def __init__(self, directory: Path, num_nodes: int, name: str):
        self.name, self.directory = name, directory
        shape = shape_from_site(
            load_site("lumi"), {"lumi-g": num_nodes, "lumi-c": 0, "lumi-d": 0}, kill_wait_s=2, slurmd_timeout_s=15
        )
        status, _ = sandboxes.up(shape, name, directory, os.environ, source="unpacked")
        self.record = status.record
        assert self.record is not None
        self.environ = {**sandboxes.shell_environ(self.record, os.environ), "HPCTRAIN_LOCK_WAIT_S": "20"}
        self.controller = threading.Lock()

    def run(self, *argv, cwd=None):
        return subprocess.run(argv, cwd=cwd, env=self.environ, capture_output=True, text=True, timeout=180, check=False)

    def fault(self, node, action):
        sandboxes.fault(node, action, self.name, self.directory, os.environ)

    def heal(self, ended):
        """The administrator: Slurm drains a node that met a requeued job's leftovers, or was silent while this host was busy."""
        while not ended.wait(5):
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = self.run("sinfo", "-h", "-N", "-o", "%N %T").stdout
                down = {
                    line.split()[0] for line in said.splitlines() if line.split()[1].startswith(("drained", "down"))
                }
                if down:
                    self.run("scontrol", "update", f"nodename={','.join(sorted(down))}", "state=resume")

    def controller_down(self, seconds):
        with self.controller:
            daemons = Daemons(
                self.record.shape, self.record.place, sandboxes._toolbox(self.record, os.environ), os.environ
            )
            running = processes.of_role("slurmctld", state=str(self.directory), run=self.record.place.run)
            os.kill(running.pid, signal.SIGTERM)
            time.sleep(seconds)
            while processes.of_role("slurmctld", state=str(self.directory), run=self.record.place.run):
                time.sleep(0.2)
            daemons.start_controller()

    def down(self):
        sandboxes.down(self.name, self.directory, os.environ)


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
    untold: list[str] = field(default_factory=list)  # faults that triage does not tell of


class Run:
    """One chain under its faults."""

    def __init__(self, cluster: Cluster, top: Path, seed: int, kinds: list[str], node: str = ""):
        self.cluster, self.top, self.seed, self.kinds, self.node = cluster, top, seed, kinds, node
        self.random = random.Random(seed)
        self.fork, self.started = self.random.random() < 0.5, self.random.random() < 0.7
        self.steps, self.offset, self.num_links = 9, 0, 7 + len(kinds)
        self.dir, self.ckpt, self.truth = top / "runs" / "ft", top / "ck", top / "truth"
        if self.fork and self.started:
            self.offset = 50
        self.outside = [kind for kind in kinds if kind in OUTSIDE]

    def write(self):
        (self.truth / "faults").mkdir(parents=True)
        inside = [kind for kind in self.kinds if kind in INSIDE]
        for number, kind in enumerate(inside):
            # Later faults come at later steps, so that each meets the chain while it still has something to do.
            at_save = self.random.choice([3, 6, 9][number : 3 - (len(inside) - 1 - number)])
            plan = {
                "kind": kind,
                "at_save": at_save,
                "rank": self.random.choice([0, 1]),
                "at_step": at_save - self.random.choice([0, 1]),
            }
            if kind in ("kill_in_save", "kill_all_in_save", "disk_full"):
                most = checkpoints.num_writes(plan["rank"], 2, 1)
                plan.update(
                    kind="disk_full" if kind == "disk_full" else "kill_in_save",
                    how=kind,
                    write=self.random.randint(1, most),
                )
                if kind == "kill_all_in_save":
                    plan.update(rank="all", write=self.random.randint(1, checkpoints.num_writes(1, 2, 1)))
            elif kind != "kill_rank":
                plan.update(kind="hurt", how=kind)
            (self.truth / "faults" / str(number)).write_text(json.dumps(plan))
        checkpoint = {"dir": str(self.ckpt)}
        if self.started:
            checkpoint["start"] = checkpoints.save(
                str(self.top / "base"), 50, 2, 1, lineage="base", name="_global_step50_backup"
            )
        argv = [sys.executable, str(TRAINER), "--truth", str(self.truth), "--steps", str(self.steps), "--save-every", "3", "--tp", "2",
                "--step-s", str(0.1 + 0.6 * len(self.outside)), "--offset", str(self.offset)]  # fmt: skip
        (self.top / "run.yaml").write_text(json.dumps({
            "name": "ft", "site": "lumi", "recipe": "command", "account": "project_465001281", "partition": "small-g", "nodes": 1,
            # Where it is to be quick each chain has a node to itself; else a fault of a node hits several chains. (Not by an
            # exclusive partition: slurmctld 22.05.8 dies when it requeues a job whose node has CpuSpecList and is exclusive.)
            "sbatch": {"nodelist": self.node} if self.node else {},
            "tasks_per_node": 2, "gpus_per_node": 1, "time": "00:05:00", "checkpoint": checkpoint, "chain": {"jobs": self.num_links},
            "recipe_options": {"argv": argv, "layout": "deepspeed", "target_iteration": self.steps + self.offset, "save_every": 3,
                               "signal": False},
        }))  # fmt: skip
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
        result, begun = Result(self.seed, list(self.kinds)), time.monotonic()
        self.write()
        self.precious = {name: checkpoints.snapshot(self.top / name) for name in ("base",) if self.started}
        if self.fork:
            with self.cluster.controller:
                rendered = self.hpctrain("render")
            plan = json.loads((self.dir / "plan.json").read_text()) if rendered.returncode == 0 else {}
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
        self.judge(result)
        return result

    def submit(self):
        """The fork's counter is the neox recipe's business; here the plan is edited, so submit without rendering again."""
        code = ("import json, sys; from hpctrain import chain; d = sys.argv[1]; p = chain.read_plan(d);"
                "chain.submit_chain(chain.plan_chain(d, p))")  # fmt: skip
        return self.cluster.run(sys.executable, "-c", code, str(self.dir), cwd=self.top)

    def jobs(self):
        """This run's live jobs: (id, state, reason, node); None while Slurm does not answer."""
        done = self.cluster.run("squeue", "-h", "-o", "%A|%T|%r|%N|%Z")
        if done.returncode != 0:
            return None
        return [line.split("|")[:4] for line in done.stdout.splitlines() if line.endswith(f"|{self.dir}")]

    def watch(self, result, limit_s=900):
        """Play the outside faults, each once its link has trained a little, until nothing of the run is queued."""
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
                # Slurm holds a requeued job back for two minutes, and one whose node failed in the prolog; nobody waits here.
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
        """Let the job's time be over; Slurm looks twice a minute, so the step is held until it has seen."""
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
        spool = os.path.join(
            os.path.realpath(self.cluster.record.place.run), ""
        )  # other Slurms here have jobs of the same number
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

    def judge(self, result):
        """What the issue of this program promises, checked against what really happened."""
        wrong, events = result.wrong, self.events()
        result.played += [event["how"] or event["kind"] for event in events if event["event"] == "fault"]
        links = (
            [json.loads(line) for line in (self.dir / "links.jsonl").read_text().splitlines()]
            if (self.dir / "links.jsonl").exists()
            else []
        )
        begins = [record for record in links if record["event"] == "begin"]
        starts = [event for event in events if event["event"] == "start"]
        result.links, result.starts = len({record["link"] for record in begins}), len(starts)
        whole = self._judge_order(events, result)
        if self.steps in whole.values():
            result.outcome = "reached"
            tag = next(tag for tag, step in whole.items() if step == self.steps)
            shard = self.ckpt / tag / "mp_rank_00_model_states.pt"
            optimizer_steps = checkpoints.load_file(shard)["optimizer_steps"]
            if optimizer_steps != self.steps:
                wrong.append(f"the optimizer saw {optimizer_steps} of {self.steps} steps")
        elif begins and begins[-1]["mode"] == "gave_up":
            result.outcome = "gave up"
            # True when the last links that began, as many as it takes, really left no whole checkpoint behind.
            run = [record for record in begins if record["mode"] in ("scratch", "finetune", "resume")]
            last = list(dict.fromkeys(record["job_id"] for record in run))[-3:]
            made = [
                event
                for event in events
                if event["event"] == "wrote" and event["tag"] in whole and event["attempt"].split(".")[0] in last
            ]
            if len(last) < 3 or made:
                wrong.append(f"gave up without a reason: jobs {last}, {made}")
        else:
            result.outcome = "neither"
            wrong.append(f"neither reached nor gave up: {[(r['link'], r['mode']) for r in begins]}")
        wrong += [f"{event['event']}: {event}" for event in events if event["event"] in ("mixed", "random_weights")]
        result.untold = self.untold(result.played)
        if jobs := self.jobs():
            wrong.append(f"jobs left queued: {jobs}")
        for name, before in self.precious.items():
            if checkpoints.snapshot(self.top / name) != before:
                wrong.append(f"`{name}` changed")
        if (self.top / "precious.txt").read_text() != "not to be touched":
            wrong.append("a file outside changed")

    def untold(self, played) -> list[str]:
        """The faults that were played and that nobody would learn of from what each verb says."""
        said = {
            "status": self.hpctrain("status", str(self.dir)),
            "triage": self.hpctrain("triage", str(self.dir)),
            "report": self.cluster.run(sys.executable, "-c", PAGE, str(self.dir), cwd=self.top),
        }
        texts = {}
        for verb, done in said.items():
            texts[verb] = html.unescape(done.stdout + done.stderr)
            (self.top / f"{verb}.txt").write_text(texts[verb])
        return [
            f"{verb} does not tell of {kind}"
            for kind in played
            for verb in texts
            if not (verb == "status" and kind in NOT_BY_STATUS) and not re.search(TOLD[kind], texts[verb])
        ]

    def _judge_order(self, events, result):
        """Each start is from the last whole checkpoint before it, and no two starts ever train at the same time.

        Returns the whole checkpoints that are left, with their steps.
        """
        wrote: dict[tuple[str, str], set[int]] = {}
        whole: dict[str, int] = {}
        current, reached = None, 0
        for event in events:
            if event["event"] == "wrote":
                ranks = wrote.setdefault((event["attempt"], event["tag"]), set())
                ranks.add(event["rank"])
                if len(ranks) == 2:
                    whole[event["tag"]] = event["step"]
            elif event["event"] == "hurt":
                whole.pop(event["tag"], None)
            elif event["event"] == "start":
                best = max(whole.values(), default=0)
                if event["iteration"] != best:
                    result.wrong.append(f"started from {event['iteration']}, the last whole checkpoint is {best}")
                if (event["mode"] == "resume") != bool(whole):
                    result.wrong.append(f"mode {event['mode']} with whole checkpoints {sorted(whole)}")
                result.lost_iterations += max(reached - event["iteration"], 0)
                current, reached = event["attempt"], event["iteration"]
            elif event["event"] == "step":
                if event["attempt"] != current:
                    result.wrong.append(f"{event['attempt']} trained while {current} did")
                reached = event["iteration"]
        return whole


def plan_faults(seed: int, num: int, of: tuple[str, ...] = KINDS) -> list[list[str]]:
    """`num` faults in groups of one to three, each kind as often as any other; one group is one chain."""
    chance = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < num:
        kinds += chance.sample(of, len(of))
    kinds = kinds[:num]
    groups = []
    while kinds:
        size = chance.choice([1, 2, 3])
        groups.append(kinds[:size])
        kinds = kinds[size:]
    return groups


def campaign(
    seed: int, num: int, jobs: int, say=print, quick: bool = False, of: tuple[str, ...] = KINDS, keep: bool = False
) -> list[Result]:
    """Run the faults, `jobs` chains at a time, each on a cluster that the others share; returns a result per chain.

    `quick`: no waiting for what takes Slurm long, and the chains whose faults do begin first.
    """
    top = Path(tempfile.mkdtemp(prefix="hpctrain-faults-"))
    cluster = Cluster(top / "sandbox", jobs + 1, f"faults-{os.getpid()}")
    results = []

    def one(item):
        number, kinds = item
        folder = top / f"run {number}'s"
        folder.mkdir()
        node = nodes.get() if quick else ""
        run = Run(cluster, folder, seed * 1000 + number, kinds, node)
        try:
            result = run.play_all()
        except Exception as error:
            result = Result(run.seed, kinds, wrong=[f"{type(error).__name__}: {error}"])
        finally:
            nodes.put(node)
        say(f"{number:4d} {result.outcome or 'failed':8} links {result.links} starts {result.starts} lost {result.lost_iterations:2d} "
            f"{result.seconds:5.0f}s {', '.join(kinds)}{'  UNTOLD: ' + '; '.join(result.untold) if result.untold else ''}{'  WRONG: ' + '; '.join(result.wrong) if result.wrong else ''}")  # fmt: skip
        if not (result.wrong or keep):
            shutil.rmtree(folder, ignore_errors=True)
        return result

    nodes: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in range(1, jobs + 2):
        nodes.put(f"nid{number:06d}")
    pool, ended = ThreadPoolExecutor(jobs), threading.Event()
    threading.Thread(target=cluster.heal, args=(ended,), daemon=True).start()
    try:
        groups = list(enumerate(plan_faults(seed, num, of)))
        if quick:
            groups.sort(key=lambda item: sum(SLOW.get(kind, 1) for kind in item[1]), reverse=True)
        results = list(pool.map(one, groups))
    finally:
        ended.set()
        pool.shutdown(wait=False, cancel_futures=True)
        cluster.down()
        if results and not keep and not any(result.wrong for result in results):
            shutil.rmtree(top, ignore_errors=True)
        else:
            say(f"kept for a look: {top}")
    return results


def table(results: list[Result], command: str) -> str:
    """The campaign as a table for the documentation."""
    planned, played, failed = Counter(), Counter(), Counter()
    for result in results:
        planned.update(result.faults)
        played.update(result.played)
        failed.update(result.faults if result.wrong else [])
    lines = ["| fault | planned | met | chains with anything wrong |", "|---|---|---|---|"]
    lines += [
        f"| {WORDS[kind]} | {planned[kind]} | {played[kind]} | {failed[kind]} |" for kind in KINDS if planned[kind]
    ]
    outcome = Counter(result.outcome for result in results)
    lost = [result.lost_iterations / max(len(result.played), 1) for result in results if result.outcome]
    lines += [
        "",
        f"`{command}`: {sum(planned.values())} faults planned, {sum(played.values())} met, in {len(results)} chains; "
        f"{outcome['reached']} reached their target, {outcome['gave up']} gave up for a true reason, "
        f"{sum(bool(result.wrong) for result in results)} had anything wrong. "
        f"Mean iterations trained again per fault: {sum(lost) / max(len(lost), 1):.1f} (a checkpoint every 3).",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Hurt chains on a real Slurm and judge what they did.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=int, default=200, help="faults in all")
    parser.add_argument("--jobs", type=int, default=3, help="chains at a time")
    parser.add_argument("--kinds", default=",".join(KINDS), help="only these faults")
    parser.add_argument(
        "--quick", action="store_true", help="a node for each chain, and no waiting for what takes Slurm long"
    )
    parser.add_argument("--keep", action="store_true", help="keep every chain's folder for a look")
    parser.add_argument("--table", help="write the table into this file, between its markers")
    args = parser.parse_args()
    try:
        results = campaign(args.seed, args.num, args.jobs, lambda text: print(text, flush=True), args.quick,
                           tuple(args.kinds.split(",")), args.keep)  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted; the sandbox has ended", flush=True)
        os._exit(130)  # chains that still watch a Slurm that is gone
    text = table(results, f"tools/faults --seed {args.seed} --num {args.num}")
    print(text)
    if args.table:
        path = Path(args.table)
        before, _, rest = path.read_text().partition("<!-- table -->\n")
        path.write_text(before + "<!-- table -->\n" + text + "\n<!-- end -->\n" + rest.partition("<!-- end -->\n")[2])
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
