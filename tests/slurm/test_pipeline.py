"""Pipelines on a real Slurm: one graph, each stage from what the one before it made, resumable
anywhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import checkpoints
import pytest

pytestmark = pytest.mark.slurm
TRAINER = Path(__file__).parents[1] / "standin" / "trainer.py"


class Two:
    """Two stages of the stand-in trainer: `warmup` to 6, then `main`, from its checkpoint, to 9
    more."""

    def __init__(self, sandbox, top: Path, way: str, argv_before=(), **stage):
        self.sandbox, self.top, self.folder = sandbox, top, top / "runs" / "two's"
        for name, steps in (("warmup", 6), ("main", 9)):
            argv = [
                *argv_before,
                sys.executable,
                str(TRAINER),
                "--truth",
                str(top / name),
                "--steps",
                str(steps),
                "--save-every",
                "3",
                "--tp",
                "2",
                "--step-s",
                "0.05",
            ]
            (top / f"{name}.yaml").write_text(
                json.dumps(
                    {
                        "name": name,
                        "site": "lumi",
                        "recipe": "command",
                        "account": "project_465001281",
                        "partition": "small-g",
                        "nodes": 1,
                        "tasks_per_node": 2,
                        "gpus_per_node": 1,
                        "time": "00:05:00",
                        "checkpoint": {"dir": str(top / f"ck {name}")},
                        "chain": {"give_up_after": 1},
                        "recipe_options": {
                            "argv": argv,
                            "layout": "deepspeed",
                            "target_iteration": steps,
                            "save_every": 3,
                        },
                    }
                )
            )
            (top / name / "faults").mkdir(parents=True)
        (top / "pipeline.yaml").write_text(
            json.dumps(
                {
                    "schema_version": 1,
                    "name": "two's".replace("'", "-"),
                    "stages": {
                        "main": {
                            "run": "main.yaml",
                            "from": "warmup",
                            "as": way,
                            "jobs": 3,
                            **stage,
                        },
                        "warmup": {"run": "warmup.yaml", "jobs": 3},
                    },
                }
            )
        )
        self.folder = top / "runs" / "two-s"

    def hpctrain(self, *args):
        return self.sandbox.run(sys.executable, "-m", "hpctrain", *map(str, args), cwd=self.top)

    def ok(self, *args):
        done = self.hpctrain(*args)
        assert done.returncode == 0, done.stderr
        return done

    def records(self, stage, name="links.jsonl", **wanted):
        path = self.folder / stage / name
        found = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        return [
            record
            for record in found
            if all(record.get(key) == value for key, value in wanted.items())
        ]

    def happened(self, stage, event):
        lines = (self.top / stage / "truth.jsonl").read_text().splitlines()
        return [found for found in map(json.loads, lines) if found["event"] == event]

    def wait(self, seconds=120):
        for _ in range(seconds * 4):
            if not self.sandbox.ok("squeue", "-h").strip():
                return
            time.sleep(0.25)
        logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*/logs/*"))
        raise AssertionError(self.sandbox.ok("squeue") + logs)


def test_two_stages_with_a_kill_in_each_run_to_the_end_of_the_second(sandbox, tmp_path):
    two = Two(sandbox, tmp_path, "copy")
    for stage, step in (("warmup", 5), ("main", 5)):
        (tmp_path / stage / "faults" / "1").write_text(
            json.dumps({"kind": "kill_rank", "at_step": step, "rank": 1})
        )
    # A kill that leaves a new checkpoint is progress; give_up_after 1 ends only a chain that stands
    # still.
    planned = json.loads(two.ok("pipeline", "--dry-run", "--json").stdout)
    assert [(s["stage"], s["from"], s["new"]) for s in planned["stages"]] == [
        ("warmup", None, [1, 2, 3]),
        ("main", "warmup", [1, 2, 3]),
    ]
    assert [link["expected"] for link in planned["stages"][1]["links"]][:2] == [
        "finetune",
        "resume",
    ]
    assert not (tmp_path / "runs").exists()
    two.ok("pipeline")
    submitted = {
        (r["link"], s): r
        for s in ("warmup", "main")
        for r in two.records(s, "ledger.jsonl", event="submitted")
    }
    assert submitted[1, "main"]["depends_on"] == submitted[3, "warmup"]["job_id"]
    assert two.hpctrain("status", "two-s").returncode == 8
    two.wait()
    assert [(s["mode"], s["iteration"]) for s in two.happened("warmup", "start")] == [
        ("scratch", 0),
        ("resume", 3),
    ]
    assert [(s["mode"], s["iteration"]) for s in two.happened("main", "start")] == [
        ("finetune", 0),
        ("resume", 3),
    ]
    assert two.happened("main", "end")[-1]["optimizer_steps"] == 9
    handed = json.loads((two.folder / "main" / "hand_over.json").read_text())
    assert (
        handed["checkpoint"] == str(tmp_path / "ck warmup" / "global_step6")
        and handed["iteration"] == 6
    )
    # It goes to 9, so the copy of global_step6 has a name that no save of its own reaches.
    assert checkpoints.lineages(tmp_path / "ck main" / "start-6") == checkpoints.lineages(
        tmp_path / "ck warmup" / "global_step6"
    )
    assert checkpoints.lineages(tmp_path / "ck main" / "global_step6") != checkpoints.lineages(
        tmp_path / "ck main" / "start-6"
    )
    again = two.ok("pipeline", "--json")
    assert [(s["state"], s["new"]) for s in json.loads(again.stdout)["stages"]] == [
        ("done", []),
        ("done", []),
    ]
    status = json.loads(two.ok("status", "pipeline.yaml", "--json").stdout)
    assert [run["run"] for run in status["runs"]] == ["warmup", "main"] and {
        run["state"] for run in status["runs"]
    } == {"done"}
    assert [(s["stage"], s["state"]) for s in status["pipeline"]["stages"]] == [
        ("warmup", "done"),
        ("main", "done"),
    ]
    cost = json.loads(two.ok("cost", "two-s", "--json").stdout)
    took = [
        sum(start["elapsed_s"] for start in stage["spent"]["starts"]) for stage in cost["stages"]
    ]
    assert [len(stage["spent"]["starts"]) >= 2 for stage in cost["stages"]] == [True, True]
    assert cost["still"]["gpu_hours"] == 0
    # One GCD, for as long as the jobs ran; LUMI bills half a GPU-hour for it.
    assert cost["used"]["gpu_hours"] == pytest.approx(sum(took) / 3600)
    assert cost["used"]["billed"] == {"GPU-hour": pytest.approx(sum(took) / 7200)}
    pages = two.ok("report", "two-s").stdout.split("\n")
    assert (
        Path(pages[0]).read_text().count("<a href=") >= 2 and "main" in Path(pages[0]).read_text()
    )


def test_a_stage_that_gives_up_ends_the_next_too_and_running_it_again_goes_on(sandbox, tmp_path):
    go = tmp_path / "go"
    two = Two(
        sandbox, tmp_path, "symlink", ["bash", "-c", f'test -e "{go}" || exit 7; exec "$@"', "x"]
    )
    two.ok("pipeline")
    two.wait()
    assert [record["mode"] for record in two.records("warmup", event="begin")] == [
        "scratch",
        "gave_up",
    ]
    (begun,) = two.records("main", event="begin")
    assert (
        begun["mode"] == "gave_up"
        and "stage `warmup` has no complete checkpoint and its target is 6" in begun["reason"]
    )
    assert "ExitCode=93:" in sandbox.ok("scontrol", "show", "job", "-o", begun["job_id"])
    assert len(two.records("main", "ledger.jsonl", event="cancelled")) == 2
    assert two.hpctrain("status", "two-s").returncode == 1
    go.touch()
    (only,) = [
        s
        for s in json.loads(two.ok("pipeline", "--stage", "main", "--dry-run", "--json").stdout)[
            "stages"
        ]
        if s["new"]
    ]
    assert (only["stage"], only["state"], only["new"]) == ("main", "ended", [4, 5, 6])
    two.ok("pipeline")
    two.wait()
    assert [(s["mode"], s["iteration"]) for s in two.happened("main", "start")] == [("finetune", 0)]
    assert two.happened("main", "end")[-1]["iteration"] == 9
    assert two.ok("status", "two-s").returncode == 0


def test_a_crash_while_the_second_stage_is_queued_and_a_rerun_neither_lose_nor_double_a_link(
    sandbox, tmp_path
):
    two = Two(sandbox, tmp_path, "symlink", ["bash", "-c", "sleep 600", "x"])
    folder = tmp_path / "bin"
    folder.mkdir()
    real = f'PATH={sandbox.environ["PATH"]!r} sbatch "$@"'
    (folder / "sbatch").write_text(
        f"#!/bin/bash\n[ $1 != --test-only ] || {{ {real}; exit; }}\n"
        f"n=$(($(cat {folder}/n 2>/dev/null || echo 0) + 1)); echo $n >{folder}/n\n"
        f'if [ $n = 4 ]; then {real} >/dev/null; kill -9 "$PPID"; sleep 1; exit 1; fi\n{real}\n'
    )
    (folder / "sbatch").chmod(0o755)
    path = f"{folder}:{sandbox.environ['PATH']}"
    done = sandbox.run(sys.executable, "-m", "hpctrain", "pipeline", cwd=tmp_path, PATH=path)
    assert done.returncode == -9
    assert len(sandbox.ok("squeue", "-h", "-o", "%A").split()) == 4
    assert "was submitted before as job" in two.ok("pipeline").stderr
    queue = dict(line.split("|") for line in sandbox.ok("squeue", "-h", "-o", "%A|%E").splitlines())
    ids = {
        (stage, r["link"]): r["job_id"]
        for stage in ("warmup", "main")
        for r in two.records(stage, "ledger.jsonl", event="submitted")
    }
    assert sorted(ids.values()) == sorted(queue) and len(ids) == 6
    order = [("warmup", 1), ("warmup", 2), ("warmup", 3), ("main", 1), ("main", 2), ("main", 3)]
    for before, after in zip(order, order[1:]):
        assert ids[before] in queue[ids[after]], (before, after, queue)
    assert json.loads(two.ok("pipeline", "--json").stdout)["stages"][1]["new"] == []
    assert "cancelled job" in two.ok("cancel", "two-s").stderr
    two.wait()
    # A link that had begun may have ended by itself meanwhile; none that waited may be left, or
    # left unwritten.
    assert {2, 3} <= {
        record["link"] for record in two.records("warmup", "ledger.jsonl", event="cancelled")
    }
