"""A run of the stand-in trainer on the sandbox's Slurm, and what it left behind."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from pathlib import Path

TRAINER = Path(__file__).parent / "trainer.py"


class Chain:
    """A run of the stand-in trainer on the sandbox."""

    def __init__(self, sandbox, top: Path, **changes):
        self.sandbox, self.top = sandbox, top
        self.dir, self.ckpt, self.truth = top / "runs" / "ft", top / "ck", top / "truth"
        steps = changes.pop("steps", 6)
        argv = changes.pop(
            "argv",
            [
                sys.executable,
                str(TRAINER),
                "--truth",
                str(self.truth),
                "--steps",
                str(steps),
                "--save-every",
                "3",
                "--tp",
                "2",
                "--step-s",
                "0.05",
                *changes.pop("more", []),
            ],
        )
        options = {
            "argv": argv,
            "layout": "deepspeed",
            "target_iteration": steps,
            "save_every": 3,
            "signal": "--signal" in argv,
        }
        spec = {
            "name": "ft",
            "site": "lumi",
            "recipe": "command",
            "account": "project_465001281",
            "partition": "small-g",
            "nodes": 1,
            "tasks_per_node": 2,
            "gpus_per_node": 1,
            "time": "00:05:00",
            "checkpoint": {"dir": str(self.ckpt)},
            "recipe_options": options,
            **changes,
        }
        (top / "run.yaml").write_text(json.dumps(spec))

    def hpctrain(self, *args, **environ):
        return self.sandbox.run(
            sys.executable, "-m", "hpctrain", *map(str, args), cwd=self.top, **environ
        )

    def ok(self, *args, **environ):
        done = self.hpctrain(*args, **environ)
        assert done.returncode == 0, done.stderr
        return done

    def records(self, name="links.jsonl", **wanted):
        path = self.dir / name
        found = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        return [
            record
            for record in found
            if all(record.get(key) == value for key, value in wanted.items())
        ]

    def happened(self, event):
        path = self.truth / "truth.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [found for found in map(json.loads, lines) if found["event"] == event]

    def queue(self):
        """The run's live jobs: (id, state, dependency)."""
        said = self.sandbox.ok("squeue", "-h", "-o", "%A|%T|%E|%Z")
        return [
            line.split("|")[:3] for line in said.splitlines() if line.split("|")[3] == str(self.dir)
        ]

    def wait(self, what=lambda chain: not chain.queue(), seconds=90):
        for _ in range(seconds * 4):
            if what(self):
                return
            time.sleep(0.25)
        logs = "\n".join(path.read_text()[-3000:] for path in (self.dir / "logs").glob("*"))
        raise AssertionError(f"still {self.queue()}\n{self.records()}\n{logs}")

    @contextlib.contextmanager
    def held(self, event):
        """The trainer waits between two steps, once it did `event`: however slow this machine is, a
        link is running then."""
        self.truth.mkdir(exist_ok=True)
        self.wait(lambda chain: chain.happened(event))
        (self.truth / "pause").touch()
        yield
        (self.truth / "pause").unlink()

    def exit_code(self, job_id):
        return re.search(
            r"ExitCode=(\d+):", self.sandbox.ok("scontrol", "show", "job", "-o", job_id)
        )[1]
