"""GAD's two stages as a pipeline on the real Slurm, with stand-ins for verl and Ray.

With the real Ray: HPCTRAIN_RAY_PYTHON=<a Python that has it> pytest tests/slurm/test_verl.py
(tools/prove-verl does).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from promises.look.worlds import TALK, World

pytestmark = pytest.mark.slurm
HPCTRAIN = (sys.executable, "-m", "hpctrain")
STANDIN = Path(__file__).parents[1] / "standin"
RAY_PYTHON = os.environ.get("HPCTRAIN_RAY_PYTHON")
MERGE = """
import os, sys
folder = sys.argv[sys.argv.index("--local_dir") + 1]
count = len([name for name in os.listdir(folder) if name.startswith("model_world_size")])
open(os.path.join(folder, "huggingface", "model.safetensors"), "w").write(f"{count} shards, merged")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """run.yaml files of both stages below a folder with a hostile name, and a working copy of verl
    for each."""
    top = tmp_path / "it's $(touch canary)"
    top.mkdir()
    files = World(top)
    files.model("hf", template=True, positions=32768)
    for name in ("t.parquet", "v.parquet"):
        files.parquet(name, [{"content": TALK[:1], "teacher_response": "that"}] * 1000)
    (top / "merge.py").write_text(MERGE)
    for branch in ("warmup", "gad"):
        copy = top / branch
        (copy / "verl" / "trainer").mkdir(parents=True)
        for package in (copy / "verl", copy / "verl" / "trainer"):
            (package / "__init__.py").touch()
        shutil.copy(STANDIN / "verl" / "main_ppo.py", copy / "verl" / "trainer")
        subprocess.run(["git", "init", "-q", "-b", branch, str(copy)], check=True)
    return top


def write_run(top: Path, stage: str, **changes: Any) -> Path:
    branch = "gad" if stage == "adversarial" else "warmup"
    options = {
        "stage": stage,
        "size": "3B",
        "verl": str(top / branch),
        "python": RAY_PYTHON or sys.executable,
        "ray_timeout_s": 60,
    }
    options.update(
        {"merge_script": str(top / "merge.py")}
        if stage == "adversarial"
        else {"model": str(top / "hf")}
    )
    run = {
        "name": stage,
        "site": "lumi",
        "recipe": "verl-gad",
        "account": "project_465000000",
        "partition": "standard-g",
        "nodes": 2,
        "time": "5m",
        "checkpoint": {"dir": str(top / f"ck {stage}")},
        "data": {"train": [str(top / "t.parquet")], "valid": [str(top / "v.parquet")]},
        "recipe_options": options,
        "config": {
            "trainer": {"save_freq": 2, "total_training_steps": 8 if stage == "adversarial" else 4}
        },
        "env": {
            "PYTHONPATH": f"{top / branch}" + ("" if RAY_PYTHON else f":{STANDIN / 'ray'}"),
            "RAY_STANDIN_LOG": str(top / "ray.jsonl"),
            "STRAY_MARK": "none",
            "STANDIN_STEP_S": "0",
        },
        "sbatch": {"cpus-per-task": 2},
    }
    run["env"].update(changes)
    (top / f"{stage}.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    return top / f"{stage}.yaml"


def of_job(job: str) -> list[str]:
    """Command lines of the processes that belong to a job, by the environment that they
    inherited."""
    found = []
    for name in os.listdir("/proc"):
        try:
            mine = (
                f"SLURM_JOB_ID={job}".encode()
                in Path("/proc", name, "environ").read_bytes().split(b"\0")
                if name.isdigit()
                else False
            )
            if mine:
                found.append(Path("/proc", name, "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


def until(condition: Any, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_warmup_hands_its_last_checkpoint_to_the_adversarial_stage(
    idle: Any, project: Path
) -> None:
    write_run(project, "warmup")
    write_run(project, "adversarial")
    stages = {
        "warmup": {"run": "warmup.yaml"},
        "adversarial": {
            "run": "adversarial.yaml",
            "from": "warmup",
            "hand_over": "checkpoint",
            "as": "hardlink",
            "jobs": 2,
        },
    }
    (project / "pipeline.yaml").write_text(
        yaml.safe_dump({"schema_version": 1, "name": "gad", "stages": stages}, sort_keys=False)
    )
    idle.ok(*HPCTRAIN, "pipeline", "--yes", cwd=project)
    until(lambda: not idle.ok("squeue", "-h").strip(), 120)
    logs = {
        path.parents[1].name: path.read_text()
        for path in sorted(project.glob("runs/gad/*/logs/*.out"), reverse=True)
    }
    kept = project / "ck adversarial"

    assert (
        "begins at 0, validates first: true" in logs["warmup"] and "verl is " in logs["warmup"]
    ), logs["warmup"]
    assert "begins at 4, validates first: true" in logs["adversarial"], logs["adversarial"]
    assert (kept / "latest_checkpointed_iteration.txt").read_text() == "8"
    for name in ("actor", "critic"):
        assert (
            kept / "start-model" / name / "model.safetensors"
        ).read_text() == "16 shards, merged"
    assert (kept / "global_step_4" / "data.pt").samefile(
        project / "ck warmup" / "global_step_4" / "data.pt"
    )
    assert not list((project / "ck warmup" / "global_step_4").rglob("*.safetensors"))
    assert not (project / "canary").exists() and not list(Path("/tmp").glob(f"ray-{os.getuid()}-*"))


def test_a_cancelled_job_leaves_no_process_on_any_node_and_the_next_one_resumes(
    idle: Any, project: Path
) -> None:
    run = write_run(project, "warmup", STANDIN_STEP_S="1")
    script = idle.ok(*HPCTRAIN, "render", str(run), cwd=project).strip()
    job = idle.ok("sbatch", "--parsable", script, cwd=project).strip()
    tracker, log = (
        project / "ck warmup" / "latest_checkpointed_iteration.txt",
        Path(script).parent / "logs" / f"warmup-{job}.out",
    )
    until(lambda: tracker.exists() and tracker.read_text() == "2")
    # One on each node that its Ray left to itself, in a session of its own.
    assert (
        len(
            [
                line
                for line in of_job(job)
                if ("raylet/raylet" if RAY_PYTHON else "stray-none") in line
            ]
        )
        == 2
    )
    idle.ok("scancel", job)
    until(lambda: idle.state(job) == "CANCELLED")
    until(lambda: of_job(job) == [], 20)

    assert not list(Path("/tmp").glob(f"ray-{os.getuid()}-{job}.*"))
    job = idle.ok("sbatch", "--parsable", script, cwd=project).strip()
    until(lambda: idle.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"))
    said = log.with_name(f"warmup-{job}.out").read_text()
    assert idle.state(job) == "COMPLETED" and "begins at 2, validates first: false" in said, said


def test_the_wrong_branch_ends_the_job_before_ray_starts(idle: Any, project: Path) -> None:
    run = write_run(project, "warmup")
    subprocess.run(
        ["git", "-C", str(project / "warmup"), "symbolic-ref", "HEAD", "refs/heads/gad"], check=True
    )
    script = idle.ok(*HPCTRAIN, "render", "--no-check", str(run), cwd=project).strip()
    job = idle.ok("sbatch", "--parsable", script, cwd=project).strip()
    until(lambda: idle.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"))
    said = (Path(script).parent / "logs" / f"warmup-{job}.out").read_text()

    assert idle.state(job) == "FAILED" and "is at gad, and the stage needs branch warmup" in said, (
        said
    )
    assert not (project / "ray.jsonl").exists()
