"""A campaign of acts of people and clusters on one real Slurm; after each act, what hpctrain says is
held against squeue and against what the trainer really did.

    acts.py --seed 1 --num 20 [--length 6] [--table FILE]

A sequence is a run in a folder of its own, and a random list of acts on it. Its end is always the
same: whatever is in the way is taken away, and `chain`, typed as often as it says it has work, must
reach the target without random weights and without losing a complete checkpoint.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import chains  # noqa: E402
import saves  # noqa: E402
from fault_cluster import Cluster  # noqa: E402

LIVE = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED"}
STEPS, CODES = 30, {0, 1, 3, 4, 8}


class Box:
    """The cluster, as `chains.Chain` asks it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def run(self, *argv, cwd=None, **environ):
        fast = {"HPCTRAIN_WATCH_S": "0.5", "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(
            argv,
            cwd=cwd,
            env={**self.cluster.environ, **fast, **environ},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def ok(self, *argv, **more):
        done = self.run(*argv, **more)
        assert done.returncode == 0, (argv, done.stderr)
        return done.stdout


@dataclass
class Sequence:
    """One run, the acts on it, and everything that was found wrong."""

    chain: chains.Chain
    rng: random.Random
    acts: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    good: list[str] = field(default_factory=list)  # the argv that trains
    layout: str = "deepspeed"

    # ---- what is

    def squeue(self) -> dict[str, str]:
        said = self.chain.sandbox.ok("squeue", "-h", "-o", "%A|%T|%Z")
        rows = [line.split("|") for line in said.splitlines()]
        return {job: state for job, state, folder in rows if folder == str(self.chain.dir)}

    def ask(self, *words) -> tuple[int, dict, str]:
        """A verb's exit code, its JSON and what it said; a traceback or an odd code is wrong."""
        done = self.chain.hpctrain(*words)
        if "Traceback" in done.stderr or done.returncode not in CODES:
            self.fault(f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr[-900:]}")
        try:
            return done.returncode, json.loads(done.stdout), done.stderr
        except ValueError:
            return done.returncode, {}, done.stderr

    def fault(self, what: str) -> None:
        self.wrong.append(f"after {' > '.join(self.acts)}: {what}")

    # ---- acts; each returns False where there is nothing to act on

    def render_and_sbatch(self) -> bool:
        if self.chain.hpctrain("render").returncode == 0 or self.chain.dir.is_dir():
            self.chain.sandbox.run("sbatch", str(self.chain.dir / "job.sbatch"))
        return True

    def chain_(self) -> bool:
        self.typed("chain")
        return True

    def extend(self) -> bool:
        self.typed("chain", "--extend", "1")
        return True

    def typed(self, *words) -> None:
        before = self.squeue()
        code, _, said = self.ask(*words, "--force")
        queued = "queued" in said or "nothing to submit" in said
        if not (code == 0 and queued or code and "error:" in said and "hint:" in said):
            self.fault(f"`{' '.join(words)}` neither queued nor said why not: {said[-600:]}")
        idle = not before and not self.squeue()  # a job may end while `chain` looks
        if "nothing to submit" in said and "is done" not in said and idle:
            self.fault(f"nothing waits or runs, nothing is done, and nothing to submit: {said}")

    def stop(self) -> bool:
        return self.chain.dir.is_dir() and self.chain.hpctrain("stop", "ft").returncode == 0

    def take_stop_back(self) -> bool:
        there = (self.chain.dir / "STOP").exists()
        (self.chain.dir / "STOP").unlink(missing_ok=True)
        return there

    def cancel(self) -> bool:
        return self.cancelled_by("ft")

    def cancel_by_id(self) -> bool:
        live = self.squeue()
        return bool(live) and self.cancelled_by(self.rng.choice(sorted(live)))

    def cancelled_by(self, target: str) -> bool:
        if not self.chain.dir.is_dir():
            return False
        before = self.squeue()
        done = self.chain.hpctrain("cancel", target)
        told = set(re.findall(r"cancelled job (\d+)", done.stderr))
        if not set(before) & set(self.squeue()) <= told or done.returncode:
            self.fault(f"cancel of {sorted(before)} told {sorted(told)}: {done.stderr[-300:]}")
        self.until(lambda: not self.squeue(), "what was cancelled still waits or runs")
        return True

    def scancel(self) -> bool:
        return self.on_a_job("scancel", LIVE)

    def requeue(self) -> bool:
        return self.on_a_job("requeue", {"RUNNING"})

    def hold(self) -> bool:
        return self.on_a_job("uhold", {"PENDING"})

    def release(self) -> bool:
        return self.on_a_job("release", {"PENDING"})

    def on_a_job(self, verb: str, states: set[str]) -> bool:
        jobs = sorted(job for job, state in self.squeue().items() if state in states)
        if not jobs:
            return False
        argv = ["scancel"] if verb == "scancel" else ["scontrol", verb]
        self.chain.sandbox.run(*argv, job := self.rng.choice(jobs))
        if verb == "requeue":
            self.chain.sandbox.run("scontrol", "update", f"jobid={job}", "StartTime=now")
        return True

    def break_it(self) -> bool:
        self.edit(argv=["bash", "-c", "echo broken >&2; exit 7"])
        return True

    def mend(self) -> bool:
        self.edit(argv=self.good)
        return True

    def edit(self, **options) -> None:
        path = self.chain.top / "run.yaml"
        spec = json.loads(path.read_text())
        spec["recipe_options"].update(options)
        path.write_text(json.dumps(spec))
        if self.chain.dir.is_dir():
            self.chain.hpctrain("render", "--force")

    def kill_a_rank(self) -> bool:
        ranks = [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self.owns(pid)
        ]
        if ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rng.choice(ranks), signal.SIGKILL)
        return bool(ranks)

    def owns(self, pid: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            return False
        return words[1:2] == [str(chains.TRAINER)] and str(self.chain.truth) in words

    def go_back(self) -> bool:
        """`checkpoint use` of an earlier checkpoint, while nothing of the run trains."""
        if self.squeue() or not self.chain.dir.is_dir():
            return False
        _, told, _ = self.ask("checkpoint", "list", "runs/ft", "--json")
        made = [row["name"] for row in told.get("checkpoints", []) if row["kind"] == "made"]
        numbers = sorted(filter(None, map(saves.ALL[self.layout].number, made)))
        if len(numbers) < 2:
            return False
        number = self.rng.choice(numbers[:-1])
        name = saves.ALL[self.layout].folder_of(number)
        code, _, said = self.ask("checkpoint", "use", "runs/ft", "--to", name)
        if code:
            self.fault(f"`checkpoint use --to {name}` ended with {code}: {said[-300:]}")
        event = {"event": "used", "rank": 0, "step": number, "attempt": ""}
        with (self.chain.truth / "truth.jsonl").open("a") as truth:
            truth.write(json.dumps(event) + "\n")
        return True

    def wait(self) -> bool:
        time.sleep(self.rng.uniform(0.5, 3))
        return True

    # ---- what must hold

    def until(self, true, what: str, limit_s: float = 60) -> bool:
        """Whether `true()` comes within the time; it is wrong where it does not. `true` returns ""
        or False/what is not so yet."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            if true():
                return True
            time.sleep(0.3)
        self.fault(what)
        return False

    def check(self) -> None:
        if not self.chain.dir.is_dir():
            return
        asked_s = time.monotonic()
        for _ in range(6):  # a job may begin or end between two looks
            before = self.squeue()
            code, told, _ = self.ask("status", "ft", "--json")
            if before == self.squeue():
                break
        else:
            return
        (run,) = told.get("runs") or [{"links": [], "state": "", "progress": {}}]
        states = {link["job_id"]: link["state"] for link in run["links"]}
        live = {job: state for job, state in states.items() if state in LIVE}
        if live != before:
            self.fault(f"status tells {live}, squeue {before}")
        if (code == 8) != bool(before) or (run["state"] in ("running", "pending")) != bool(before):
            self.fault(f"status says {run['state']} with code {code}, squeue {before}")
        self.agree(run, before, asked_s)

    def agree(self, run: dict, live: dict[str, str], asked_s: float) -> None:
        """cost and cancel name the same jobs and the same time as status."""
        _, bill, _ = self.ask("cost", "runs/ft", "--json")
        dry = self.chain.hpctrain("cancel", "ft", "--dry-run").stderr
        if live != self.squeue():
            return
        told = set(re.findall(r"would cancel job (\d+)", dry))
        if told != set(live) or not live and "waits or runs" not in dry:
            self.fault(f"cancel would cancel {sorted(told)}, squeue {sorted(live)}")
        elapsed = sum(link["elapsed_s"] or 0 for link in run["links"])
        since_s = (time.monotonic() - asked_s) * len(live)  # what runs goes on between two verbs
        used = bill.get("used", {}).get("time_s")
        if used is not None and abs(used - elapsed) > 3 + 3 * len(run["links"]) + since_s:
            self.fault(f"status counts {elapsed:.0f} s, cost {used:.0f} s")
        trained = self.trained()
        if (run["progress"].get("iteration") or 0) > trained:
            self.fault(f"status is at {run['progress']['iteration']}, the trainer at {trained}")

    def trained(self) -> int:
        """How far the trainer has come, by its own notes; going back counts from there."""
        at = 0
        for event in self.told():
            if event["event"] == "used":
                at = event["step"]
            elif event["event"] == "step":
                at = max(at, event["iteration"])
        return at

    def told(self) -> list[dict]:
        path = self.chain.truth / "truth.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """Mend, take STOP back, release; then `chain` must reach the target."""
        self.acts.append("END")
        (self.chain.dir / "STOP").unlink(missing_ok=True)
        self.mend()
        for job in self.squeue():
            self.chain.sandbox.run("scontrol", "release", job)
        for _ in range(4):
            _, _, said = self.ask("chain", "--force")
            self.until(lambda: not self.squeue(), f"the queue does not empty: {said}", 120)
            if self.chain.happened("end"):
                break
        self.judge()

    def judge(self) -> None:
        ends = [event["iteration"] for event in self.chain.happened("end")]
        if STEPS not in ends:
            self.fault(f"the target was not reached: {self.chain.records(event='begin')[-3:]}")
        if self.chain.happened("random_weights") or self.chain.happened("mixed"):
            self.fault("trained from random weights, or from a mixture")
        saved = 0
        for event in self.told():
            if event["rank"]:
                continue
            if event["event"] == "used":
                saved = event["step"]
            elif event["event"] == "saved":
                saved = max(saved, event["step"])
            elif event["event"] == "start" and event["iteration"] < saved:
                self.fault(f"started at {event['iteration']} though {saved} was complete")
        code, told, _ = self.ask("status", "ft", "--json")
        if code or told["runs"][0]["state"] != "done":
            self.fault(f"status says {told['runs'][0]['state']} with code {code} at the target")


ACTS = {
    "sbatch by hand": (Sequence.render_and_sbatch, 3),
    "chain": (Sequence.chain_, 5),
    "chain --extend 1": (Sequence.extend, 1),
    "stop": (Sequence.stop, 2),
    "STOP removed": (Sequence.take_stop_back, 5),
    "cancel": (Sequence.cancel, 1),
    "cancel JOBID": (Sequence.cancel_by_id, 2),
    "scancel": (Sequence.scancel, 2),
    "requeue": (Sequence.requeue, 4),
    "hold": (Sequence.hold, 3),
    "release": (Sequence.release, 4),
    "a rank is killed": (Sequence.kill_a_rank, 2),
    "checkpoint use": (Sequence.go_back, 4),
    "the program breaks": (Sequence.break_it, 1),
    "the program is mended": (Sequence.mend, 1),
    "time passes": (Sequence.wait, 3),
}


def play(box: Box, top: Path, rng: random.Random, length: int) -> Sequence:
    """One sequence from its first act to its judgement."""
    top.mkdir(parents=True)
    layout = rng.choice(sorted(saves.ALL))
    more = ["--step-s", "0.6", "--layout", layout, *["--signal"] * rng.randint(0, 1)]
    jobs = {"jobs": rng.randint(1, 3), "give_up_after": rng.randint(1, 3)}
    chain = chains.Chain(box, top, steps=STEPS, chain=jobs, more=more)
    chain.truth.mkdir()
    good = json.loads((top / "run.yaml").read_text())["recipe_options"]["argv"]
    one = Sequence(chain, rng, good=good, layout=layout)
    one.edit(layout=saves.ALL[layout].layout or layout)
    names, weights = list(ACTS), [weight for _, weight in ACTS.values()]
    while len(one.acts) < length and not one.wrong:
        name = rng.choices(names, weights)[0]
        if ACTS[name][0](one) is not False:
            one.acts.append(name)
            one.check()
    if not one.wrong:
        one.end()
    live = one.squeue()
    if live:
        box.run("scancel", *live)
    return one


def campaign(seed: int, num: int, length: int, say=print) -> list[Sequence]:
    """Play `num` sequences on a sandbox of their own; the same seed plays the same acts."""
    with tempfile.TemporaryDirectory(prefix="acts-") as place:
        cluster = Cluster(Path(place) / "box", 2, f"acts{os.getpid()}")
        played = []
        try:
            for number in range(num):
                rng = random.Random(f"{seed}.{number}")
                begun = time.monotonic()
                one = play(Box(cluster), Path(place) / str(number), rng, length)
                played.append(one)
                say(f"{number}: {time.monotonic() - begun:.0f} s, {' > '.join(one.acts)}")
                for what in one.wrong:
                    say(f"  WRONG {what}")
        finally:
            cluster.down()
    return played


def table(played: list[Sequence], command: str) -> str:
    """What was played, as Markdown."""
    counts = collections.Counter(act for one in played for act in one.acts)
    wrong = sum(bool(one.wrong) for one in played)
    rows = [f"| {name} | {counts[name]} |" for name in ACTS]
    head = f"`{command}`: {len(played)} sequences, {sum(counts.values())} acts, {wrong} with anything wrong."
    layouts = collections.Counter(one.layout for one in played)
    laid = ", ".join(f"`{name}` {count}" for name, count in sorted(layouts.items()))
    return "\n".join([head, f"Layouts: {laid}.", "", "| act | played |", "|---|---|", *rows, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=int, default=20)
    parser.add_argument("--length", type=int, default=6, help="acts of a sequence")
    parser.add_argument("--table", type=Path, help="write the table of what was played there")
    args = parser.parse_args()
    played = campaign(args.seed, args.num, args.length, lambda text: print(text, flush=True))
    text = table(played, f"tools/acts --seed {args.seed} --num {args.num} --length {args.length}")
    print(text)
    if args.table:
        args.table.write_text(text)
    return int(any(one.wrong for one in played))


if __name__ == "__main__":
    sys.exit(main())
